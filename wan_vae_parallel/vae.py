"""The VAE that users hold: load it, decode and encode with it, close it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .errors import ClosedError, FrameError
from .files.formats import Quality
from .files.latents import (
    check_fits,
    check_normalizable,
    denormalize,
    largest_value,
    latents_shape,
    normalize,
    ordered_latents,
)
from .frames import check_frames, check_length, check_part, frames_shape
from .memory import check_host_room, host_room
from .ops.pixel_format import PixelFormat
from .runtime.host_bytes import copy
from .runtime.source import Source, StreamSource, TensorSource
from .session import DecodeRun, EncodeRun, Session
from .to_video import AnyAudio, OnPicture, VideoDecode, joined, output_settings
from .workers.run import PoolRun
from .workers.shared_memory import populating

OnChunk = Callable[[int, int, torch.Tensor], None]

_STREAM = "take the frames from decode_stream"


class VAE(Session):
    """A Wan VAE, ready to decode and encode; make it with `loading.load_vae`.

    A context manager: leaving it closes it. Several threads may decode and encode with it; on several devices they
    wait for one another.

    Attributes:
        architecture: what the weights are.
        devices: where this process, or its workers, decode and encode.
        dtype: what it decodes in.
        encode_dtype: what it encodes in.
    """

    def decode(
        self,
        latents: torch.Tensor,
        normalized: bool = False,
        on_chunk: OnChunk | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Decodes latents to frames.

        Args:
            latents: ``[B, z, T, h, w]``, de-normalised as ComfyUI's LATENT is; ``[B, z, h, w]`` is one frame each.
                Any T, h, w >= 1, any float dtype, strides and device.
            normalized: the latents are as the diffusion model made them; apply the published mean and deviation.
            on_chunk: called as ``on_chunk(done, total, frames)`` with the frames finished and in all, and the
                newest ``[B, t, H, W, C]``. What it raises ends the decode and reaches the caller.
            on_wait: called several times a second, in this thread, while workers start, kernels compile, settings are
                measured, or devices decode: by workers, or between the layers of one, of which one of a large picture
                takes seconds on a CPU. What it raises ends the decode and reaches the caller.

        Returns:
            ``[B, 4 * (T - 1) + 1, H, W, C]`` in [0, 1], float32 (float64 for a float64 VAE), contiguous, on the
            host. Of a group's ranks only the first gets them, the others ``[B, 0, H, W, C]``.

        Raises:
            LatentError: the latents don't belong to this VAE, or hold NaN, or what they decode to is NaN.
            DeviceError: frames are NaN in float16.
            ClosedError: the VAE is closed, or is closed meanwhile.
            BusyError: of several devices, a stream of this thread is open, or this is one of its callbacks.
            OutOfMemoryError: not even one latent frame at a time fits; the message says what would.
        """
        if torch.compiler.is_compiling():  # steps change what they work on: there is nothing to trace
            return torch.compiler.disable(self.decode)(latents, normalized, on_chunk, on_wait)
        latents = self._checked(latents, normalized)
        shape = self.output_shape(latents.shape)
        if self._group is not None and dist.get_rank(self._group):
            shape = torch.Size((shape[0], 0, *shape[2:]))
        total, done = shape[1], 0
        dtype = torch.promote_types(self.dtype, torch.float32)
        check_host_room(shape, dtype, videos=1, in_python=_STREAM)

        with self._running(self._decode_run(latents, shape), "decoded", shape, on_wait) as run:
            with host_room(shape, dtype, in_python=_STREAM):
                out = torch.empty(shape, dtype=dtype, device="cpu") if run.video is None else run.video
            # The last frames' pages would come into being when the device has nothing to do any more.
            ahead = run.video is None and self.devices[0].type == "cuda"
            with populating(out) if ahead else contextlib.nullcontext():
                for frames in self._steps(run, on_wait):
                    self._check(run)
                    newest = out[:, done : done + frames.shape[1]]
                    if run.video is None:
                        copy(newest, frames)
                    done += frames.shape[1]
                    if on_chunk:
                        on_chunk(done, total, newest)
        return out

    def decode_stream(
        self, latents: torch.Tensor, normalized: bool = False, on_wait: Callable[[], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """Like `decode`, but hands out frames as soon as they are final, and holds no whole video.

        Closing the iterator, or dropping it, ends the decode and frees its memory. Functions that torch.compile
        compiles can't iterate it; they can `decode`. The arguments are `decode`'s.

        Yields:
            ``[B, t, H, W, C]``, the frames that follow those before.

        Raises:
            LatentError, DeviceError, ClosedError, BusyError, OutOfMemoryError: as `decode` does; bad latents are
                refused at the call.
        """
        return self._own_frames(self._checked(latents, normalized), on_wait)

    def decode_to_video(
        self,
        latents: torch.Tensor | Sequence[torch.Tensor],
        path: str | Path,
        fps: float | Fraction | None = None,
        format: str | None = None,
        quality: Quality = "high",
        audio: AnyAudio | None = None,
        normalized: bool = False,
        on_chunk: OnPicture | None = None,
        on_wait: Callable[[], None] | None = None,
        vae_alpha: VAE | None = None,
        **options: Any,
    ) -> list[Path]:
        """Decodes latents to a file, of which only a few steps' frames are ever in memory.

        Frames become the format's integers on the device that decodes them, and are encoded while it decodes on; an
        encoder that is slower than the decode holds that back. What can't work is refused before the first step.

        Args:
            latents: as `decode` takes them; several are parts of one video in time, and decoded without a seam.
            path: ``.mp4``, ``.mkv``, ``.mov``, ``.webm``, pictures as ``frames/%04d.png``, or ``.safetensors``. Of
                several videos each gets a file, with ``_1``, ``_2`` before the suffix.
            fps: frames a second; None for what the model was trained at, 16 for Wan 2.1 and 24 for Wan 2.2.
            format: ``"h264"``, ``"h265"``, ``"vp9"``, ``"prores"``, ``"ffv1"``, ``"png8"`` or ``"png16"``; None for
                what the suffix usually means.
            quality: ``"low"``, ``"medium"``, ``"high"``, ``"best"``, or the encoder's CRF.
            audio: a file, or ``(samples [channels, N] in [-1, 1], rate)``; cut or filled with silence to the video's
                length.
            normalized: as `decode`'s.
            on_chunk: called as ``on_chunk(done, total, picture)`` after each step; ``picture(step=1)`` is the newest
                frame, every ``step``-th row and column of it, ``[H, W, C]`` in [0, 1]. What it raises ends the decode
                and reaches the caller.
            on_wait: as `decode`'s, and while the encoder is waited for.
            vae_alpha: a second VAE, which decodes the same latents to the frames' alpha, as the red of its own:
                Wan-Alpha's. It decodes before, so that ``done`` and ``total`` count both VAEs' frames, and what it
                makes waits beside the file on disk, a byte a pixel (two of more than 8 bits). On several devices one
                set of worker processes does both.
            options: ``metadata``, ``odd``, ``old_pictures``, ``preview`` and ``ffmpeg`` of `files.OutputSettings`.

        Returns:
            The files. Of a group's ranks only the first writes.

        Raises:
            OutputError: it can't be written so; nothing is left under a final name.
            CheckpointError: ``vae_alpha`` does not make the same frames.
            LatentError, DeviceError, ClosedError, BusyError, OutOfMemoryError: as `decode` does.
        """
        settings = output_settings(self.architecture, fps=fps, format=format, quality=quality, audio=audio, **options)
        whole = joined(latents, self.architecture)
        decode = VideoDecode(self, whole, path, settings, normalized, vae_alpha=vae_alpha, on_wait=on_wait)
        return decode.run(on_chunk=on_chunk)

    def pixel_stream(
        self,
        latents: torch.Tensor,
        pixels: PixelFormat | None,
        normalized: bool = False,
        on_wait: Callable[[], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Like `decode_stream`, but frames come as bytes ``[B, t, n]`` of a pixel format; None for floats.

        Each is valid until the next.
        """
        return self._host_stream(self._checked(latents, normalized), on_wait, pixels)

    def encode(
        self,
        frames: torch.Tensor,
        normalized: bool = False,
        on_chunk: OnChunk | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Encodes frames to latents: the mean, as ComfyUI's VAE Encode gives it.

        Frames that equal the one before them are not computed again, where their latents are known to be equal.

        Args:
            frames: ``[B, T, H, W, C]`` in [0, 1], or ``[T, H, W, C]`` for one video; any float dtype, strides and
                device. The middle is encoded of pictures whose sides are no multiple of 8 (16 for Wan 2.2), and of
                T frames as many as make whole latent frames: one, or a multiple of four more.
            normalized: apply the published mean and deviation, as the diffusion model wants it.
            on_chunk: called as ``on_chunk(done, total, latents)`` with the latent frames finished and in all, and the
                newest ``[1, z, t, h, w]``; of pictures, ``[B, 1, H, W, C]``, t of them. What it raises ends the
                encode and reaches the caller.
            on_wait: as `decode`'s.

        Returns:
            ``[B, z, 1 + (T - 1) // 4, h, w]``, float32 (float64 for float64), contiguous, on the host. Of a group's
            ranks only the first gets them, the others ``[B, z, 0, h, w]``.

        Raises:
            FrameError: the frames don't belong to this VAE, or hold NaN, or what they encode to is NaN.
            DeviceError: latents are NaN in float16.
            LatentError: ``normalized``, and no statistics were published for such latents.
            CheckpointError: the VAE has no encoder.
            ClosedError, BusyError: as `decode` does.
            OutOfMemoryError: not even one frame at a time fits; the message says what would.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self.encode)(frames, normalized, on_chunk, on_wait)
        self._check_encoder()
        frames = check_frames(frames, self.architecture).detach()
        shape = self.latent_shape(frames.shape)
        if self._group is not None and dist.get_rank(self._group):
            shape = torch.Size((*shape[:2], 0, *shape[3:]))
        if normalized:
            check_normalizable(self.architecture)
        wide = torch.promote_types(self.encode_dtype, torch.float32)
        pictures = frames.shape[1] == 1 and len(frames) > 1
        if pictures:  # of a batch go through together, as the frames of a video would
            frames, shape = frames.transpose(0, 1), torch.Size((min(shape[2], 1), shape[1], shape[0], *shape[3:]))
        with host_room(shape, wide, doing="encode"):
            out = torch.empty(shape, dtype=wide, device="cpu")
        total, done, newest_video, place = shape[0] * shape[2], 0, 0, 0
        begin = self._encode_run(TensorSource(frames, self.architecture, pictures=pictures))
        with self._running(begin, "encoded", frames.shape, on_wait) as run:
            for video, latents in self._steps(run, on_wait):
                self._check(run)
                place = place if video == newest_video else 0
                newest_video = video
                newest = out[video : video + 1, :, place : place + latents.shape[1]]
                newest[0].copy_(latents)
                place += latents.shape[1]
                done += latents.shape[1]
                if normalized:
                    newest.copy_(normalize(newest, self.architecture))
                if on_chunk:
                    on_chunk(done, total, newest)
        return out.transpose(0, 2).contiguous() if pictures else out

    def encode_stream(
        self, frames: Iterable[torch.Tensor], normalized: bool = False, on_wait: Callable[[], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """Like `encode`, for one video whose frames come one after the other; no more than a step's are ever held.

        Closing the iterator, or dropping it, ends the encode and frees its memory.

        Args:
            frames: ``[t, H, W, C]`` each (or ``[1, t, H, W, C]``), of one size, as `encode` takes them.
            normalized: as `encode`'s.
            on_wait: as `encode`'s.

        Yields:
            ``[1, z, t, h, w]``, the latents that follow those before.

        Raises:
            FrameError, DeviceError, CheckpointError, ClosedError, BusyError, OutOfMemoryError: as `encode` does; a
                stream can't be read again, so that memory that turns out too short in the middle is an error.
        """
        self._check_encoder()
        if normalized:
            check_normalizable(self.architecture)
        if isinstance(frames, (str, bytes, torch.Tensor)) or not isinstance(frames, Iterable):
            raise FrameError(
                f"frames are of the type {type(frames).__name__}; they must be an iterable of tensors [t, H, W, C]",
                "give [frames], or vae.encode(frames)" if isinstance(frames, torch.Tensor) else "",
            )
        return self._encoded(iter(frames), normalized, on_wait)

    def _encoded(
        self, frames: Iterator[torch.Tensor], normalized: bool, on_wait: Callable[[], None] | None
    ) -> Iterator[torch.Tensor]:
        alike: tuple[torch.Size, torch.dtype] | None = None

        def parts() -> Iterator[torch.Tensor]:
            nonlocal alike
            for part in frames:
                if isinstance(part, torch.Tensor) and part.dim() in (4, 5) and not part.shape[part.dim() - 4]:
                    continue  # of no frames
                checked = check_part(part, self.architecture).detach()
                # As they were given: what is cut off would hide a jump.
                alike = alike or (part.shape[-3:], part.dtype)
                if (part.shape[-3:], part.dtype) != alike:
                    raise FrameError(
                        f"frames of a video must have one size and dtype: these are {tuple(part.shape[-3:])} in "
                        f"{part.dtype}, and those before {tuple(alike[0])} in {alike[1]}"
                    )
                yield checked

        given = parts()
        first = next(given, None)
        if first is None:
            raise FrameError("there are no frames to encode; the video is empty")
        check_length(len(first), self.architecture)
        shape = [1, *first.shape]  # so far

        def others() -> Iterator[torch.Tensor]:
            for part in given:
                shape[1] += len(part)
                check_length(shape[1], self.architecture)
                yield part

        begin = self._encode_run(StreamSource(first, others(), self.architecture))
        del first
        with self._running(begin, "encoded", shape, on_wait) as run:
            for _, latents in self._steps(run, on_wait):
                self._check(run)
                own = latents.clone()[None]
                yield normalize(own, self.architecture) if normalized else own

    def latent_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, z, 1 + (T - 1) // 4, h, w]`` of the latents that frames of ``shape`` ``[B, T, H, W, C]`` encode to.

        Of ``[T, H, W, C]`` B is 1.

        Raises:
            FrameError: it is no such shape, or too small for a latent voxel.
        """
        shape = frames_shape(shape, self.architecture)
        batch, frames, height, width = shape[:4]
        latent_frames = self.architecture.latent_frames(self.architecture.encoded_frames(frames))
        rows, columns = self.architecture.latent_size(height, width)
        return torch.Size((batch, self.architecture.z_dim, latent_frames, rows, columns))

    def output_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, 4 * (T - 1) + 1, H, W, C]`` of the frames that latents of ``shape`` ``[B, z, T, h, w]`` decode to.

        Of ``[B, z, h, w]`` T is 1.

        Raises:
            LatentError: it is no such shape.
        """
        batch, _, frames, rows, columns = latents_shape(shape)
        height, width = self.architecture.frame_size(rows, columns)
        return torch.Size(
            (batch, self.architecture.frame_count(frames), height, width, self.architecture.output_channels)
        )

    def _decode_run(
        self, latents: torch.Tensor, shape: torch.Size, pixels: PixelFormat | None = None
    ) -> Callable[[], DecodeRun]:
        return lambda: self._engine.run(latents, shape, self._chunk_number, pixels)

    def _encode_run(self, source: Source) -> Callable[[], EncodeRun]:
        return lambda: self._engine.encode(source, self._chunk_number)

    def _checked(self, latents: torch.Tensor, normalized: bool) -> torch.Tensor:
        if self._closed:
            raise ClosedError("this VAE is closed; load it again")
        latents = ordered_latents(latents, self.architecture).detach()
        largest = largest_value(latents)
        if normalized:
            latents = denormalize(latents, self.architecture)
            largest = largest_value(latents)
        check_fits(largest, self.dtype)
        return latents

    def _own_frames(self, latents: torch.Tensor, on_wait: Callable[[], None] | None) -> Iterator[torch.Tensor]:
        # Some versions of Python keep what a generator holds that was closed where it handles no exception.
        with contextlib.closing(self._host_stream(latents, on_wait)) as stream:
            for frames in stream:
                # The caller's own: the buffer is used again, and tensors of inference mode can't be written to
                # outside it.
                with host_room(frames.shape, frames.dtype):
                    own = torch.empty_like(frames, memory_format=torch.contiguous_format)
                    copy(own, frames)
                del frames
                yield own
                del own

    def _host_stream(
        self, latents: torch.Tensor, on_wait: Callable[[], None] | None, pixels: PixelFormat | None = None
    ) -> Generator[torch.Tensor, None, None]:
        shape = self.output_shape(latents.shape)
        with self._running(self._decode_run(latents, shape, pixels), "decoded", shape, on_wait) as run:
            done = 0
            for frames in self._steps(run, on_wait):
                self._check(run)
                yield frames
                done += frames.shape[1]
                if isinstance(run, PoolRun):
                    run.discard(done)
