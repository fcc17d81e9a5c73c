"""Whether processes still run, when nothing but their silence could tell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Of this machine's processes the system tells whether they are stopped. Who continues one sooner does no harm.
_STOPPED_SECONDS = 5.0
# A machine that is gone, or has no breath left for anything.
_SILENT_SECONDS = 60.0
# If this process itself did not run for so long, it can't blame others for their silence.
_PAUSE_SECONDS = 2.0


def stopped(pid: int | None) -> bool:
    """Whether somebody has stopped the process (SIGSTOP), so that it lives and does nothing."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")


@dataclasses.dataclass
class _Neighbour:
    rank: int
    beats: int = 0
    heard: float = 0.0


class Pulse:
    """Shows that this rank runs, in a store that all ranks reach, and looks after some of them.

    Args:
        store: the ranks'.
        rank: this one.
        name: what it is called in errors.
        others: the ranks to look after; every rank should be among some other's.
    """

    def __init__(self, store: Store, rank: int, name: str, others: Iterable[int]) -> None:
        self._store = store
        self._rank = rank
        self._neighbours = [_Neighbour(other) for other in sorted({*others} - {rank})]
        self._looked = time.monotonic()
        who = {"name": name, "host": socket.gethostname(), "pid": os.getpid()}
        store.set(f"who/{rank}", json.dumps(who))

    def beat(self) -> str:
        """To be called about once a second; returns what is wrong with another rank, or nothing.

        One that is stopped on this machine is continued then, so that it can end.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.add(self._key(self._rank), 1)
        now = time.monotonic()
        awake = now - self._looked < _PAUSE_SECONDS
        self._looked = now
        for neighbour in self._neighbours:
            beats = self._store.add(self._key(neighbour.rank), 0)
            if beats != neighbour.beats or not awake:
                neighbour.beats, neighbour.heard = beats, now
            silent = now - neighbour.heard
            # None at all: it has not begun, or is over.
            if beats > 0 and silent > _STOPPED_SECONDS and (reason := self._verdict(neighbour.rank, silent)):
                return reason
        return ""

    def end(self) -> None:
        """This rank will show nothing more, and that is right."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and nobody looks then
            self._store.add(self._key(self._rank), -(2**40))

    def _verdict(self, rank: int, silent: float) -> str:
        who = json.loads(self._store.get(f"who/{rank}"))
        if who["host"] == socket.gethostname() and stopped(who["pid"]):
            with contextlib.suppress(OSError):
                os.kill(who["pid"], signal.SIGCONT)
            return f"{who['name']} does not answer for {silent:.0f} s, as its process {who['pid']} was stopped"
        if silent > _SILENT_SECONDS:
            return f"{who['name']} does not answer for {silent:.0f} s (process {who['pid']}); look at its machine"
        return ""

    def _key(self, rank: int) -> str:
        return f"beats/{rank}"
