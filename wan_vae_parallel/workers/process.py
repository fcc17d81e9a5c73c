"""The parent's side of one worker process: how it starts, what it says, what it printed last."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import multiprocessing.connection
import multiprocessing.spawn
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import send_handle
from typing import Any

import torch

from . import bootstrap
from .heartbeat import stopped

logger = logging.getLogger(__name__)

_LOG_LINES = 20
# A process that was killed may have its device's memory to give back.
_KILLED_SECONDS = 30.0


class WorkerProcess:
    """A worker that starts now.

    Args:
        rank: in the world of all workers.
        device: where it will compute.
        options: what `worker.main` gets, beside these two; plain values.
        environment: variables that are its own; None unsets one.

    Attributes:
        connection: the pipe to it.
        pid: its number.
        heard: when it said something last, by the monotonic clock.

    Raises:
        OSError: no process can be started.
    """

    def __init__(
        self, rank: int, device: torch.device, options: Mapping[str, Any], environment: Mapping[str, str | None]
    ) -> None:
        self.rank = rank
        self.device = device
        self.lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self.heard = time.monotonic()
        # Whether it has said that it is there, and can be asked to end.
        self.prepared = False
        self._code: int | None = None
        # Whether somebody else has taken its exit code.
        self._lost = False
        self.connection, theirs = multiprocessing.connection.Pipe()
        # Readable from its end on, whoever may hear of that first: where the system has nothing better, a pipe that it
        # closes then, as do all that were forked from this process meanwhile.
        self._sentinel, their_sentinel = os.pipe()
        log, their_log = os.pipe()
        try:
            self._process = subprocess.Popen(
                _command(rank, device, options, theirs.fileno(), their_sentinel),
                stdin=subprocess.DEVNULL,
                stdout=their_log,
                stderr=their_log,
                pass_fds=(theirs.fileno(), their_sentinel),
                env=_environment(environment),
                # Neither the folder that the program is in, which may be gone and may hold a numpy.py, nor its
                # terminal's Ctrl-C.
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self.connection.close()
            os.close(self._sentinel)
            os.close(log)
            raise
        finally:
            theirs.close()
            os.close(their_sentinel)
            os.close(their_log)
        self.pid = self._process.pid
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                process = os.pidfd_open(self.pid)
                os.close(self._sentinel)
                self._sentinel = process
        self._reader = threading.Thread(target=self._read_log, args=(log,), daemon=True)
        try:
            self._reader.start()
        except BaseException as error:
            os.close(log)
            end_all([self], grace=0.0)
            if isinstance(error, RuntimeError):  # as Python says that the system has no more threads
                raise OSError(errno.EAGAIN, str(error)) from error
            raise

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.device}"

    @property
    def alive(self) -> bool:
        """Whether it has not ended, whoever may have heard of that first."""
        return self._sentinel >= 0 and not multiprocessing.connection.wait([self._sentinel], 0)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it lives, or if somebody else has taken it."""
        if self._code is None and not self._lost:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._lost = True
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP), so that it lives and does nothing."""
        return stopped(self.pid)

    def hand_over(self, descriptor: int) -> None:
        """Gives the worker a file descriptor; it takes it after the message that was sent before."""
        send_handle(self.connection, descriptor, self.pid)

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)

    def join(self, seconds: float | None = None) -> bool:
        """Waits for its end; whether that has come."""
        if self._sentinel >= 0 and not multiprocessing.connection.wait([self._sentinel], seconds):
            return False
        # Its files are closed; it may still give its device's memory back.
        deadline = None if seconds is None else time.monotonic() + max(0.0, seconds)
        while self.exit_code is None and not self._lost:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def last_lines(self) -> str:
        """What it printed last, for a message."""
        self._reader.join(0.5)  # a dead worker's pipe ends; a living one's goes on
        return "; its last lines:\n" + "\n".join(self.lines) if self.lines else ""

    def close(self) -> None:
        """Lets go of it, once it has ended."""
        self.connection.close()
        sentinel, self._sentinel = self._sentinel, -1
        if sentinel >= 0:
            os.close(sentinel)
        # Else it would tell of a process that goes on when it is dropped.
        self._process.returncode = self._code or 0

    def _read_log(self, log: int) -> None:
        with open(log, errors="replace") as stream:
            for line in stream:
                self.lines.append(line.rstrip())
                logger.debug("%s: %s", self, self.lines[-1])


def end_all(workers: Sequence[WorkerProcess], grace: float) -> None:
    """Ends processes, however they are: asked, then after ``grace`` seconds killed."""
    try:
        for worker in workers:
            if worker.prepared and grace:
                with contextlib.suppress(OSError):
                    worker.connection.send(("close",))
            else:
                worker.kill()  # it would not hear
        deadline = time.monotonic() + grace
        for worker in workers:
            if not worker.join(max(0.0, deadline - time.monotonic())):
                worker.kill()
        for worker in workers:
            if not worker.join(_KILLED_SECONDS):
                logger.warning("%s (process %d) is killed and does not end", worker, worker.pid)
            worker.close()
    except BaseException:
        for worker in workers:
            worker.kill()  # whoever interrupts this has no time
        raise


def _command(rank: int, device: torch.device, options: Mapping[str, Any], connection: int, sentinel: int) -> list[str]:
    """The command line of a worker."""
    python = multiprocessing.spawn.get_executable()
    words = {
        **options,
        "rank": rank,
        "device": str(device),
        "parent": os.getpid(),
        "connection": connection,
        "sentinel": sentinel,
        # Its own folder is none that the program meant; relative ones were of the program's.
        "path": [entry for entry in sys.path if os.path.isabs(entry)],
    }
    # As the program's own Python was told to behave: whose packages it takes, for one.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [os.fsdecode(python), *flags, bootstrap.__file__, json.dumps(words)]


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    merged: dict[str, str | None] = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
