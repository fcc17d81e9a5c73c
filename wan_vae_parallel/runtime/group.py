"""Decoding and encoding in a process group that somebody else made, such as torchrun's, on one host or on several.

Every rank makes the same calls. What they have to say goes through the group's store, so that no device waits for
words; frames go from device to device.

What one rank refuses before it exchanges frames is an error on all, and the group can decode again. What fails later
ends the group: ranks that wait for frames can't be told, and the process's end is what wakes them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ..errors import OutOfMemoryError, WanVAEError
from ..files.checkpoint import Checkpoint
from ..frames import check_range
from ..memory import chunk_to_hand_on
from ..model.lines import Piece
from ..ops.pixel_format import PixelFormat
from ..parallel.coordination import WORD_SECONDS, WORK_SECONDS, Coordinator, check_same
from ..parallel.edges import connect
from ..parallel.plan import describe_plan, plan_shards
from ..parallel.rows import to_first_rank
from .device_to_host import latents_to_host, to_host
from .pieces import pieces
from .shard import ShardDecoder, ShardEncoder
from .source import Source
from .steps import Frames, Latents

logger = logging.getLogger(__name__)

# Rows and columns apart of pixels that ranks compare.
_SAMPLE_STEP = 7


class GroupEngine:
    """This process as one rank of a decode; the group's first rank gets the frames.

    Making one is a collective call, as are its decodes: each is a meeting of its own, see
    `parallel.coordination.Coordinator`.

    Args:
        weights: called for the checkpoint whenever the weights have to be loaded.
        device: this rank's.
        dtype: to decode in.
        encode_dtype: to encode in.
        group: the ranks that work together.
    """

    def __init__(
        self,
        weights: Callable[[], Checkpoint],
        device: torch.device,
        dtype: torch.dtype,
        encode_dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.encode_dtype = encode_dtype
        self.rank = dist.get_rank(group)
        self.group = group
        # Whether frames can't be exchanged any more; the device may wait for another rank's for ever.
        self.failed = False
        self._weights = weights
        self._decoder: ShardDecoder | None = None
        self._encoder: ShardEncoder | None = None
        self._connected = False
        self.names = tuple(self.meet(call="load_vae").device_names)

    @property
    def running(self) -> bool:
        """Whether the weights are on the device now."""
        return bool(self.parts)

    @property
    def parts(self) -> frozenset[str]:
        """Of ``"decoder"`` and ``"encoder"`` those whose weights are on the device now."""
        models = {"decoder": self._decoder, "encoder": self._encoder}
        return frozenset(name for name, model in models.items() if model is not None)

    def run(
        self,
        latents: torch.Tensor,
        video_shape: torch.Size,
        chunk: int,
        pixels: PixelFormat | None = None,
    ) -> GroupRun:
        """Begins a decode; the same call as `pool.WorkerPool.run`."""
        return GroupRun(self, latents, video_shape, chunk, pixels)

    def encode(self, source: Source, chunk: int) -> GroupEncodeRun:
        """Begins an encode; the same call as `workers.pool.WorkerPool.encode`."""
        return GroupEncodeRun(self, source, chunk)

    def close(self) -> None:
        """Gives the device's memory back; the next call loads the weights again. The group stays its maker's."""
        self._decoder = self._encoder = None
        if self.device.type == "cuda" and not self.failed:
            torch.cuda.empty_cache()

    def meet(self, **about: str) -> Coordinator:
        """All ranks' words on a call that they make."""
        return Coordinator(self.group, about, f"{socket.gethostname()}/{self.device}")

    def decoder(self) -> ShardDecoder:
        """The decoder, loaded now if it is not."""
        if self._decoder is None:
            checkpoint = self._weights()
            self._decoder = ShardDecoder(checkpoint.architecture, checkpoint.decoder, self.device, self.dtype)
        return self._decoder

    def encoder(self) -> ShardEncoder:
        """The encoder, loaded now if it is not."""
        if self._encoder is None:
            checkpoint = self._weights()
            self._encoder = ShardEncoder(checkpoint.architecture, checkpoint.encoder, self.device, self.encode_dtype)
        return self._encoder

    def connect(self, coordinator: Coordinator) -> None:
        """Connects the devices if they are not yet."""
        if not self._connected:
            with self.exchanging(coordinator):
                connect(self.group, self.device)
            self._connected = True

    @contextlib.contextmanager
    def exchanging(self, coordinator: Coordinator) -> Iterator[None]:
        """Within it, ranks wait for one another's bytes: what fails ends the group."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (it is raised again)
            self.failed = True
            coordinator.fail(error)


class GroupRun:
    """One decode of a group: iterate it on every rank, close it in any case."""

    # No memory of its own for the whole video: frames are handed out step by step.
    video: torch.Tensor | None = None
    # Whether the newest frames are free of NaN.
    finite = True

    def __init__(
        self,
        engine: GroupEngine,
        latents: torch.Tensor,
        video_shape: torch.Size,
        chunk: int,
        pixels: PixelFormat | None = None,
    ) -> None:
        self._engine = engine
        self._latents = latents
        self._video_shape = video_shape
        self._pixels = pixels
        self._over = True
        # What the decode found, for a log.
        self.found = "ready" if engine.running else "gone"
        self._coordinator = engine.meet(call="decode", latents=_described(latents))
        check_same(self._coordinator.gather(lambda: engine.decoder().facts(), WORK_SECONDS))
        # Once, or layers might go to cuDNN between two decodes.
        if not all(self._coordinator.exchange(engine.decoder().tuned)):
            engine.decoder().tune(self._coordinator)
        engine.connect(self._coordinator)
        self._plan = plan_shards(latents.shape[3], latents.shape[4], len(engine.names))
        self.where = describe_plan(self._plan, engine.names)
        rooms = self._coordinator.gather(lambda: self._room(chunk), WORD_SECONDS)
        self._chunk = min(most for most in rooms if most is not None)
        if not self._chunk:
            short = [name for name, most in zip(engine.names, rooms, strict=True) if most == 0]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one latent frame at a time; use more "
                f"devices, free some of its memory, or decode smaller frames"
            )
        self._over = False

    @property
    def chunk(self) -> int:
        """Latent frames at once."""
        return self._chunk

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]``, or bytes ``[B, t, n]``, on the first rank's host; nothing on the others.

        Each is valid until the next.
        """
        if self._over:
            raise WanVAEError("this decode is over; begin another one")
        with self._engine.exchanging(self._coordinator):
            for frames, finite in to_host(self._whole_frames(), self._engine.device):
                self.finite = finite
                yield frames

    def close(self) -> None:
        """Ends the decode where it is, on all ranks if the first one says so, and frees its memory."""
        if self._engine.rank == 0 and not self._over and not self._engine.failed:
            self._coordinator.from_first(False)
        self._over = True
        del self._latents
        if self._engine.device.type == "cuda" and not self._engine.failed:
            torch.cuda.synchronize(self._engine.device)
            torch.cuda.empty_cache()

    @property
    def _working(self) -> bool:
        """Whether this rank has rows."""
        return self._engine.rank < self._plan.shards

    def _room(self, chunk: int) -> int | None:
        """The largest chunk that this rank has room for; any will do for a rank without rows."""
        if not self._working:
            return None
        room = self._engine.decoder().room(self._plan, self._engine.rank, self._latents.shape, chunk)
        return chunk_to_hand_on(room, self._video_shape) if self._pixels and room and not chunk else room

    def _whole_frames(self) -> Iterator[Frames]:
        engine, plan = self._engine, self._plan
        decoder = engine.decoder()
        shards: Iterator[torch.Tensor] = iter(())
        if self._working:
            rows = decoder.own_rows(self._latents, plan, engine.rank)
            shards = decoder.steps(rows, plan, engine.group, self._chunk)
        # The first rank says before each step whether there is one: those without rows know no other end.
        more = True
        while self._coordinator.from_first(more):
            shard = next(shards, None)
            more = shard is not None
            if shard is not None:
                frames = to_first_rank(shard, plan, engine.group, decoder.architecture.spatial_ratio)
                if frames is not None:
                    yield Frames.of(frames, self._pixels)
        self._over = True


class GroupEncodeRun:
    """One encode of a group: iterate it on every rank, close it in any case."""

    # Whether the newest latents are finite.
    finite = True

    def __init__(self, engine: GroupEngine, source: Source, chunk: int) -> None:
        self._engine = engine
        self._source = source
        self._over = True
        # What the encode found, for a log.
        self.found = "ready" if engine.running else "gone"
        self._coordinator = engine.meet(call="encode", **source.facts())
        check_same(self._coordinator.gather(lambda: engine.encoder().facts(), WORK_SECONDS))
        if not all(self._coordinator.exchange(engine.encoder().tuned)):
            engine.encoder().tune(self._coordinator)
        engine.connect(self._coordinator)
        self._plan = plan_shards(source.rows, source.columns, len(engine.names))
        self.where = describe_plan(self._plan, engine.names)
        rooms = self._coordinator.gather(lambda: self._room(chunk), WORD_SECONDS)
        self.chunk = min(most for most in rooms if most is not None)
        if not self.chunk:
            short = [name for name, most in zip(engine.names, rooms, strict=True) if most == 0]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one frame at a time; use more devices, free "
                f"some of its memory, or encode smaller frames"
            )
        self._over = False

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the video's number and ``[z, t, h, w]`` on the first rank's host; nothing on the others."""
        if self._over:
            raise WanVAEError("this encode is over; begin another one")
        refused: Exception | None = None
        with self._engine.exchanging(self._coordinator):
            try:
                for video in range(self._source.videos):
                    for latents, finite, least, most in latents_to_host(self._whole(video), self._engine.device):
                        words = self._coordinator.exchange([finite, least, most])
                        self.finite = all(word[0] for word in words)
                        for _, *bounds in words:
                            _refuse(functools.partial(check_range, *bounds))
                        if latents is not None:
                            yield video, latents
            except _Over:
                pass  # the first rank's caller wants no more
            except _Refused as error:
                # On all ranks at the same step, before they exchange bytes: the group can go on to other things.
                refused = error.reason
        self._over = True
        if refused is not None:
            raise refused

    def close(self) -> None:
        """Ends the encode where it is, on all ranks if the first one says so, and frees its memory."""
        if self._engine.rank == 0 and not self._over and not self._engine.failed:
            self._coordinator.from_first(False)
        self._over = True
        if self._engine.device.type == "cuda" and not self._engine.failed:
            torch.cuda.synchronize(self._engine.device)
            torch.cuda.empty_cache()

    @property
    def _working(self) -> bool:
        """Whether this rank has rows."""
        return self._engine.rank < self._plan.shards

    def _room(self, chunk: int) -> int | None:
        if not self._working:
            return None
        source = self._source
        return self._engine.encoder().room(self._plan, self._engine.rank, source.frames, chunk, image=source.image)

    def _whole(self, video: int) -> Iterator[Latents]:
        """The whole picture's latents on the first rank; on others steps without any."""
        engine, plan, source = self._engine, self._plan, self._source
        if not self._working:
            for _ in self._pieces(video):
                yield Latents(None, None)
            yield Latents(None, None)
            return
        shards = engine.encoder().steps(
            self._pieces(video), plan, engine.group, self.chunk, image=source.image, pixels=source.dtype
        )
        for shard in shards:
            means = shard.means
            if means is not None:
                whole = to_first_rank(means.permute(1, 2, 3, 0)[None], plan, engine.group, 1)
                means = None if whole is None else whole[0].permute(3, 0, 1, 2).contiguous()
            yield Latents(means, shard.pixel_range)

    def _pieces(self, video: int) -> Iterator[Piece]:
        """The video's pieces, of which all ranks have seen that they are the same."""
        coordinator = self._coordinator
        found = pieces(self._source.blocks(video, self.chunk), ahead=self._source.again)
        while True:
            # The first rank says before each piece whether there is to be one.
            if not coordinator.from_first(True):
                raise _Over
            piece: Piece | None = None

            def take() -> dict[str, str]:
                nonlocal piece
                piece = next(found, None)
                return {"frames": "none" if piece is None else f"{piece.counts} {_sampled(piece.frames)}"}

            _refuse(lambda: check_same(coordinator.gather(take, WORK_SECONDS)))
            if piece is None:
                return
            yield piece


class _Over(Exception):
    """The first rank wants no more."""


class _Refused(Exception):
    """Carries what all ranks refuse at the same step."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _refuse(check: Callable[[], None]) -> None:
    """Calls ``check``, whose errors are those of all ranks."""
    try:
        check()
    except Exception as error:
        raise _Refused(error) from error


def _sampled(frames: torch.Tensor | None) -> str:
    """A short text that differs where frames do."""
    if frames is None:
        return ""
    sample = frames[:, ::_SAMPLE_STEP, ::_SAMPLE_STEP].to("cpu", torch.float32).contiguous()
    return f"{zlib.crc32(sample.numpy().tobytes()):08x}"


def _described(latents: torch.Tensor) -> str:
    content = latents.detach().to("cpu", torch.float32).contiguous()
    return f"{tuple(latents.shape)} {zlib.crc32(content.numpy().tobytes()):08x}"
