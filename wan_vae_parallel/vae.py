"""The VAE that users hold: load it, decode and encode with it, close it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import CheckpointError, ClosedError, FrameError
from .files.checkpoint import Checkpoint, checkpoint_from_state_dict
from .files.kinds import user_path
from .files.latents import check_fits, check_latents, check_normalizable, denormalize, normalize
from .files.locate import ANOTHER
from .files.weights import FileWeights
from .frames import check_frames, check_length, check_part
from .memory import check_host_room, host_room
from .runtime.source import Source, StreamSource, TensorSource
from .session import IDLE_SECONDS, Chunk, DecodeRun, Devices, EncodeRun, Session
from .workers.run import PoolRun
from .workers.shared_memory import populating

OnChunk = Callable[[int, int, torch.Tensor], None]

_STREAM = "take the frames from decode_stream"


def load_vae(
    path: str | Path,
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
    idle_seconds: float = IDLE_SECONDS,
    group: dist.ProcessGroup | None = None,
    predecessor: VAE | None = None,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Loads a Wan VAE.

    The file is checked now, and its weights are read when a decode wants them. It must be the same file then: one that
    was replaced or written to meanwhile is an error.

    Args:
        path: a safetensors file in Wan's original or diffusers' key layout, one of its shards or their index, or a
            folder in diffusers' format, the VAE's or the whole pipeline's. ``~`` is the home folder.
        devices: ``"auto"`` (all CUDA devices, else the CPU), ``"cpu"``, ``"cuda:0"``, or several with commas between
            them, ``"cuda:0,cuda:1"``: one video is then decoded by all of them, each with a worker process.
        dtype: ``"auto"`` (bf16 on GPUs that have it, fp32 on the CPU), ``"float32"``, ``"bfloat16"``,
            ``"float16"`` or ``"float64"``.
        chunk: frames that a layer works on at once, or ``"auto"``: latent frames of a decode, pictures of an encode. It
            trades memory for speed, and changes neither pixels nor latents.
        idle_seconds: workers that had no decode for so long since their last one end; the next decode starts new ones.
        group: decode in this process group instead, with its ranks as workers, which may be on several machines.
            Each rank makes the same calls; ``devices`` is its own one. The frames come to the group's first rank:
            on the others `VAE.decode` returns none and `VAE.decode_stream` yields nothing.
        predecessor: a VAE on the same devices that is not needed any more; its worker processes become this one's.
        encode_dtype: like ``dtype``, for encodes alone; ``"auto"`` is the same as ``dtype``.

    Raises:
        CheckpointError: the file is not a Wan VAE that can be decoded with.
        DeviceError: a device or dtype that is not there.
    """
    path = user_path(path, CheckpointError, another=ANOTHER).absolute()
    return VAE(
        FileWeights(path), devices=devices, dtype=dtype, chunk=chunk, idle_seconds=idle_seconds, group=group,
        predecessor=predecessor, encode_dtype=encode_dtype,
    )  # fmt: skip


def vae_from_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
    *,
    name: str = "the state dict",
    idle_seconds: float = IDLE_SECONDS,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Like `load_vae`, from tensors that are loaded already; ``name`` is what errors call them.

    The tensors are not copied before they go to a device: leave them as they are while the VAE is in use.
    """
    checkpoint = checkpoint_from_state_dict(state_dict, source=name)

    def weights() -> Checkpoint:
        return checkpoint

    return VAE(weights, devices=devices, dtype=dtype, chunk=chunk, idle_seconds=idle_seconds, encode_dtype=encode_dtype)


class VAE(Session):
    """A Wan VAE, ready to decode and encode; make it with `load_vae`.

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
                measured, or workers decode. What it raises ends the decode and reaches the caller.

        Returns:
            ``[B, 4 * (T - 1) + 1, H, W, C]`` in [0, 1], float32 (float64 for a float64 VAE), contiguous, on the
            host. Of a group's ranks only the first gets them, the others ``[B, 0, H, W, C]``.

        Raises:
            LatentError: the latents don't belong to this VAE, or hold NaN.
            ClosedError: the VAE is closed, or is closed meanwhile.
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
                        newest.copy_(frames)
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
            LatentError, ClosedError, OutOfMemoryError: as `decode` does; bad latents are refused at the call.
        """
        return self._host_stream(self._checked(latents, normalized), on_wait)

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
            FrameError: the frames don't belong to this VAE, or hold NaN.
            LatentError: ``normalized``, and no statistics were published for such latents.
            CheckpointError: the VAE has no encoder.
            ClosedError: the VAE is closed, or is closed meanwhile.
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
            FrameError, CheckpointError, ClosedError, OutOfMemoryError: as `encode` does; a stream can't be read
                again, so that memory that turns out too short in the middle is an error.
        """
        self._check_encoder()
        if normalized:
            check_normalizable(self.architecture)
        if not isinstance(frames, Iterable):
            raise FrameError(f"frames are a {type(frames).__name__}; they must be an iterable of tensors [t, H, W, C]")
        return self._encoded(iter(frames), normalized, on_wait)

    def _encoded(
        self, frames: Iterator[torch.Tensor], normalized: bool, on_wait: Callable[[], None] | None
    ) -> Iterator[torch.Tensor]:
        def parts() -> Iterator[torch.Tensor]:
            for part in frames:
                if isinstance(part, torch.Tensor) and part.dim() in (4, 5) and not part.shape[part.dim() - 4]:
                    continue  # of no frames
                yield check_part(part, self.architecture).detach()

        given = parts()
        first = next(given, None)
        if first is None:
            raise FrameError("there are no frames to encode; the video is empty")
        size, dtype = first.shape[1:], first.dtype
        check_length(len(first), self.architecture)
        shape = [1, *first.shape]  # so far

        def others() -> Iterator[torch.Tensor]:
            for part in given:
                if part.shape[1:] != size or part.dtype != dtype:
                    raise FrameError(
                        f"frames of a video must have one size and dtype: these are {tuple(part.shape[1:])} in "
                        f"{part.dtype}, and those before {tuple(size)} in {dtype}"
                    )
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
        """``[B, z, 1 + (T - 1) // 4, h, w]`` of the latents that frames of ``shape`` ``[B, T, H, W, C]`` encode to."""
        batch, frames, height, width = shape[:4]
        latent_frames = self.architecture.latent_frames(self.architecture.encoded_frames(frames))
        rows, columns = self.architecture.latent_size(height, width)
        return torch.Size((batch, self.architecture.z_dim, latent_frames, rows, columns))

    def output_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, 4 * (T - 1) + 1, H, W, C]`` of the frames that latents of ``shape`` ``[B, z, T, h, w]`` decode to."""
        batch, _, frames, rows, columns = shape
        height, width = self.architecture.frame_size(rows, columns)
        return torch.Size(
            (batch, self.architecture.frame_count(frames), height, width, self.architecture.output_channels)
        )

    def _decode_run(self, latents: torch.Tensor, shape: torch.Size) -> Callable[[], DecodeRun]:
        return lambda: self._engine.run(latents, shape, self._chunk_number)

    def _encode_run(self, source: Source) -> Callable[[], EncodeRun]:
        return lambda: self._engine.encode(source, self._chunk_number)

    def _checked(self, latents: torch.Tensor, normalized: bool) -> torch.Tensor:
        if self._closed:
            raise ClosedError("this VAE is closed; load it again")
        latents = check_latents(latents, self.architecture).detach()
        if normalized:
            latents = denormalize(latents, self.architecture)
        check_fits(latents, self.dtype)
        return latents

    def _host_stream(self, latents: torch.Tensor, on_wait: Callable[[], None] | None) -> Iterator[torch.Tensor]:
        shape = self.output_shape(latents.shape)
        with self._running(self._decode_run(latents, shape), "decoded", shape, on_wait) as run:
            done = 0
            for frames in self._steps(run, on_wait):
                self._check(run)
                # The caller's own: the buffer is used again, and tensors of inference mode can't be written to
                # outside it.
                with host_room(frames.shape, frames.dtype):
                    own = frames.clone()
                yield own
                del own
                done += frames.shape[1]
                if isinstance(run, PoolRun):
                    run.discard(done)
