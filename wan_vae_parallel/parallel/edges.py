"""A shard's edges: halo rows from the neighbours, keys and values from all.

T frames, H rows of this shard, W columns, C channels
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..model.state import Frames
from .peer_memory import PeerMemory
from .plan import ShardPlan


def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Exchanges a byte between all ranks, so that NCCL has its connections and their memory from now on.

    Later the device may be full, and a connection would fail in the middle of a decode. All ranks call.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    received = torch.zeros(size, dtype=torch.uint8, device=device)
    sent = torch.zeros(1, dtype=torch.uint8, device=device)
    operations = []
    for peer in (dist.get_global_rank(group, other) for other in range(size) if other != rank):
        operations.append(dist.P2POp(dist.isend, sent, peer, group))
        operations.append(dist.P2POp(dist.irecv, received[len(operations) // 2][None], peer, group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # only now have the bytes moved


def exchange(
    outgoing: Mapping[int, torch.Tensor],
    incoming: Mapping[int, torch.Tensor],
    group: dist.ProcessGroup,
    peer_memory: PeerMemory | None,
) -> None:
    """Sends tensors to other ranks and receives theirs; all of those ranks make the same calls in the same order.

    Args:
        outgoing: contiguous, by rank in ``group``.
        incoming: contiguous, by rank: the same ones.
        group: the ranks.
        peer_memory: through which bytes travel; without one they are messages.
    """
    if peer_memory is not None:
        peer_memory.exchange(outgoing, incoming)
        return
    operations = []
    for peer in outgoing:
        global_peer = dist.get_global_rank(group, peer)
        # Neither gets nor wants a message of nothing.
        if outgoing[peer].numel():
            operations.append(dist.P2POp(dist.isend, outgoing[peer], global_peer, group))
        if incoming[peer].numel():
            operations.append(dist.P2POp(dist.irecv, incoming[peer], global_peer, group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


class ShardEdges:
    """`model.state.Edges` of one shard in a process group.

    Ranks here are ranks in ``group``, which need not begin at global rank 0; shard r is rank r's, and the group may
    have more ranks than there are shards. All ranks with a shard must make the same calls in the same order.

    Args:
        plan: the split.
        group: the ranks.
        peer_memory: through which halo rows travel; without one they are messages.
    """

    def __init__(self, plan: ShardPlan, group: dist.ProcessGroup, peer_memory: PeerMemory | None = None) -> None:
        self.plan = plan
        self.group = group
        self._peer_memory = peer_memory
        self.shard = dist.get_rank(group)
        if self.shard >= plan.shards or plan.shards > dist.get_world_size(group):
            raise ValueError(
                f"rank {self.shard} of {dist.get_world_size(group)} has no part in a plan of {plan.shards} shards"
            )
        # Rank, the own row that it gets, and where its row goes: above, below.
        self._neighbours = [
            (self.shard + step, own, halo)
            for step, own, halo in ((-1, 1, 0), (1, -2, -1))
            if 0 <= self.shard + step < plan.shards
        ]
        # Buffers for rows on their way, one a direction and neighbour, made anew only when they have to differ.
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self.rows_sent = 0

    def fill_halo(self, frames: Frames, *, below_only: bool = False) -> None:
        """Sends this shard's border rows to its neighbours and receives theirs into the frames' first and last row.

        The picture's own edges are left as they are: zeros. Nothing is copied or sent for them.

        Args:
            frames: with a border of 1, their inside written.
            below_only: rows only go up, to the neighbour that has this shard below it. Peer memory takes both ways all
                the same, in the time of one.
        """
        sends = [(peer, own) for peer, own, _ in self._neighbours if not below_only or peer < self.shard]
        receives = [(peer, halo) for peer, _, halo in self._neighbours if not below_only or peer > self.shard]
        self.rows_sent += len(sends) * len(frames)
        if self._through_peer_memory(frames):
            return
        arena, index = frames.arena, frames.index
        shape = torch.Size((len(frames), *arena.shape[2:]))
        operations = []
        for peer, own in sends:
            outgoing = self._buffer("out", peer, shape, arena)
            torch.index_select(arena[:, own], 0, index, out=outgoing)
            operations.append(dist.P2POp(dist.isend, outgoing, dist.get_global_rank(self.group, peer), self.group))
        for peer, _ in receives:
            incoming = self._buffer("in", peer, shape, arena)
            operations.append(dist.P2POp(dist.irecv, incoming, dist.get_global_rank(self.group, peer), self.group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for peer, halo in receives:
            arena[:, halo].index_copy_(0, index.long(), self._buffer("in", peer, shape, arena))

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        """Gathers every shard's ``[T, h, W, C]`` to the picture's ``[T, rows, W, C]``, contiguous.

        By messages and not by a collective, whose parts would all have to be as tall as the tallest and whose group
        might have ranks without a shard.
        """
        plan = self.plan
        scale = shard.shape[1] // plan.height(self.shard)
        frames, _, columns, channels = shard.shape
        own = shard.contiguous()  # a message is bytes, and knows no strides
        parts = {
            peer: own if peer == self.shard else own.new_empty((frames, plan.height(peer) * scale, columns, channels))
            for peer in range(plan.shards)
        }
        incoming = {peer: part for peer, part in parts.items() if peer != self.shard}
        exchange(dict.fromkeys(incoming, own), incoming, self.group, self._peer_memory)
        return torch.cat(list(parts.values()), dim=1)

    def silent(self) -> _SilentEdges:
        """The same without the other ranks, see `model.state.Edges`."""
        return _SilentEdges(self)

    def _through_peer_memory(self, frames: Frames, *, trial: bool = False) -> bool:
        """`fill_halo` through peer memory, if there is some and a frame's row fits; whether nothing is left to do."""
        if not self._neighbours:
            return True
        if self._peer_memory is None or not (at_once := self._peer_memory.capacity(frames.arena)):
            return False
        above = self.shard - 1 if self.shard else None
        below = self.shard + 1 if self.shard + 1 < self.plan.shards else None
        for part in frames.split(at_once):
            self._peer_memory.exchange_halo(part.arena, part.index, above=above, below=below, trial=trial)
        return True

    def _buffer(self, direction: str, peer: int, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """A contiguous buffer; the last one, unless shape, dtype or device differ from it."""
        key = direction, peer
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (shape, like.dtype, like.device):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer


class _SilentEdges:
    """Edges of a shard that exchanges nothing; kernels that it would exchange with are noted for compiling."""

    def __init__(self, edges: ShardEdges) -> None:
        self._edges = edges

    def fill_halo(self, frames: Frames, *, below_only: bool = False) -> None:  # noqa: ARG002 (as the edges')
        self._edges._through_peer_memory(frames, trial=True)

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        plan = self._edges.plan
        frames, rows, columns, channels = shard.shape
        return shard.new_empty((frames, rows // plan.height(self._edges.shard) * plan.rows, columns, channels))

    def silent(self) -> _SilentEdges:
        return self
