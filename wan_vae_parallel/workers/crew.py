"""Worker processes and what their parent says to them and hears from them, all of them together.

The first one to fall takes the others along: whoever asks for something gets the error that tells why.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import time
from collections.abc import Callable
from typing import Any

from ..cancel import LOOK_SECONDS, check_cancelled
from ..errors import WanVAEError, WorkerError
from ..ops.dispatch import say_once
from .failures import cause, hint
from .heartbeat import PAUSE_SECONDS
from .process import WorkerProcess

logger = logging.getLogger(__name__)

# A worker that says nothing for so long is stopped or stuck; it says something every second.
_SILENCE_SECONDS = 7.0
# What may be answered to while nobody listens.
_KEPT = ("ready", "finished", "parked")


class Crew:
    """Processes that are told and asked together.

    Attributes:
        workers: by rank; empty while there are none.
    """

    def __init__(self) -> None:
        self.workers: list[WorkerProcess] = []
        # Answers of some of the workers, by kind and rank, when whoever waited for all of them was cancelled.
        self._early: dict[str, dict[int, tuple[Any, ...]]] = {}
        self._process = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether the workers are this process's, and not those of the one that it was forked from."""
        return os.getpid() == self._process

    def tell(self, *message: object) -> None:
        """Sends ``message`` to all workers."""
        workers = self._living()
        for worker in workers:
            try:
                worker.connection.send(message)
            except OSError:
                raise self._cause(workers) from None

    def hand_over(self, *descriptors: int) -> None:
        """Gives all workers ``descriptors``, which follow a message that said so."""
        workers = self._living()
        for worker in workers:
            try:
                for descriptor in descriptors:
                    worker.hand_over(descriptor)
            except OSError:
                raise self._cause(workers) from None

    def _living(self) -> list[WorkerProcess]:
        """The workers; another thread, or a callback, may have ended them."""
        if not self.ours:
            raise WanVAEError("this process was forked from the one that works with the VAE; load it here, too")
        if not self.workers:
            raise WorkerError("the workers were ended while they worked; the next call starts new ones")
        return list(self.workers)

    def gather(
        self,
        kind: str,
        count: int,
        *,
        patience: float | None = None,
        limit: float | None = None,
        check: Callable[[], None] | None = check_cancelled,
    ) -> list[tuple[Any, ...]]:
        """Waits for a message of ``kind`` (for ``"done"`` also ``"end"``) from each of the first ``count`` workers.

        Args:
            kind: of message.
            count: of workers.
            patience: seconds that any of them may say nothing at all, unless it is stopped; by default a few.
            limit: seconds until all must have answered.
            check: called several times a second; what it raises ends the wait.
        """
        patience = _SILENCE_SECONDS if patience is None else patience
        answers = self._early.pop(kind, {})
        workers = self._living()
        waiting: dict[object, WorkerProcess] = {worker.connection: worker for worker in workers}
        since = looked = time.monotonic()
        for worker in workers:
            worker.heard = since
        while len([rank for rank in answers if rank < count]) < count:
            pending = [w.connection for w in workers if w.rank not in answers or w.rank >= count]
            try:
                for ready in multiprocessing.connection.wait(pending, timeout=LOOK_SECONDS):
                    worker = waiting[ready]
                    message = self._receive(worker, workers)
                    if message[0] == kind or (message[0] == "end" and kind == "done"):
                        answers[worker.rank] = message
            except (EOFError, OSError):
                raise self._cause(workers) from None
            self._living()
            if check is not None:
                try:
                    check()
                except BaseException:
                    if kind in _KEPT:
                        self._early[kind] = answers
                    raise
            # Of those that are waited for the pipe tells; one that has answered may die too, and hold the others up.
            if any(not w.alive and w.connection not in pending for w in workers):
                raise self._cause(workers)
            now = time.monotonic()
            if now - looked > PAUSE_SECONDS:
                for worker in workers:
                    worker.heard = now
            looked = now
            if limit is not None and now - since > limit:
                waited = ", ".join(str(w) for w in workers if w.rank not in answers)
                raise WorkerError(f"{waited} got no further for {limit:.0f} s{hint(workers[0].device)}")
            for worker in workers:
                silent = now - worker.heard
                stopped = silent > _SILENCE_SECONDS and worker.stopped
                if worker.connection in pending and (silent > patience or stopped):
                    raise _silence(worker, silent)
        return [answers[rank] for rank in range(count)]

    def listen(self) -> None:
        """Takes what workers have said by now, without waiting; what is asked for later is kept for then.

        Raises:
            WorkerError: one has ended.
        """
        workers = self._living()
        speaking: dict[object, WorkerProcess] = {worker.connection: worker for worker in workers}
        try:
            while ready := multiprocessing.connection.wait([worker.connection for worker in workers], timeout=0):
                for connection in ready:
                    worker = speaking[connection]
                    message = self._receive(worker, workers)
                    if message[0] in _KEPT:
                        self._early.setdefault(message[0], {})[worker.rank] = message
        except (EOFError, OSError):
            raise self._cause(workers) from None

    def check_running(self) -> None:
        """Raises `WorkerError` if a worker is stopped, and has been silent for long."""
        for worker in self._living():
            silent = time.monotonic() - worker.heard
            if silent > _SILENCE_SECONDS and worker.stopped:
                raise _silence(worker, silent)

    def _receive(self, worker: WorkerProcess, workers: list[WorkerProcess]) -> tuple[Any, ...]:
        """One message of ``worker``, which is there or on its way."""
        message: tuple[Any, ...] = worker.connection.recv()
        worker.heard = time.monotonic()
        if message[0] == "failed":
            raise self._cause(workers, {worker.rank: message[1:]})
        if message[0] == "said":
            _pass_on(*message[1:])
        if message[0] == "prepared":
            worker.prepared = True
        return message

    def _cause(self, workers: list[WorkerProcess], heard: dict[int, tuple[Any, ...]] | None = None) -> WanVAEError:
        self._living()  # else it was another thread
        return cause(workers, heard)


def _silence(worker: WorkerProcess, seconds: float) -> WorkerError:
    return WorkerError(
        f"{worker} is not answering for {seconds:.0f} s (process {worker.pid}); it and the others were ended, the next "
        f"call starts new ones{worker.last_lines()}"
    )


def _pass_on(level: int, text: str) -> None:
    """Logs what a worker said; of warnings, which all of them may have, one."""
    if level >= logging.WARNING:
        say_once(text)
    else:
        logger.log(level, "%s", text)
