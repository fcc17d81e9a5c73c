"""Which rows of the finished frames a rank writes, and how it gets them.

B videos, t frames of a step, H x W pixels, C colours
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .plan import ShardPlan


def frame_rows(plan: ShardPlan, shard: int, ratio: int) -> tuple[int, int]:
    """First and last (exclusive) frame row that ``shard`` writes; ``ratio`` frame rows make a latent row.

    A transposed plan's shards hold columns; so that each writes whole rows, they share out the rows evenly.
    """
    if not plan.transposed:
        return plan.bounds[shard] * ratio, plan.bounds[shard + 1] * ratio
    height = plan.columns * ratio
    return height * shard // plan.shards, height * (shard + 1) // plan.shards


def to_own_rows(frames: torch.Tensor, plan: ShardPlan, group: dist.ProcessGroup, ratio: int) -> torch.Tensor:
    """Turns what a shard decoded into the rows that it writes.

    Args:
        frames: ``[B, t, rows, W, C]`` of this shard, or of a transposed plan ``[B, t, H, columns, C]``.
        plan: the split.
        group: its ranks; all must call.
        ratio: frame rows (and columns) per latent row.

    Returns:
        ``[B, t, rows, W, C]``, contiguous: the rows that `frame_rows` tells.
    """
    if not plan.transposed:
        return frames.contiguous()
    me = dist.get_rank(group)
    ranges = [frame_rows(plan, shard, ratio) for shard in range(plan.shards)]
    start, stop = ranges[me]
    pieces, operations = [], []
    for shard in range(plan.shards):
        columns = plan.height(shard) * ratio
        if shard == me:
            pieces.append(frames[:, :, start:stop])
            continue
        incoming = frames.new_empty((*frames.shape[:2], stop - start, columns, frames.shape[-1]))
        outgoing = frames[:, :, slice(*ranges[shard])].contiguous()
        peer = dist.get_global_rank(group, shard)
        # More shards than rows leave some without any: they neither get nor want a message of nothing.
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, peer, group))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, peer, group))
        pieces.append(incoming)
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return torch.cat(pieces, dim=3)
