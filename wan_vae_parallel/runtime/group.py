"""Decoding in a process group that somebody else made, such as torchrun's, on one host or on several.

Every rank makes the same calls. What they have to say goes through the group's store, so that no device waits for
words; frames go from device to device.
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
from ..parallel.agree import Board, check_agreement
from ..parallel.edges import connect
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
        self.group = group
        self.board = Board(group)
        self.names = tuple(self.board.exchange(f"{socket.gethostname()}/{device}"))

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
            check_agreement(decoder.facts(), self.board)
            connect(self.group, self.device)
            self._decoder = decoder
        return self._decoder


class GroupRun:
    """One decode of a group: iterate it on every rank, close it in any case."""

    # No memory of its own for the whole video: frames are handed out step by step.
    video: torch.Tensor | None = None

    def __init__(self, engine: GroupEngine, latents: torch.Tensor, chunk: int) -> None:
        self._engine = engine
        self._latents = latents
        self._over = True
        decoder = engine.decoder()
        check_agreement({"latents": _described(latents)}, engine.board)
        self._plan = plan_shards(latents.shape[3], latents.shape[4], len(engine.names))
        if engine.rank == 0:
            logger.info("decoding on %s", describe_plan(self._plan, engine.names))
        room = decoder.room(self._plan, engine.rank, latents.shape, chunk) if self._working else None
        rooms = engine.board.exchange(room)
        self._chunk = min(most for most in rooms if most is not None)
        if not self._chunk:
            short = [name for name, most in zip(engine.names, rooms, strict=True) if most == 0]
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
            self._engine.board.from_first(False)
        self._over = True
        del self._latents
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
            torch.cuda.empty_cache()

    @property
    def _working(self) -> bool:
        """Whether this rank has rows."""
        return self._engine.rank < self._plan.shards

    def _whole_frames(self) -> Iterator[torch.Tensor]:
        engine, plan = self._engine, self._plan
        decoder = engine.decoder()
        shards = decoder.steps(self._latents, plan, engine.group, self._chunk) if self._working else iter(())
        # The first rank says before each step whether there is one: those without rows know no other end.
        more = True
        while engine.board.from_first(more):
            shard = next(shards, None)
            more = shard is not None
            if shard is not None:
                frames = to_first_rank(shard, plan, engine.group, decoder.architecture.spatial_ratio)
                if frames is not None:
                    yield frames
        self._over = True


def _described(latents: torch.Tensor) -> str:
    content = latents.detach().to("cpu", torch.float32).contiguous()
    return f"{tuple(latents.shape)} {zlib.crc32(content.numpy().tobytes()):08x}"
