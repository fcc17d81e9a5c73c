"""The VAE that users hold: load it, decode and encode with it, close it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from .architecture import Architecture
from .cancel import cancellable
from .devices import parse_devices, parse_dtype, parse_rank_device
from .errors import ArgumentError, CheckpointError, ClosedError, FrameError, WanVAEError, WorkerError
from .files.checkpoint import Checkpoint, checkpoint_from_state_dict
from .files.latents import check_fits, check_latents, denormalize, normalize
from .files.weights import FileWeights, SameWeights
from .frames import check_frames, check_part
from .memory import UNLIMITED, check_host_room, decode_memory, host_room, largest_chunk, parameter_count
from .ops.dispatch import kernels_expected
from .parallel.plan import plan_shards
from .runtime.encode_run import LocalEncodeRun
from .runtime.engine import LocalEngine, LocalRun
from .runtime.group import GroupEncodeRun, GroupEngine, GroupRun
from .runtime.source import Source, StreamSource, TensorSource
from .workers.encode_run import PoolEncodeRun
from .workers.pool import WORKER_BYTES, WorkerPool
from .workers.run import PoolRun
from .workers.shared_memory import populating

logger = logging.getLogger(__name__)

OnChunk = Callable[[int, int, torch.Tensor], None]
Devices = str | torch.device | Sequence[str | torch.device]
Chunk = int | Literal["auto"]
DecodeRun = LocalRun | PoolRun | GroupRun
EncodeRun = LocalEncodeRun | PoolEncodeRun | GroupEncodeRun
AnyRun = TypeVar("AnyRun", LocalRun | PoolRun | GroupRun, LocalEncodeRun | PoolEncodeRun | GroupEncodeRun)

_IDLE_SECONDS = 600.0
# What a decode found, for the log.
_FOUND = {"ready": "warm", "parked": "after giving memory back"}
_CLOSED_MEANWHILE = "this VAE was closed while it decoded; load it again"
_STREAM = "take the frames from decode_stream"


def load_vae(
    path: str | Path,
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
    idle_seconds: float = _IDLE_SECONDS,
    group: dist.ProcessGroup | None = None,
    predecessor: VAE | None = None,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Loads a Wan VAE.

    The file is checked now, and its weights are read when a decode wants them. It must be the same file then: one that
    was replaced or written to meanwhile is an error.

    Args:
        path: a safetensors file in Wan's original or diffusers' key layout, or a diffusers VAE folder.
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
    path = Path(path).absolute()
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
    idle_seconds: float = _IDLE_SECONDS,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Like `load_vae`, from tensors that are loaded already; ``name`` is what errors call them.

    The tensors are not copied before they go to a device: leave them as they are while the VAE is in use.
    """
    checkpoint = checkpoint_from_state_dict(state_dict, source=name)

    def weights() -> Checkpoint:
        return checkpoint

    return VAE(weights, devices=devices, dtype=dtype, chunk=chunk, idle_seconds=idle_seconds, encode_dtype=encode_dtype)


class VAE:
    """A Wan VAE, ready to decode and encode; make it with `load_vae`.

    A context manager: leaving it closes it. Several threads may decode and encode with it; on several devices they
    wait for one another.

    Attributes:
        architecture: what the weights are.
        devices: where this process, or its workers, decode and encode.
        dtype: what it decodes in.
        encode_dtype: what it encodes in.
    """

    def __init__(
        self,
        weights: Callable[[], Checkpoint],
        *,
        devices: Devices,
        dtype: str | torch.dtype,
        chunk: Chunk,
        idle_seconds: float = _IDLE_SECONDS,
        group: dist.ProcessGroup | None = None,
        predecessor: VAE | None = None,
        encode_dtype: str | torch.dtype = "auto",
    ) -> None:
        self.devices = tuple(parse_devices(devices) if group is None else [parse_rank_device(devices, group)])
        self.dtype = parse_dtype(dtype, self.devices[0])
        same = isinstance(encode_dtype, str) and encode_dtype.strip().lower() == "auto"
        self.encode_dtype = self.dtype if same else parse_dtype(encode_dtype, self.devices[0])
        self.chunk = chunk
        if not isinstance(idle_seconds, (int, float)) or isinstance(idle_seconds, bool) or not idle_seconds >= 0:
            raise ArgumentError(
                f"idle_seconds is {idle_seconds!r}; it must be a number of seconds from 0 on, or math.inf for never"
            )
        self._closed = False
        # The engine gets these and not the VAE: a VAE that is dropped takes its workers along.
        unchanged = SameWeights(weights)
        self.architecture: Architecture = unchanged.architecture
        self._engine: LocalEngine | WorkerPool | GroupEngine
        self._group = group
        if group is not None:
            self._engine = GroupEngine(unchanged, self.devices[0], self.dtype, self.encode_dtype, group)
        elif len(self.devices) == 1:
            self._engine = LocalEngine(unchanged, self.devices[0], self.dtype, self.encode_dtype)
        else:
            self._engine = WorkerPool(unchanged, self.devices, self.dtype, self.encode_dtype, idle_seconds=idle_seconds)
            try:
                if predecessor is not None and isinstance(predecessor._engine, WorkerPool):
                    self._engine.take_over(predecessor._engine)
                self._engine.prepare()
            except WorkerError as error:
                logger.debug("%s", error)  # a decode will try again, and say so

    @property
    def chunk(self) -> Chunk:
        """Frames that a layer works on at once, or ``"auto"``; setting it takes effect at the next call."""
        return self._chunk

    @chunk.setter
    def chunk(self, chunk: Chunk) -> None:
        if chunk != "auto" and (isinstance(chunk, (bool, str)) or not hasattr(chunk, "__index__") or int(chunk) < 1):
            raise ArgumentError(f"chunk is {chunk!r}; it must be 'auto' or a whole number of frames, at least 1")
        self._chunk: Chunk = chunk

    def __enter__(self) -> VAE:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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

        with self._cancellable(on_wait), self._running(self._decode_run(latents, shape), "decoded", shape) as run:
            with host_room(shape, dtype, in_python=_STREAM):
                out = torch.empty(shape, dtype=dtype, device="cpu") if run.video is None else run.video
            # The last frames' pages would come into being when the device has nothing to do any more.
            ahead = run.video is None and self.devices[0].type == "cuda"
            with populating(out) if ahead else contextlib.nullcontext():
                for frames in run:
                    self._check(run)
                    newest = out[:, done : done + frames.shape[1]]
                    if run.video is None:
                        newest.copy_(frames)
                    done += frames.shape[1]
                    if on_chunk:
                        on_chunk(done, total, newest)
        return out

    def decode_stream(self, latents: torch.Tensor, normalized: bool = False) -> Iterator[torch.Tensor]:
        """Like `decode`, but hands out frames as soon as they are final, and holds no whole video.

        Closing the iterator, or dropping it, ends the decode and frees its memory. Functions that torch.compile
        compiles can't iterate it; they can `decode`.

        Yields:
            ``[B, t, H, W, C]``, the frames that follow those before.

        Raises:
            LatentError, ClosedError, OutOfMemoryError: as `decode` does; bad latents are refused at the call.
        """
        return self._host_stream(self._checked(latents, normalized))

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
                newest ``[1, z, t, h, w]``. What it raises ends the encode and reaches the caller.
            on_wait: as `decode`'s.

        Returns:
            ``[B, z, 1 + (T - 1) // 4, h, w]``, float32 (float64 for float64), contiguous, on the host. Of a group's
            ranks only the first gets them, the others ``[B, z, 0, h, w]``.

        Raises:
            FrameError: the frames don't belong to this VAE, or hold NaN.
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
        out = torch.empty(shape, dtype=torch.promote_types(self.encode_dtype, torch.float32), device="cpu")
        total, done, newest_video, place = shape[0] * shape[2], 0, 0, 0
        begin = self._encode_run(TensorSource(frames, self.architecture))
        with self._cancellable(on_wait), self._running(begin, "encoded", frames.shape) as run:
            for video, latents in run:
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
        return out

    def encode_stream(self, frames: Iterable[torch.Tensor], normalized: bool = False) -> Iterator[torch.Tensor]:
        """Like `encode`, for one video whose frames come one after the other; no more than a step's are ever held.

        Closing the iterator, or dropping it, ends the encode and frees its memory.

        Args:
            frames: ``[t, H, W, C]`` each (or ``[1, t, H, W, C]``), of one size, as `encode` takes them.
            normalized: as `encode`'s.

        Yields:
            ``[1, z, t, h, w]``, the latents that follow those before.

        Raises:
            FrameError, CheckpointError, ClosedError, OutOfMemoryError: as `encode` does; a stream can't be read
                again, so that memory that turns out too short in the middle is an error.
        """
        self._check_encoder()
        return self._encoded(iter(frames), normalized)

    def _encoded(self, frames: Iterator[torch.Tensor], normalized: bool) -> Iterator[torch.Tensor]:
        def checked(part: torch.Tensor) -> torch.Tensor:
            return check_part(part, self.architecture).detach()

        first = next(frames, None)
        if first is None:
            raise FrameError("there are no frames to encode; the video is empty")
        first = checked(first)
        shape = [1, *first.shape]

        def others() -> Iterator[torch.Tensor]:
            for part in frames:
                part = checked(part)
                if part.shape[1:] != first.shape[1:]:
                    raise FrameError(
                        f"frames of a video must have one size: these have {tuple(part.shape[1:])}, and those before "
                        f"{tuple(first.shape[1:])}"
                    )
                shape[1] += len(part)
                yield part

        begin = self._encode_run(StreamSource(first, others(), self.architecture))
        with self._running(begin, "encoded", shape) as run:
            for _, latents in run:
                self._check(run)
                own = latents.clone()[None]
                yield normalize(own, self.architecture) if normalized else own

    def latent_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, z, 1 + (T - 1) // 4, h, w]`` of the latents that frames of ``shape`` ``[B, T, H, W, C]`` encode to."""
        batch, frames, height, width = shape[:4]
        ratio = self.architecture.spatial_ratio
        latent_frames = self.architecture.latent_frames(self.architecture.encoded_frames(frames))
        return torch.Size((batch, self.architecture.z_dim, latent_frames, height // ratio, width // ratio))

    def output_shape(self, shape: Sequence[int]) -> torch.Size:
        """``[B, 4 * (T - 1) + 1, H, W, C]`` of the frames that latents of ``shape`` ``[B, z, T, h, w]`` decode to."""
        batch, _, frames, rows, columns = shape
        height, width = self.architecture.frame_size(rows, columns)
        return torch.Size(
            (batch, self.architecture.frame_count(frames), height, width, self.architecture.output_channels)
        )

    @property
    def device_names(self) -> tuple[str, ...]:
        """Names of all devices that work together; of a group's, with their hosts."""
        return self._engine.names if isinstance(self._engine, GroupEngine) else tuple(map(str, self.devices))

    def memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that decoding latents of ``shape`` ``[B, z, T, h, w]`` takes on each device, weights included.

        It is what free devices would be used with; ``chunk="auto"`` makes do with less where there is less.
        """
        batch, _, frames, rows, columns = shape
        size = (batch, frames, rows, columns)
        if len(self.device_names) > 1:
            plan = plan_shards(rows, columns, len(self.device_names))
            size = (batch, frames, min(plan.tallest + 2, plan.rows), plan.columns)
        kernels = kernels_expected(self.devices[0], self.dtype)
        chunk = self._chunk_number or largest_chunk(
            self.architecture,
            size,
            dtype=self.dtype,
            free=UNLIMITED,
            kernels=kernels,
            device_type=self.devices[0].type,
        )
        return decode_memory(self.architecture, size, chunk=chunk, dtype=self.dtype, kernels=kernels).total

    def release(self) -> None:
        """Gives the devices' memory back, and ends workers; the next decode loads the weights again."""
        self._engine.close()

    def park(self) -> bool:
        """Gives the devices' memory back and keeps workers' processes, so that the next decode needs not start them.

        On one device it does what `release` does.

        Returns:
            Whether the memory is back; workers keep it for a decode that is under way in another thread.
        """
        if isinstance(self._engine, WorkerPool):
            return self._engine.park()
        self._engine.close()
        return True

    @property
    def memory_held(self) -> int:
        """Bytes on each device that `park` would give back."""
        if isinstance(self._engine, WorkerPool) and self._engine.stage != "loading":
            return self._engine.held
        return self.weights_size if self._engine.running else 0

    @property
    def memory_to_start(self) -> int:
        """Bytes that worker processes will take on each device beside what `memory_needed` tells."""
        return WORKER_BYTES if isinstance(self._engine, WorkerPool) and self._engine.stage != "ready" else 0

    @property
    def weights_size(self) -> int:
        """Bytes of the weights on each device."""
        return parameter_count(self.architecture) * self.dtype.itemsize

    @property
    def loaded(self) -> bool:
        """Whether the weights are on the devices now."""
        return self._engine.running

    def close(self) -> None:
        """Gives everything back; decoding is an error afterwards. Frames that were decoded stay."""
        self._closed = True  # before workers end: who waited for them must not start new ones
        self.release()

    @property
    def _chunk_number(self) -> int:
        return 0 if self._chunk == "auto" else int(self._chunk)

    def _decode_run(self, latents: torch.Tensor, shape: torch.Size) -> Callable[[], DecodeRun]:
        return lambda: self._engine.run(latents, shape, self._chunk_number)

    def _encode_run(self, source: Source) -> Callable[[], EncodeRun]:
        return lambda: self._engine.encode(source, self._chunk_number)

    @contextlib.contextmanager
    def _cancellable(self, on_wait: Callable[[], None] | None) -> Iterator[None]:
        def check() -> None:
            self._check_open()
            if on_wait:
                on_wait()

        with cancellable(check):
            yield

    @contextlib.contextmanager
    def _running(self, begin: Callable[[], AnyRun], did: str, shape: Sequence[int]) -> Iterator[AnyRun]:
        """Within it a run goes on; what it did with frames of ``shape`` ``[B, T, H, W, C]`` in the end is logged."""
        started = time.monotonic()
        try:
            with contextlib.closing(begin()) as run:
                self._check(run)  # it may have waited for others
                yield run
        except WorkerError as error:
            if self._closed:  # which has ended the workers
                raise ClosedError(_CLOSED_MEANWHILE) from error
            raise
        finally:
            if self._closed:  # meanwhile, by another thread or a callback
                self._engine.close()
        if self._group is None or dist.get_rank(self._group) == 0:
            batch = f"{shape[0]} times " if shape[0] > 1 else ""
            dtype = self.encode_dtype if did == "encoded" else self.dtype
            logger.info(
                "%s %s%d frames of %dx%d on %s, in %s, chunk %d, in %.2f s (%s)",
                did, batch, shape[1], shape[3], shape[2], run.where, str(dtype).removeprefix("torch."), run.chunk,
                time.monotonic() - started, _FOUND.get(run.found, "first"),
            )  # fmt: skip

    def __reduce__(self) -> NoReturn:
        raise TypeError("a VAE holds devices and processes, so it can't be copied or pickled; load it where it is used")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(_CLOSED_MEANWHILE)

    def _checked(self, latents: torch.Tensor, normalized: bool) -> torch.Tensor:
        if self._closed:
            raise ClosedError("this VAE is closed; load it again")
        latents = check_latents(latents, self.architecture).detach()
        if normalized:
            latents = denormalize(latents, self.architecture)
        check_fits(latents, self.dtype)
        return latents

    def _check_encoder(self) -> None:
        if self._closed:
            raise ClosedError("this VAE is closed; load it again")
        if self.architecture.encoder_width is None:
            raise CheckpointError(
                "this VAE's weights have no encoder, so it can only decode; take the whole VAE's file to encode"
            )

    def _check(self, run: DecodeRun | EncodeRun) -> None:
        self._check_open()
        if not run.finite:
            raise WanVAEError(_why_nan(self.encode_dtype if isinstance(run, EncodeRun) else self.dtype))

    def _host_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        shape = self.output_shape(latents.shape)
        with self._running(self._decode_run(latents, shape), "decoded", shape) as run:
            done = 0
            for frames in run:
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


def _why_nan(dtype: torch.dtype) -> str:
    """What NaN in frames computed in ``dtype`` comes of, and what to do."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            f"the results are NaN: in {name} the activations overflow, or the weights are damaged; try dtype bfloat16 "
            f"or float32, or fetch the VAE again"
        )
    # The others reach as far as float32, or farther.
    return (
        f"the results are NaN, and {name} does not overflow with sound weights and latents: the weights are damaged, "
        f"or the latents far too large; fetch the VAE again, or look at how the latents were made"
    )
