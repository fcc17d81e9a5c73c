"""Memory on each device that the neighbours' kernels write to, so that halo rows need no messages.

T frames, H rows of a shard, W columns, C channels
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..errors import WorkerError, summary
from ..ops.dispatch import KernelError, kernels_run
from .coordination import Coordinator

logger = logging.getLogger(__name__)

# Of one box: all rows of a direction that travel at once, or as many of them as fit. Four boxes a device.
_BOX_BYTES = 8 * 2**20
# Of one box of a pair of ranks for all other bytes: larger ones take several turns. Two boxes for each other rank.
_PAIR_BYTES = 8 * 2**20
# Of the signals of both directions, which kernels/exchange_halo.py needs fewer of.
_SIGNAL_BYTES = 4096


class PeerMemory:
    """One rank's boxes and those of all others; made by `open_peer_memory`.

    Args:
        buffers: by rank, bytes that this rank's device can reach.
        rank: whose own.
        memory: what the buffers are views of, and does not go while this has it.
        handle: torch's, whose signals tell of bytes that have come.
    """

    def __init__(self, buffers: list[torch.Tensor], rank: int, memory: object, handle: Any) -> None:
        self._buffers = buffers
        self._memory = memory
        self._handle = handle
        self._rank = rank
        self._views: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        # By the other rank: both of a pair count the same swaps, though others may have had more or fewer.
        self._counts: collections.Counter[int | None] = collections.Counter()
        # Likewise the turns of `exchange`.
        self._turns: collections.Counter[int] = collections.Counter()

    @property
    def size(self) -> int:
        """Bytes that it takes on this device."""
        return self._buffers[self._rank].numel()

    def exchange(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        """Sends bytes to other ranks and receives theirs; the device waits for them, the host does not.

        Both of a pair make the same calls in the same order. Who sends turn n + 2 into a box has had the other's
        n + 1, so the other has emptied the box of n.

        Args:
            outgoing: contiguous, by rank.
            incoming: contiguous, by rank: the same ranks, and what each of them sends.
        """
        parts = {
            peer: (_bytes(outgoing[peer]).split(_PAIR_BYTES), _bytes(incoming[peer]).split(_PAIR_BYTES))
            for peer in outgoing
        }
        turns = {peer: max(len(out), len(into)) for peer, (out, into) in parts.items()}
        for turn in range(max(turns.values(), default=0)):
            peers = [peer for peer, count in turns.items() if turn < count]
            for peer in peers:
                self._turns[peer] += 1
                for part in parts[peer][0][turn : turn + 1]:
                    box = self._pair_box(at=peer, of=self._rank, turn=self._turns[peer])
                    box[: part.numel()].copy_(part)
                self._handle.put_signal(peer)
            for peer in peers:
                self._handle.wait_signal(peer)
                into = parts[peer][1]
                if turn < len(into):
                    into[turn].copy_(
                        self._pair_box(at=self._rank, of=peer, turn=self._turns[peer])[: into[turn].numel()]
                    )

    def _pair_box(self, *, at: int, of: int, turn: int) -> torch.Tensor:
        """The box on the device of rank ``at`` for what rank ``of`` sends in ``turn``."""
        number = 2 * (of - (of > at)) + turn % 2  # a rank sends itself nothing
        start = 4 * _BOX_BYTES + _SIGNAL_BYTES + number * _PAIR_BYTES
        return self._buffers[at][start : start + _PAIR_BYTES]

    def capacity(self, arena: torch.Tensor) -> int:
        """How many frames of ``arena`` ``[S, H + 2, W + 2, C]`` can exchange rows at once."""
        return _BOX_BYTES // (arena.shape[2] * arena.shape[3] * arena.element_size())

    def exchange_halo(
        self, arena: torch.Tensor, slots: torch.Tensor, *, above: int | None, below: int | None, trial: bool = False
    ) -> None:
        """Sends the first and last row inside frames to the neighbours, and puts theirs around them.

        Neighbours make the same calls in the same order.

        Args:
            arena: ``[S, H + 2, W + 2, C]``, contiguous.
            slots: ``[T]`` int32, at most `capacity` of them, the same on all ranks.
            above: the rank above; None at the picture's edge, whose halo is left alone.
            below: likewise.
            trial: for `ops.kernels.launch.compile_all`, which launches nothing.
        """
        from ..ops.kernels.halo_exchange import exchange_halo

        if not trial:
            self._counts.update((above, below))
        boxes, signals = self._of(self._rank, arena.dtype)
        try:
            exchange_halo(
                arena,
                slots,
                boxes,
                signals,
                above=None if above is None else self._of(above, arena.dtype),
                below=None if below is None else self._of(below, arena.dtype),
                numbers=(_as_int32(self._counts[above]), _as_int32(self._counts[below])),
            )
        except KernelError as error:  # neighbours wait in theirs, so there is no way back to messages
            raise WorkerError(
                f"the kernel that exchanges border rows does not run on {arena.device} ({error}); with "
                f"NCCL_P2P_DISABLE=1 rows go through NCCL instead"
            ) from error

    def why_not(self, device: torch.device) -> str:
        """What keeps the kernel that exchanges rows from being compiled here, if anything; none is launched."""
        from ..ops.kernels.halo_exchange import exchange_halo
        from ..ops.kernels.launch import collect, compile_all

        arena = torch.empty((1, 3, 3, 16), dtype=torch.bfloat16, device=device)
        slots = torch.zeros(1, dtype=torch.int32, device=device)
        own = self._of(self._rank, arena.dtype)

        def run() -> None:
            exchange_halo(arena, slots, *own, above=own, below=own, numbers=(1, 1))

        try:
            compile_all(run, device)
            collect(run)  # fails where that did
        except KernelError as error:
            return f"the kernel that exchanges rows does not run on {device} ({error})"
        return ""

    def _of(self, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's boxes, ``[2, 2, N]``, and signals, int32."""
        views = self._views.get((rank, dtype))
        if views is None:
            buffer = self._buffers[rank]
            boxes = buffer[: 4 * _BOX_BYTES].view(dtype).view(2, 2, -1)
            views = boxes, buffer[4 * _BOX_BYTES : 4 * _BOX_BYTES + _SIGNAL_BYTES].view(torch.int32)
            self._views[rank, dtype] = views
        return views


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def open_peer_memory(group: dist.ProcessGroup, device: torch.device, coordinator: Coordinator) -> PeerMemory | None:
    """Gives every rank of ``group`` memory that the others' devices can write to; None where that can't be.

    All ranks call, and all get one or none does; what stands against it is said by the first rank.

    Args:
        group: the ranks, on one machine, each with a device of its own.
        device: this rank's.
        coordinator: the ranks' words.
    """
    if device.type != "cuda":
        return None
    buffers: list[torch.Tensor] = []
    handle: Any = None
    indices = coordinator.exchange(device.index)
    reason = _why_not(device, indices)
    if not reason:
        try:
            own = _own_memory(device, coordinator.world_size)
        except Exception as error:  # noqa: BLE001 (whatever it is, messages work without)
            reason = f"{device} has no memory for it ({summary(error)})"
    reasons = coordinator.exchange(reason)
    if not any(reasons):
        try:
            with _socket_folder(coordinator):
                buffers, handle = _rendezvous(own, group)
        except RuntimeError as error:  # others may wait in it for this rank, so there is no way back to messages
            raise WorkerError(
                f"{device} could not reach the other devices' memory ({summary(error)}); with NCCL_P2P_DISABLE=1 "
                f"rows go through NCCL instead"
            ) from error
    if not any(reasons):
        # Each writes to all others, who look whether it has arrived.
        for buffer in buffers:
            buffer[coordinator.rank] = 1
        torch.cuda.synchronize(device)
        coordinator.exchange(None)
        arrived = bool(buffers[coordinator.rank][: len(buffers)].all())
        reasons = coordinator.exchange("" if arrived else f"what other devices write to {device} does not arrive")
    if not any(reasons):
        memory = PeerMemory(buffers, coordinator.rank, own, handle)
        reasons = coordinator.exchange(memory.why_not(device))
        if not any(reasons):
            return memory
    if coordinator.rank == 0:
        logger.info("halo rows travel through NCCL: %s", next(filter(None, reasons)))
    return None


def _why_not(device: torch.device, indices: list[int]) -> str:
    """Why the devices can't reach one another's memory, as far as this one knows; nothing if they can."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE says that devices can't reach one another"
    if not kernels_run(torch.empty(0, device=device)):
        return f"no kernels of our own run on {device}"
    for index in indices:
        if index != device.index and not torch.cuda.can_device_access_peer(device, index):
            return f"{device} can't reach cuda:{index}"
    return ""


def _own_memory(device: torch.device, world_size: int) -> torch.Tensor:
    """Bytes for boxes and signals, all zero."""
    size = 4 * _BOX_BYTES + _SIGNAL_BYTES + 2 * (world_size - 1) * _PAIR_BYTES
    # Not that module's own `empty`, whose check of the size imports all of sympy: two to three seconds.
    from torch._C._distributed_c10d import _SymmetricMemory

    own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device).zero_()
    torch.cuda.synchronize(device)
    return own


@contextlib.contextmanager
def _socket_folder(coordinator: Coordinator) -> Iterator[None]:
    """Within it torch's sockets, through which ranks hand their memory over, lie where nobody else can come.

    It names them in TMPDIR after the process, and has room for about 100 characters.
    """
    first = coordinator.rank == 0
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = coordinator.from_first(tempfile.mkdtemp(prefix="wvp-", dir=short) if first else None)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
        coordinator.exchange(None)  # all are done with it
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def _rendezvous(own: torch.Tensor, group: dist.ProcessGroup) -> tuple[list[torch.Tensor], Any]:
    """Every rank's bytes, by rank; and torch's handle to them. All ranks wait for one another."""
    from torch.distributed import _symmetric_memory

    handle = _symmetric_memory.rendezvous(own, group)
    return [handle.get_buffer(rank, own.shape, own.dtype) for rank in range(dist.get_world_size(group))], handle
