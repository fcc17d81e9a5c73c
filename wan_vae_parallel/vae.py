"""The VAE that users hold: load it, decode with it, close it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W frames of C colours
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from .architecture import Architecture
from .checkpoint import Checkpoint, checkpoint_from_state_dict, read_checkpoint
from .devices import parse_devices, parse_dtype
from .errors import DeviceError, OutOfMemoryError, WanVAEError
from .latents import check_latents, denormalize
from .memory import decode_memory, free_memory, gibibytes, largest_chunk, largest_frame, parameter_count
from .runtime.download import to_host
from .runtime.local import LocalDecoder

logger = logging.getLogger(__name__)

OnChunk = Callable[[int, int, torch.Tensor], None]
Devices = str | torch.device | Sequence[str | torch.device]
Chunk = int | Literal["auto"]

_UNLIMITED = 2**62


def load_vae(
    path: str | Path, *, devices: Devices = "auto", dtype: str | torch.dtype = "auto", chunk: Chunk = "auto"
) -> VAE:
    """Loads a Wan VAE's decoder.

    Args:
        path: a safetensors file in Wan's original or diffusers' key layout, or a diffusers VAE folder.
        devices: ``"auto"``, ``"cpu"``, ``"cuda:0"``.
        dtype: ``"auto"`` (bf16 on GPUs that have it, fp32 on the CPU), ``"float32"``, ``"bfloat16"``,
            ``"float16"`` or ``"float64"``.
        chunk: latent frames that are decoded at once, or ``"auto"``. It trades memory for speed, not pixels.

    Raises:
        CheckpointError: the file is not a Wan VAE that can be decoded with.
        DeviceError: a device or dtype that is not there.
    """

    def weights() -> Checkpoint:
        return read_checkpoint(path)

    return VAE(weights, devices=devices, dtype=dtype, chunk=chunk)


def vae_from_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    name: str = "the state dict",
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
) -> VAE:
    """Like `load_vae`, from tensors that are loaded already; ``name`` is what errors call them."""

    def weights() -> Checkpoint:
        return checkpoint_from_state_dict(state_dict, source=name)

    return VAE(weights, devices=devices, dtype=dtype, chunk=chunk)


class VAE:
    """A Wan VAE's decoder, ready to decode; make it with `load_vae`.

    A context manager: leaving it closes it. Several threads may decode with it at once.
    """

    def __init__(
        self, weights: Callable[[], Checkpoint], *, devices: Devices, dtype: str | torch.dtype, chunk: Chunk
    ) -> None:
        parsed = parse_devices(devices)
        if len(parsed) > 1:
            raise DeviceError(f"{len(parsed)} devices are named, {devices!r}, but one VAE decodes on one; name one")
        self.device = parsed[0]
        self.dtype = parse_dtype(dtype, self.device)
        self.chunk = chunk
        self._weights = weights
        self._closed = False
        checkpoint = weights()
        self.architecture: Architecture = checkpoint.architecture
        self._decoder: LocalDecoder | None = None

    @property
    def chunk(self) -> Chunk:
        """Latent frames decoded at once, or ``"auto"``; setting it takes effect at the next decode."""
        return self._chunk

    @chunk.setter
    def chunk(self, chunk: Chunk) -> None:
        if chunk != "auto" and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk is {chunk!r}; it must be 'auto' or a whole number of latent frames, at least 1")
        self._chunk: Chunk = chunk

    def __enter__(self) -> VAE:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def decode(
        self, latents: torch.Tensor, *, normalized: bool = False, on_chunk: OnChunk | None = None
    ) -> torch.Tensor:
        """Decodes latents to frames.

        Args:
            latents: ``[B, z, T, h, w]``, de-normalised as ComfyUI's LATENT is; ``[B, z, h, w]`` is one frame each.
                Any T, h, w >= 1, any float dtype, strides and device.
            normalized: the latents are as the diffusion model made them; apply the published mean and deviation.
            on_chunk: called as ``on_chunk(done, total, frames)`` with the frames finished and in all, and the
                newest ``[B, t, H, W, C]``. What it raises ends the decode and reaches the caller.

        Returns:
            ``[B, 4 * (T - 1) + 1, H, W, C]`` in [0, 1], float32 (float64 for a float64 VAE), contiguous, on the
            host.

        Raises:
            LatentError: the latents don't belong to this VAE, or hold NaN.
            OutOfMemoryError: not even one latent frame at a time fits; the message says what would.
        """
        latents = self._checked(latents, normalized)
        shape = self.output_shape(latents.shape)
        total, done = shape[1], 0
        dtype = torch.promote_types(self.dtype, torch.float32)
        needed, free = dtype.itemsize * shape.numel(), free_memory(torch.device("cpu"))
        if needed > free:
            raise OutOfMemoryError(
                f"{total} frames of {shape[3]}x{shape[2]} take {gibibytes(needed)} on the host, where "
                f"{gibibytes(free)} are free; decode fewer latents at once, or take the frames from decode_stream"
            )
        out = torch.empty(shape, dtype=dtype)
        for frames in to_host(self._stream(latents), self.device):
            newest = out[:, done : done + frames.shape[1]]
            newest.copy_(frames)
            done += frames.shape[1]
            if on_chunk:
                on_chunk(done, total, newest)
        return out

    def decode_stream(self, latents: torch.Tensor, *, normalized: bool = False) -> Iterator[torch.Tensor]:
        """Like `decode`, but hands out frames as soon as they are final, and holds no whole video.

        Closing the iterator, or dropping it, ends the decode and frees its memory.

        Yields:
            ``[B, t, H, W, C]``, the frames that follow those before.

        Raises:
            LatentError, OutOfMemoryError: as `decode` does; bad latents are refused at the call.
        """
        return self._host_stream(self._checked(latents, normalized))

    def output_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, 4 * (T - 1) + 1, H, W, C]`` of the frames that latents of ``shape`` ``[B, z, T, h, w]`` decode to."""
        batch, _, frames, rows, columns = shape
        height, width = self.architecture.frame_size(rows, columns)
        return torch.Size(
            (batch, self.architecture.frame_count(frames), height, width, self.architecture.output_channels)
        )

    def memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that decoding latents of ``shape`` ``[B, z, T, h, w]`` takes on the device, weights included.

        It is what a free device would be used with; ``chunk="auto"`` makes do with less where there is less.
        """
        batch, _, frames, rows, columns = shape
        size = (batch, frames, rows, columns)
        chunk = self._first_chunk(size, free=_UNLIMITED)
        return decode_memory(self.architecture, size, chunk=chunk, dtype=self.dtype).total

    def release(self) -> None:
        """Gives the device's memory back; the next decode loads the weights again."""
        self._decoder = None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def weights_size(self) -> int:
        """Bytes of the weights on the device."""
        return parameter_count(self.architecture) * self.dtype.itemsize

    @property
    def loaded(self) -> bool:
        """Whether the weights are on the device now."""
        return self._decoder is not None

    def close(self) -> None:
        """Gives everything back; decoding is an error afterwards."""
        self.release()
        self._closed = True

    def _load(self, checkpoint: Checkpoint) -> LocalDecoder:
        if checkpoint.architecture != self.architecture:
            raise WanVAEError(
                f"{checkpoint.source} was {self.architecture} when it was loaded and is {checkpoint.architecture} now; "
                f"load it again"
            )
        self._decoder = LocalDecoder(self.architecture, checkpoint.decoder, device=self.device, dtype=self.dtype)
        return self._decoder

    def _checked(self, latents: torch.Tensor, normalized: bool) -> torch.Tensor:
        if self._closed:
            raise WanVAEError("this VAE is closed; load it again")
        latents = check_latents(latents, self.architecture).detach()
        return denormalize(latents, self.architecture) if normalized else latents

    def _first_chunk(self, size: tuple[int, int, int, int], *, free: int) -> int:
        if self.chunk != "auto":
            return min(self.chunk, max(1, size[1] - 1))
        return largest_chunk(self.architecture, size, dtype=self.dtype, free=free)

    def _host_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for frames in to_host(self._stream(latents), self.device):
            # The caller's own: the buffer is used again, and tensors of inference mode can't be written to outside it.
            yield frames.clone()

    def _stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Frames on the device; out of memory starts over with smaller chunks and skips what has left already."""
        size = (latents.shape[0], *latents.shape[2:])
        chunk, sent = self._first_chunk(size, free=free_memory(self.device)), 0
        while True:
            skip = sent
            try:
                decoder = self._decoder or self._load(self._weights())
                for frames in decoder.stream(latents, chunk):
                    fresh = frames[:, skip:]
                    skip = max(0, skip - frames.shape[1])
                    if fresh.shape[1]:
                        sent += fresh.shape[1]
                        yield fresh
                return
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Out of the handler, the error's traceback no longer holds the step's tensors.
            self._free_cached()
            if chunk == 1:
                raise OutOfMemoryError(self._does_not_fit(size, reason))
            logger.warning(
                "%s ran out of memory with chunk %d; going on with %d, same frames", self.device, chunk, chunk // 2
            )
            chunk //= 2

    def _free_cached(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _does_not_fit(self, size: tuple[int, int, int, int], reason: str) -> str:
        batch, frames, rows, columns = size
        height, width = self.architecture.frame_size(rows, columns)
        needed = decode_memory(self.architecture, size, chunk=1, dtype=self.dtype)
        free = free_memory(self.device) + (needed.weights if self.loaded else 0)
        smaller = largest_frame(self.architecture, size, dtype=self.dtype, free=free)
        ways = [f"{smaller} would fit"]
        if batch > 1 and frames > 1:
            ways.append(f"or decode the batch of {batch} one by one")
        return (
            f"{width}x{height} does not fit on {self.device} even one latent frame at a time: it takes about "
            f"{gibibytes(needed.total)}, and {gibibytes(free)} are free; {', '.join(ways)}, or decode on the CPU "
            f"({reason})"
        )


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
