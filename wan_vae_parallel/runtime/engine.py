"""Decoding and encoding on one device of this process, with smaller chunks where memory is short.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, H, W, C]
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import torch

from ..errors import OutOfMemoryError, is_out_of_memory, summary
from ..files.checkpoint import Checkpoint
from ..memory import (
    chunk_to_hand_on,
    decode_memory,
    free_memory,
    gibibytes,
    give_back_host_memory,
    largest_chunk,
    largest_frame,
    most_at_once,
)
from ..ops.pixel_format import PixelFormat
from .device_to_host import to_host
from .encode_run import LocalEncodeRun
from .local import LocalDecoder, LocalEncoder
from .source import Source
from .steps import Frames

logger = logging.getLogger(__name__)


class LocalEngine:
    """Weights that are loaded when a decode wants them, and released when asked.

    Args:
        weights: called for the checkpoint whenever the weights have to be loaded.
        device: where to decode and encode.
        dtype: in what to decode.
        encode_dtype: in what to encode.
    """

    def __init__(
        self,
        weights: Callable[[], Checkpoint],
        device: torch.device,
        dtype: torch.dtype,
        encode_dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.encode_dtype = encode_dtype
        self._weights = weights
        self._decoder: LocalDecoder | None = None
        self._encoder: LocalEncoder | None = None

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
    ) -> LocalRun:
        """Begins a decode; the same call as `pool.WorkerPool.run`."""
        return LocalRun(self, latents, video_shape, chunk, pixels)

    def encode(self, source: Source, chunk: int) -> LocalEncodeRun:
        """Begins an encode; the same call as `workers.pool.WorkerPool.encode`."""
        return LocalEncodeRun(self, source, chunk)

    def close(self) -> None:
        """Gives the device's memory back; the next decode or encode loads the weights again."""
        self._decoder = self._encoder = None
        self.free_cached()

    def decoder(self) -> LocalDecoder:
        """The decoder, loaded now if it is not."""
        if self._decoder is None:
            checkpoint = self._weights()
            self._decoder = LocalDecoder(
                checkpoint.architecture, checkpoint.decoder, device=self.device, dtype=self.dtype
            )
            # Before a chunk is chosen: cuDNN's layers take more memory.
            self._decoder.tune()
        return self._decoder

    def encoder(self) -> LocalEncoder:
        """The encoder, loaded now if it is not."""
        if self._encoder is None:
            checkpoint = self._weights()
            self._encoder = LocalEncoder(
                checkpoint.architecture, checkpoint.encoder, device=self.device, dtype=self.encode_dtype
            )
            self._encoder.tune()
        return self._encoder

    def free_cached(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class LocalRun:
    """One decode: iterate for the frames as they become final; close it in any case."""

    # No memory of its own for the whole video: frames are handed out step by step.
    video: torch.Tensor | None = None
    # Whether the newest frames are free of NaN.
    finite = True

    def __init__(
        self,
        engine: LocalEngine,
        latents: torch.Tensor,
        video_shape: torch.Size,
        chunk: int,
        pixels: PixelFormat | None = None,
    ) -> None:
        self._engine = engine
        self._latents = latents
        self._video_shape = video_shape
        self._chunk = chunk
        self._pixels = pixels
        # What the decode found, where it is done and with which chunk, for a log.
        self.found = "ready" if engine.running else "gone"
        self.where = str(engine.device)
        self.chunk = chunk
        self._frames = to_host(self._on_device(), engine.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]``, or bytes ``[B, t, n]``, on the host, each valid until the next."""
        for frames, finite in self._frames:
            self.finite = finite
            yield frames

    def close(self) -> None:
        """Ends the decode where it is and frees its memory."""
        self._frames = iter(())
        if self._engine.device.type == "cpu":
            give_back_host_memory()

    def _on_device(self) -> Iterator[Frames]:
        """Frames on the device; out of memory starts over with smaller chunks and skips what has left already."""
        engine, latents = self._engine, self._latents
        size = (latents.shape[0], latents.shape[2], latents.shape[3], latents.shape[4])
        chunk, sent, said = self._first_chunk(size), 0, False
        while True:
            skip, self.chunk = sent, chunk
            try:
                for frames in engine.decoder().stream(latents, chunk):
                    fresh = frames[:, skip:]
                    skip = max(0, skip - frames.shape[1])
                    if fresh.shape[1]:
                        step = Frames.of(fresh, self._pixels)
                        sent += fresh.shape[1]
                        yield step
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = summary(error)
            # Out of the handler, the error's traceback no longer holds the step's tensors.
            engine.free_cached()
            if chunk == 1:
                raise OutOfMemoryError(self._does_not_fit(size, reason))
            if not said:
                logger.warning(
                    "%s ran out of memory with chunk %d; going on with smaller chunks, same frames",
                    engine.device,
                    chunk,
                )
                said = True
            chunk //= 2

    def _first_chunk(self, size: tuple[int, int, int, int]) -> int:
        if self._chunk:
            return min(self._chunk, most_at_once(size[0], size[1]))
        engine = self._engine
        decoder = engine.decoder()
        chunk = largest_chunk(
            decoder.architecture,
            size,
            dtype=engine.dtype,
            free=free_memory(engine.device),
            kernels=decoder.kernels,
            device_type=engine.device.type,
        )
        return chunk_to_hand_on(chunk, self._video_shape) if self._pixels else chunk

    def _does_not_fit(self, size: tuple[int, int, int, int], reason: str) -> str:
        engine, (batch, _, rows, columns) = self._engine, size
        architecture = engine.decoder().architecture
        height, width = architecture.frame_size(rows, columns)
        kernels = engine.decoder().kernels
        needed = decode_memory(architecture, size, chunk=1, dtype=engine.dtype, kernels=kernels)
        free = free_memory(engine.device) + needed.weights
        ways = [f"{largest_frame(architecture, size, dtype=engine.dtype, free=free, kernels=kernels)} would fit"]
        if batch > 1:
            ways.append(f"or decode the batch of {batch} one by one")
        if engine.device.type != "cpu":
            ways.append("or decode on the CPU")
        return (
            f"{width}x{height} does not fit on {engine.device} even one latent frame at a time: it takes about "
            f"{gibibytes(needed.total)}, and {gibibytes(free)} are free; {', '.join(ways)} ({reason})"
        )
