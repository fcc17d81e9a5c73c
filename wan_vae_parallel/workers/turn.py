"""Whose turn it is: of several threads that want to work with the same workers, one does and the others wait."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator


class Holder:
    """Has the turn, from when it takes it until it gives it back or is gone."""


class Turn:
    """Is held by an object, in whichever thread that is, and free again when that object is gone.

    So that whoever is interrupted before they could give it back, or note that they have it, keeps nobody waiting; of a
    lock nobody could tell.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._holder: weakref.ref[Holder] | None = None
        self._free = threading.Event()

    @property
    def held(self) -> bool:
        """Whether somebody has it."""
        holder = self._holder
        return holder is not None and holder() is not None

    def held_by(self, holder: Holder) -> bool:
        """Whether ``holder`` has it."""
        held = self._holder
        return held is not None and held() is holder

    def take(self, holder: Holder, seconds: float = 0.0) -> bool:
        """Waits for at most ``seconds``; whether ``holder`` has it now."""
        deadline = time.monotonic() + seconds
        while True:
            with self._changing:
                self._free.clear()  # also what was set late, when another had it already
                if not self.held:
                    self._holder = weakref.ref(holder)
                    return True
            left = deadline - time.monotonic()
            # One that has gone may have told nobody.
            if left <= 0 or (not self._free.wait(left) and self.held):
                return False

    def give_back(self, holder: Holder) -> None:
        """Ends ``holder``'s turn, if it has it."""
        if self.held_by(holder):
            self._holder = None
            self._free.set()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[bool]:
        """Takes it for the block if it is free; gives whether it was."""
        holder = Holder()
        try:
            yield self.take(holder)
        finally:
            self.give_back(holder)
