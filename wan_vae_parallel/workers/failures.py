"""Why workers ended: the first to fall takes the others along, and those complain too."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import WanVAEError, WorkerError
from .process import WorkerProcess

logger = logging.getLogger(__name__)

# By which workers find one another. All are on this machine: nothing listens beyond it.
INTERFACE = "lo"

# What the others of a worker that died still say within this time tells whose fault it was.
_CAUSE_SECONDS = 1.0


class StepOutOfMemory(WanVAEError):
    """A worker ran out of memory in the middle of a step, where the others wait for it."""


def cause(workers: Sequence[WorkerProcess], heard: Mapping[int, tuple[Any, ...]] | None = None) -> WanVAEError:
    """What to tell once one of ``workers`` has ended, or has said that it does.

    Args:
        workers: all, by rank.
        heard: what came with the ``"failed"`` messages that were received already, by rank.
    """
    failed = dict(heard or {})
    deadline = time.monotonic() + _CAUSE_SECONDS
    while time.monotonic() < deadline and any(worker.alive for worker in workers):
        time.sleep(0.05)
    for worker in workers:
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                message = worker.connection.recv()
                if message[0] == "failed":
                    failed[worker.rank] = message[1:]
    for worker in workers:
        if not worker.alive:  # its files are closed, and its exit code comes soon
            worker.join(max(0.0, deadline - time.monotonic()))
    codes = {worker.rank: worker.exit_code for worker in workers}
    for rank, (kind, text) in failed.items():
        if kind == "memory":
            return _failure(workers[rank], kind, text)
    for worker in workers:
        if (codes[worker.rank] or 0) < 0:  # killed from outside
            return _death(worker)
    for worker in workers:
        # Without a code and without a word, where something else in the program takes processes' ends.
        if not worker.alive and codes[worker.rank] is None and worker.rank not in failed:
            return _death(worker)
    for rank, (kind, text) in failed.items():
        return _failure(workers[rank], kind, text)
    return _death(next((worker for worker in workers if not worker.alive), workers[0]))


def lost_unused(error: BaseException) -> bool:
    """Whether a call's workers were killed, before it began: maybe while nobody used them. It is said."""
    lost = isinstance(error, WorkerError) and error.killed
    if lost:
        logger.warning("%s since it was used last; starting new ones", str(error).partition(";")[0])
    return lost


def hint(device: torch.device, guess: str = "") -> str:
    """What to try where GPUs can't join or reach one another; nothing for CPUs."""
    if device.type != "cuda":
        return ""
    return (
        f"{guess}; if the GPUs can't reach one another, try NCCL_P2P_DISABLE=1, or give the container more shared "
        f"memory (--shm-size, --ipc=host)"
    )


def _death(worker: WorkerProcess) -> WorkerError:
    code = worker.exit_code
    more = ""
    if code == -signal.SIGABRT:  # as NCCL's watchdog ends a process
        more = hint(worker.device, " (NCCL waited for a peer in vain?)")
    if code == -signal.SIGKILL:
        more = "; if nobody killed it, the system did for want of host memory"
    error = WorkerError(
        f"{worker} died with exit code {'unknown' if code is None else code}; the others were ended, the next call "
        f"starts new ones{more}{worker.last_lines()}"
    )
    error.killed = code is None or code < 0
    return error


def _failure(worker: WorkerProcess, kind: str, text: str) -> WanVAEError:
    if kind == "memory":
        return StepOutOfMemory(f"{worker} ran out of memory: {text}")
    if f"address for: {INTERFACE}" in text:
        return WorkerError(
            f"{worker} can't find the others: they meet through the network interface {INTERFACE}, which is missing or "
            f"down here; bring it up (ip link set {INTERFACE} up), or name one device"
        )
    more = hint(worker.device) if "NCCL" in text else ""
    return WorkerError(f"{worker} failed: {text}{more}{worker.last_lines()}")
