"""The parent's side of one worker process: how it starts, what it says, what it printed last."""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import torch

from ..errors import WorkerError
from . import bootstrap
from .pulse import stopped

logger = logging.getLogger(__name__)

_LOG_LINES = 20

_start_lock = threading.Lock()


class WorkerProcess:
    """A worker that starts now.

    Args:
        rank: in the world of all workers.
        device: where it computes.
        options: what `worker.main` gets, beside these two.
        environment: variables that are its own; None unsets one.

    Attributes:
        connection: the pipe to it.
        heard: when it said something last, by the monotonic clock.

    Raises:
        WorkerError: no process can be started.
    """

    def __init__(self, rank: int, device: torch.device, options: dict[str, Any], environment: dict[str, Any]) -> None:
        self.rank = rank
        self.device = device
        self.lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self.heard = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        log, their_log = context.Pipe(duplex=False)
        self.process = context.Process(
            target=runpy.run_path,
            args=(bootstrap.__file__,),
            kwargs={
                "init_globals": {
                    "connection": theirs,
                    "log": their_log,
                    "environment": environment,
                    "options": {**options, "rank": rank, "device": str(device), "parent": os.getpid()},
                },
                "run_name": "__wan_vae_worker__",
            },
            name=f"wan-vae-worker-{rank}",
            daemon=True,
        )
        try:
            with _hidden_main(), _interrupts_held_back():
                self.process.start()
        except AssertionError as error:  # multiprocessing's, in a daemonic process
            raise WorkerError(
                f"workers can't start here ({error}); name one device, or decode in a process that is not daemonic"
            ) from None
        finally:
            theirs.close()
            their_log.close()
        # The pool ends it, stopped or not, and not the program's exit, nor that of a process forked from it, where
        # multiprocessing would ask the processes that it knows to end, and wait.
        getattr(multiprocessing.process, "_children", set()).discard(self.process)
        self._reader = threading.Thread(target=self._read_log, args=(log,), daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.device}"

    @property
    def alive(self) -> bool:
        """Whether it has not ended, whoever may have heard of that first."""
        return not multiprocessing.connection.wait([self.process.sentinel], 0)

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP), so that it lives and does nothing."""
        return stopped(self.process.pid)

    def hand_over(self, descriptor: int) -> None:
        """Gives the worker a file descriptor; it takes it after the message that was sent before."""
        assert self.process.pid
        send_handle(self.connection, descriptor, self.process.pid)

    def last_lines(self) -> str:
        """What it printed last, for a message."""
        self._reader.join(0.5)  # a dead worker's pipe ends; a living one's goes on
        return "; its last lines:\n" + "\n".join(self.lines) if self.lines else ""

    def _read_log(self, log: Connection) -> None:
        with log, open(log.fileno(), errors="replace", closefd=False) as stream:
            for line in stream:
                self.lines.append(line.rstrip())
                logger.debug("%s: %s", self, self.lines[-1])


def end_all(workers: Sequence[WorkerProcess], grace: float) -> None:
    """Ends processes, however they are: asked, then after ``grace`` seconds killed."""
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.connection.send(("close",))
    deadline = time.monotonic() + grace
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.alive:
            worker.process.kill()
        worker.process.join()  # one that has closed its files may still give its device's memory back
        worker.connection.close()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Lets a process be spawned that never sees Ctrl-C, which a terminal sends to all: it is the parent's to act on."""
    # The first process brings this one along, whose start lets interrupts through again.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Lets a process be spawned without its running the parent's main program again, which may be ComfyUI's."""
    with _start_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = _Nameless(main)
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _Nameless(types.ModuleType):
    """All of a module, for other threads that look for it meanwhile, but for where it came from."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":
            raise AttributeError(name)
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_module"], name, value)
