"""The launcher of multi-rank tests: plain functions ``(rank, world_size, *args)``, run in processes of a group.

Processes start once and run many functions, since importing torch takes longer than a test, and where there is no GPU
they fork from one that has imported it. Functions and arguments must pickle by name or value; what a rank returns or
raises comes back. Nothing here hangs: what takes longer than its time-out is killed, and the next call starts anew.
"""

from __future__ import annotations

import inspect
import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

_START_SECONDS = 120.0
_END_SECONDS = 5.0

_group: dist.ProcessGroup | None = None


class RankError(AssertionError):
    """What ranks raised, or did not answer; the text holds their tracebacks."""


def group() -> dist.ProcessGroup:
    """Within a launched function: the group it runs in."""
    assert _group is not None
    return _group


def device() -> torch.device:
    """Within a launched function: this process's device."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


def shared(own: torch.Tensor) -> list[torch.Tensor]:
    """Within a launched function: every rank's ``own``, which all ranks can write to, by rank.

    Each is named as if it lay on this rank's device, whose kernels reach it: memory that is opened for the device it
    lies on can't be had by another's.
    """
    me, everyone = dist.get_rank(_group), range(dist.get_world_size(_group))
    # One for each of the others: some can be opened only once, and none by the process that it came from.
    mine = [b"" if other == me else _handle(own) for other in everyone]
    handles = [mine for _ in everyone]
    dist.all_gather_object(handles, mine, _group)
    return [own if other == me else _open(handles[other][me], own.device) for other in everyone]


def _handle(tensor: torch.Tensor) -> bytes:
    """What another process opens a tensor with, whose work is done."""
    if not tensor.is_cuda:
        return bytes(ForkingPickler.dumps(tensor))
    torch.cuda.synchronize(tensor.device)
    return bytes(ForkingPickler.dumps(reduce_tensor(tensor)))


def _open(handle: bytes, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return pickle.loads(handle)
    rebuild, arguments = pickle.loads(handle)
    bound = inspect.signature(rebuild).bind(*arguments)
    bound.arguments.update(storage_device=device.index, event_sync_required=False)
    return rebuild(*bound.args)


class Ranks:
    """``world_size`` processes in one world.

    Args:
        world_size: how many.
        folder: where the rendezvous file goes.
        backend: ``"gloo"``, or ``"nccl"`` with a GPU each.
    """

    def __init__(self, world_size: int, folder: Path, backend: str = "gloo") -> None:
        self.world_size = world_size
        self.folder = folder
        self.backend = backend
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        # Memory that others have opened is given back only by a process that ends by itself.
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        self.stop()

    def run(
        self, function: Callable[..., Any], *args: Any, members: Sequence[int] | int | None = None, timeout: float = 60
    ) -> list[Any]:
        """Calls ``function(rank, world_size, *args)`` in a group, and returns what its ranks return.

        Args:
            function: of a module's top level.
            args: for all ranks alike.
            members: global ranks of the group, in order, which need not begin at 0; or how many from 0; by default
                all. ``rank`` and ``world_size`` are those of the group.
            timeout: seconds until all are killed.

        Raises:
            RankError: a rank raised, died or took too long.
        """
        members = range(members) if isinstance(members, int) else members
        members = tuple(members if members is not None else range(self.world_size))
        self._start()
        job = pickle.dumps((function, args, members))
        try:
            for connection in self._connections:
                connection.send_bytes(job)
            answers = self._gather(timeout)
        except BaseException:
            self.stop()
            raise
        errors = [f"rank {rank}:\n{value}" for rank, (good, value) in answers.items() if not good]
        if errors:
            self.stop()  # the others may wait for the one that failed
            raise RankError("\n".join(errors))
        return [answers[rank][1] for rank in members]

    def stop(self) -> None:
        """Kills the processes."""
        for process in self._processes:
            process.kill()
            process.join()
            # The CUDA driver and torch leave them of processes whose memory others have opened.
            for names in (f"cuda.shm.*.{process.pid:x}.*", f"torch_{process.pid}_*"):
                for left in Path("/dev/shm").glob(names):
                    left.unlink()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        if self._processes:
            return
        store = tempfile.mktemp(dir=self.folder, prefix="store-")
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(["torch"])
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, store, self.backend), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._gather(_START_SECONDS)

    def _gather(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """One answer a rank; soon after the first failure, those that are there."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world_size:
            missing = [rank for rank in range(self.world_size) if rank not in answers]
            ready = multiprocessing.connection.wait(
                [self._connections[rank] for rank in missing], max(0, deadline - time.monotonic())
            )
            if not ready:
                if not all(good for good, _ in answers.values()):
                    break
                raise RankError(f"ranks {missing} did not answer within {timeout:.0f} s")
            for rank in missing:
                if self._connections[rank] not in ready:
                    continue
                try:
                    answers[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except EOFError:
                    self._processes[rank].join(1)
                    answers[rank] = False, f"died with exit code {self._processes[rank].exitcode}"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2)
        return answers


def _serve(connection: Connection, rank: int, world_size: int, store: str, backend: str) -> None:
    global _group
    torch.set_num_threads(1)
    device_id = torch.device("cuda", rank) if backend == "nccl" else None
    if device_id:
        torch.cuda.set_device(device_id)
    dist.init_process_group(
        backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, device_id=device_id
    )
    groups: dict[tuple[int, ...], Any] = {}
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, members = pickle.loads(job)
            if members not in groups:
                groups[members] = dist.new_group(list(members))
            answer = None
            if rank in members:
                _group = groups[members]
                answer = function(members.index(rank), len(members), *args)
            message = pickle.dumps((True, answer))
        except BaseException:  # noqa: BLE001 (whatever it is, it is the test's result)
            message = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(message)
