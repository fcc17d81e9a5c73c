"""Progress of work that keeps people waiting once, in the log."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)

# What takes longer than this is worth a word.
WORD_SECONDS = 2.0


class Progress:
    """Logs every two seconds how much of a work is done, from a thread of its own; within a with statement.

    Args:
        what: is being done.
        count: of its parts.
    """

    def __init__(self, what: str, count: int) -> None:
        self._what = what
        self._count = count
        self._done = 0
        self._counting = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True, name="wan-vae-parallel progress")

    def add(self) -> None:
        """One more part is done."""
        with self._counting:
            self._done += 1

    def _say(self) -> None:
        while not self._over.wait(WORD_SECONDS):
            logger.info("%s: %d of %d", self._what, self._done, self._count)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
