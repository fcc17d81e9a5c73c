"""Which rows of the finished frames a rank writes, and how it gets them.

B videos, t frames of a step, H x W pixels, C colours
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .edges import exchange
from .peer_memory import PeerMemory
from .plan import ShardPlan


def frame_rows(plan: ShardPlan, shard: int, ratio: int) -> tuple[int, int]:
    """First and last (exclusive) frame row that ``shard`` writes; ``ratio`` frame rows make a latent row.

    A transposed plan's shards hold columns; so that each writes whole rows, they share out the rows evenly, in pairs
    where that can be: two rows may have their chroma in common.
    """
    if not plan.transposed:
        return plan.bounds[shard] * ratio, plan.bounds[shard + 1] * ratio
    height = plan.columns * ratio
    together = 1 if height % 2 else 2
    units = height // together
    return units * shard // plan.shards * together, units * (shard + 1) // plan.shards * together


def to_own_rows(
    frames: torch.Tensor, plan: ShardPlan, group: dist.ProcessGroup, ratio: int, peer_memory: PeerMemory | None = None
) -> torch.Tensor:
    """Turns what a shard decoded into the rows that it writes.

    Args:
        frames: ``[B, t, rows, W, C]`` of this shard, or of a transposed plan ``[B, t, H, columns, C]``.
        plan: the split.
        group: its ranks; all with a shard must call.
        ratio: frame rows (and columns) per latent row.
        peer_memory: the group's, if it has one.

    Returns:
        ``[B, t, rows, W, C]``, contiguous: the rows that `frame_rows` tells.
    """
    if not plan.transposed:
        return frames.contiguous()
    me = dist.get_rank(group)
    ranges = [frame_rows(plan, shard, ratio) for shard in range(plan.shards)]
    start, stop = ranges[me]
    pieces, outgoing = {}, {}
    for shard in range(plan.shards):
        if shard == me:
            pieces[shard] = frames[:, :, start:stop]
            continue
        columns = plan.height(shard) * ratio
        pieces[shard] = frames.new_empty((*frames.shape[:2], stop - start, columns, frames.shape[-1]))
        outgoing[shard] = frames[:, :, slice(*ranges[shard])].contiguous()
    exchange(outgoing, {shard: pieces[shard] for shard in outgoing}, group, peer_memory)
    return torch.cat(list(pieces.values()), dim=3)


def to_first_rank(frames: torch.Tensor, plan: ShardPlan, group: dist.ProcessGroup, ratio: int) -> torch.Tensor | None:
    """Puts the shards' frames together on the group's first rank.

    Args:
        frames: ``[B, t, rows, W, C]`` of this shard, or of a transposed plan ``[B, t, H, columns, C]``.
        plan: the split.
        group: its ranks; all with a shard must call.
        ratio: frame rows (and columns) per latent row.

    Returns:
        ``[B, t, H, W, C]``, contiguous, on the first rank; None on the others.
    """
    # Contiguous: a message is bytes, and knows no strides.
    if dist.get_rank(group):
        # Batched as its counterpart is: alone it would take another communicator than that.
        operation = dist.P2POp(dist.isend, frames.contiguous(), dist.get_global_rank(group, 0), group)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
        return None
    axis = 3 if plan.transposed else 2
    pieces, operations = [frames], []
    for shard in range(1, plan.shards):
        shape = list(frames.shape)
        shape[axis] = plan.height(shard) * ratio
        pieces.append(frames.new_empty(shape))
        operations.append(dist.P2POp(dist.irecv, pieces[-1], dist.get_global_rank(group, shard), group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return torch.cat(pieces, dim=axis)
