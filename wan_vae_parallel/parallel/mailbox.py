"""Memory on each device that the neighbours' kernels write to, so that halo rows need no messages.

T frames, H rows of a shard, W columns, C channels
"""

from __future__ import annotations

import collections
import logging
import os

import torch
import torch.distributed as dist

from ..ops.dispatch import kernels_run
from .agree import Board, plain

logger = logging.getLogger(__name__)

# Of one box: all rows of a direction that travel at once, or as many of them as fit. Four boxes a device.
_BOX_BYTES = 8 * 2**20
# Of the signals of both directions, which kernels/swap_rows.py needs fewer of.
_SIGNAL_BYTES = 4096


class Mailbox:
    """One rank's boxes and those of all others; made by `open_mailbox`.

    Args:
        buffers: by rank, bytes that this rank's device can reach.
        rank: whose own.
        memory: what the buffers are views of, and does not go while this has it.
    """

    def __init__(self, buffers: list[torch.Tensor], rank: int, memory: object) -> None:
        self._buffers = buffers
        self._memory = memory
        self._rank = rank
        self._views: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        # By the other rank: both of a pair count the same swaps, though others may have had more or fewer.
        self._counts: collections.Counter[int | None] = collections.Counter()

    def capacity(self, arena: torch.Tensor) -> int:
        """How many frames of ``arena`` ``[S, H + 2, W + 2, C]`` can swap rows at once."""
        return _BOX_BYTES // (arena.shape[2] * arena.shape[3] * arena.element_size())

    def swap(
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
        from ..ops.kernels.swap_rows import swap_rows

        if not trial:
            self._counts.update((above, below))
        boxes, signals = self._of(self._rank, arena.dtype)
        swap_rows(
            arena,
            slots,
            boxes,
            signals,
            above=None if above is None else self._of(above, arena.dtype),
            below=None if below is None else self._of(below, arena.dtype),
            numbers=(self._counts[above], self._counts[below]),
        )

    def _of(self, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's boxes, ``[2, 2, N]``, and signals, int32."""
        views = self._views.get((rank, dtype))
        if views is None:
            buffer = self._buffers[rank]
            boxes = buffer[: 4 * _BOX_BYTES].view(dtype).view(2, 2, -1)
            views = boxes, buffer[4 * _BOX_BYTES :].view(torch.int32)
            self._views[rank, dtype] = views
        return views


def open_mailbox(group: dist.ProcessGroup, device: torch.device, board: Board) -> Mailbox | None:
    """Gives every rank of ``group`` memory that the others' devices can write to; None where that can't be.

    All ranks call, and all get one or none does; what stands against it is said by the first rank.

    Args:
        group: the ranks, on one machine, each with a device of its own.
        device: this rank's.
        board: the ranks' words.
    """
    if device.type != "cuda":
        return None
    buffers: list[torch.Tensor] = []
    memory: object = None
    indices = board.exchange(device.index)
    reasons = board.exchange(_why_not(device, indices))
    if not any(reasons):
        try:
            buffers, memory = _rendezvous(group, device)
            buffers[board.rank].zero_()
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            reasons = [plain(error)]
        reasons = board.exchange(reasons[0])
    if not any(reasons):
        # Each writes to all others, who look whether it has arrived.
        for buffer in buffers:
            buffer[board.rank] = 1
        torch.cuda.synchronize(device)
        board.exchange(None)
        arrived = bool(buffers[board.rank][: len(buffers)].all())
        reasons = board.exchange("" if arrived else f"what other devices write to {device} does not arrive")
    if not any(reasons):
        return Mailbox(buffers, board.rank, memory)
    if board.rank == 0:
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


def _rendezvous(group: dist.ProcessGroup, device: torch.device) -> tuple[list[torch.Tensor], object]:
    """Every rank's bytes, by rank, for boxes and signals; and what holds them. All ranks wait for one another."""
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(4 * _BOX_BYTES + _SIGNAL_BYTES, dtype=torch.uint8, device=device)
    handle = _symmetric_memory.rendezvous(own, group)
    return [handle.get_buffer(rank, own.shape, own.dtype) for rank in range(dist.get_world_size(group))], (own, handle)
