"""Decoding in a process group that somebody else made, such as torchrun's, on one host or on several.

Every rank makes the same calls. They agree over a gloo group of their own, so that no device waits for words; frames
go from device to device.
"""

from __future__ import annotations

import logging
import socket
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ..checkpoint import Checkpoint
from ..errors import OutOfMemoryError, WanVAEError
from ..parallel.agree import check_agreement
from ..parallel.plan import describe_plan, plan_shards
from ..parallel.rows import to_first_rank
from .download import to_host
from .shard import ShardDecoder

logger = logging.getLogger(__name__)


class GroupEngine:
    """This process as one rank of a decode; the group's first rank gets the frames.

    Making one is a collective call, as are its decodes.

    Args:
        weights: called for the checkpoint whenever the weights have to be loaded.
        device: this rank's.
        dtype: to compute in.
        group: the ranks that decode together.
    """

    def __init__(
        self, weights: Callable[[], Checkpoint], device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.rank = dist.get_rank(group)
        self._weights = weights
        self._decoder: ShardDecoder | None = None
        self._ranks = dist.get_process_group_ranks(group)
        self._groups = {len(self._ranks): group}
        self.control = self._new_group(len(self._ranks), "gloo")
        names: list[str] = [""] * len(self._ranks)
        dist.all_gather_object(names, f"{socket.gethostname()}/{device}", group=self.control)
        self.names = tuple(names)

    @property
    def running(self) -> bool:
        """Whether the weights are on the device now."""
        return self._decoder is not None

    def run(
        self,
        latents: torch.Tensor,
        video_shape: torch.Size,  # noqa: ARG002 (the pool's signature)
        chunk: int,
    ) -> GroupRun:
        """Begins a decode; the same call as `pool.WorkerPool.run`."""
        return GroupRun(self, latents, chunk)

    def close(self) -> None:
        """Gives the device's memory back; the next decode loads the weights again. The group stays its maker's."""
        self._decoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def decoder(self) -> ShardDecoder:
        """The decoder, loaded now if it is not; all ranks must have the same."""
        if self._decoder is None:
            decoder = ShardDecoder(self._weights(), self.device, self.dtype)
            check_agreement(decoder.facts(), self.control)
            self._decoder = decoder
        return self._decoder

    def first_ranks(self, size: int) -> dist.ProcessGroup:
        """The group of the first ``size`` ranks, for them alone to ask for."""
        if size not in self._groups:
            self._groups[size] = self._new_group(size, dist.get_backend(self._groups[len(self._ranks)]))
        return self._groups[size]

    def _new_group(self, size: int, backend: str) -> dist.ProcessGroup:
        group = dist.new_group(self._ranks[:size], backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group


class GroupRun:
    """One decode of a group: iterate it on every rank, close it in any case."""

    # No memory of its own for the whole video: frames are handed out step by step.
    video: torch.Tensor | None = None

    def __init__(self, engine: GroupEngine, latents: torch.Tensor, chunk: int) -> None:
        self._engine = engine
        self._latents = latents
        self._over = True
        decoder = engine.decoder()
        check_agreement({"latents": _described(latents)}, engine.control)
        self._plan = plan_shards(latents.shape[3], latents.shape[4], len(engine.names))
        self._working = engine.rank < self._plan.shards
        if engine.rank == 0:
            logger.info("decoding on %s", describe_plan(self._plan, engine.names))
        room = chunk or 2**31
        if self._working:
            room = decoder.room(self._plan, engine.rank, latents.shape, chunk)
        rooms = torch.zeros(len(engine.names), dtype=torch.int64)
        rooms[engine.rank] = room
        dist.all_reduce(rooms, group=engine.control)
        self._chunk = int(rooms.min())
        if not self._chunk:
            short = [name for name, most in zip(engine.names, rooms.tolist(), strict=True) if not most]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one latent frame at a time; use more "
                f"devices, free some of its memory, or decode smaller frames"
            )
        self._over = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]`` on the first rank's host, each valid until the next; nothing on the others."""
        if self._over:
            raise WanVAEError("this decode is over; begin another one")
        yield from to_host(self._whole_frames(), self._engine.device)

    def close(self) -> None:
        """Ends the decode where it is, on all ranks if the first one says so, and frees its memory."""
        if self._engine.rank == 0 and not self._over:
            self._agreed_to_go_on(False)
        self._over = True
        del self._latents
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
            torch.cuda.empty_cache()

    def _whole_frames(self) -> Iterator[torch.Tensor]:
        engine, plan = self._engine, self._plan
        group = engine.first_ranks(plan.shards) if self._working else None
        decoder = engine.decoder()
        shards = decoder.steps(self._latents, plan, group, self._chunk) if group else iter(())
        # The first rank says before each step whether there is one: those without rows know no other end.
        more = True
        while self._agreed_to_go_on(more):
            shard = next(shards, None)
            more = shard is not None
            if group and shard is not None:
                frames = to_first_rank(shard, plan, group, decoder.architecture.spatial_ratio)
                if frames is not None:
                    yield frames
        self._over = True

    def _agreed_to_go_on(self, wish: bool) -> bool:
        """What the first rank wishes, on all ranks."""
        wishes = torch.tensor([wish], dtype=torch.uint8)
        control = self._engine.control
        dist.broadcast(wishes, dist.get_global_rank(control, 0), group=control)
        return bool(wishes.item())


def _described(latents: torch.Tensor) -> str:
    content = latents.detach().to("cpu", torch.float32).contiguous()
    return f"{tuple(latents.shape)} {zlib.crc32(content.numpy().tobytes()):08x}"
