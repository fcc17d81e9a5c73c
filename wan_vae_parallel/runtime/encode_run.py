"""One encode on one device of this process.

T latent frames, h x w latent rows and columns, z channels
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import Protocol

import torch

from ..cancel import check_cancelled
from ..errors import OutOfMemoryError, is_out_of_memory, summary
from ..frames import check_range
from ..memory import (
    ENCODE_AHEAD,
    encode_memory,
    free_memory,
    gibibytes,
    give_back_host_memory,
    largest_encode_chunk,
    most_encoded_at_once,
)
from ..model.lines import Piece
from ..parallel.plan import plan_shards
from ..parallel.window import PixelWindow
from .device_to_host import latents_to_host
from .local import LocalEncoder
from .pieces import pieces
from .source import Source

logger = logging.getLogger(__name__)

# Of frames that repeat little is computed, and the host takes as long for that as for all of it. It takes it while the
# device has the frames before them to compute.
_LIGHT_AHEAD = 16


class _Engine(Protocol):
    """What a run needs of an engine; see `engine.LocalEngine`."""

    device: torch.device
    encode_dtype: torch.dtype

    @property
    def running(self) -> bool:
        """Whether weights are on the device."""
        ...

    def encoder(self) -> LocalEncoder:
        """The encoder."""
        ...

    def free_cached(self) -> None:
        """Gives unused memory back."""
        ...


class LocalEncodeRun:
    """One encode: iterate for the latents as they become final; close it in any case."""

    # Whether the newest latents are finite.
    finite = True

    def __init__(self, engine: _Engine, source: Source, chunk: int) -> None:
        self._engine = engine
        self._source = source
        self._chunk = chunk
        # What the encode found, where it is done and with which chunk, for a log.
        self.found = "ready" if engine.running else "gone"
        self.where = str(engine.device)
        self.chunk = chunk
        # Whether the source is asked for frames.
        self._asking = False
        self._latents = self._all()

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the video's number and ``[z, t, h, w]`` on the host, each valid until the next."""
        return self._latents

    def close(self) -> None:
        """Ends the encode where it is and frees its memory."""
        self._latents.close()
        del self._latents  # it holds this run
        if self._engine.device.type == "cpu":
            give_back_host_memory()

    def _all(self) -> Generator[tuple[int, torch.Tensor], None, None]:
        for video in range(self._source.videos):
            with contextlib.closing(self._video(video)) as latents:
                for newest in latents:
                    yield video, newest

    def _video(self, video: int) -> Generator[torch.Tensor, None, None]:
        """Latents of one video; out of memory starts over with smaller chunks and skips what has left already."""
        engine, source = self._engine, self._source
        architecture = engine.encoder().architecture
        ratio = architecture.encode_ratio
        size = (source.rows, source.columns)
        window = PixelWindow.of(plan_shards(*size, 1), 0, ratio=ratio, patch=architecture.encoder_patch)
        chunk, sent, said = self._first_chunk(size), 0, False
        while True:
            skip, self.chunk = sent, chunk
            try:
                steps = engine.encoder().stream(
                    self._pieces(video, chunk), window, chunk, image=source.image, pixels=source.dtype
                )
                for latents, self.finite, least, most in latents_to_host(
                    steps, engine.device, ENCODE_AHEAD, _LIGHT_AHEAD
                ):
                    check_range(least, most)
                    if latents is None:
                        check_cancelled()  # callers have their say with the latents alone
                        continue
                    fresh = latents[:, skip:]
                    skip = max(0, skip - latents.shape[1])
                    if fresh.shape[1]:
                        sent += fresh.shape[1]
                        yield fresh
                return
            except Exception as error:
                if self._asking or not is_out_of_memory(error):
                    raise  # a source's own want of memory is its own
                reason = summary(error)
            # Out of the handler, the error's traceback no longer holds the step's tensors.
            engine.free_cached()
            if chunk == 1 or not source.again:
                raise OutOfMemoryError(self._does_not_fit(size, chunk, reason))
            if not said:
                logger.warning(
                    "%s ran out of memory with chunk %d; going on with smaller chunks, same latents",
                    engine.device,
                    chunk,
                )
                said = True
            chunk //= 2

    def _pieces(self, video: int, chunk: int) -> Iterator[Piece]:
        found = pieces(self._source.blocks(video, chunk), ahead=self._source.again)
        while True:
            self._asking = True
            piece = next(found, None)
            self._asking = False
            if piece is None:
                return
            yield piece

    def _first_chunk(self, size: tuple[int, int]) -> int:
        engine, frames, image = self._engine, self._source.frames, self._source.image
        if self._chunk:
            return self._chunk if frames is None else min(self._chunk, most_encoded_at_once(frames, image=image))
        encoder = engine.encoder()
        return largest_encode_chunk(
            encoder.architecture,
            size,
            frames=frames,
            image=image,
            dtype=engine.encode_dtype,
            free=free_memory(engine.device),
            kernels=encoder.kernels,
            device_type=engine.device.type,
        )

    def _does_not_fit(self, size: tuple[int, int], chunk: int, reason: str) -> str:
        engine, source = self._engine, self._source
        encoder = engine.encoder()
        needed = encode_memory(
            encoder.architecture,
            size,
            chunk=chunk,
            image=source.image,
            dtype=engine.encode_dtype,
            kernels=encoder.kernels,
        )
        free = free_memory(engine.device) + needed.weights
        how = "even one frame at a time" if chunk == 1 else f"with chunk {chunk}, and a stream can't be read again"
        ways = ["encode smaller frames" if chunk == 1 else "take a smaller chunk"]
        if engine.device.type != "cpu":
            ways.append("or encode on the CPU")
        return (
            f"{source.width}x{source.height} does not fit on {engine.device} {how}: it takes about "
            f"{gibibytes(needed.total)}, and {gibibytes(free)} are free; {', '.join(ways)} ({reason})"
        )
