"""What a VAE holds: its engine, its memory, and how a decode or an encode goes on with it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from .architecture import Architecture
from .cancel import cancellable
from .devices import parse_devices, parse_dtype, parse_rank_device
from .errors import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    DeviceError,
    FrameError,
    LatentError,
    WorkerError,
)
from .files.checkpoint import Checkpoint, not_finite
from .files.key_layouts import listed
from .files.latents import latents_shape
from .files.weights import SameWeights
from .frames import frames_shape
from .memory import (
    UNLIMITED,
    decode_memory,
    encode_memory,
    encoder_parameter_count,
    largest_chunk,
    largest_encode_chunk,
    most_encoded_at_once,
    parameter_count,
)
from .parallel.plan import plan_shards
from .runtime.encode_run import LocalEncodeRun
from .runtime.engine import LocalEngine, LocalRun
from .runtime.group import GroupEncodeRun, GroupEngine, GroupRun
from .runtime.tuning import decode_kernels_planned, encode_kernels_planned
from .workers.encode_run import PoolEncodeRun
from .workers.meanwhile import MeanwhileRun
from .workers.pool import WorkerPool
from .workers.protocol import WORKER_BYTES
from .workers.run import PoolRun

logger = logging.getLogger(__name__)

Devices = str | torch.device | Sequence[str | torch.device]
Chunk = int | Literal["auto"]
DecodeRun = LocalRun | PoolRun | MeanwhileRun | GroupRun
EncodeRun = LocalEncodeRun | PoolEncodeRun | GroupEncodeRun
Step = TypeVar("Step")
AnyRun = TypeVar("AnyRun", DecodeRun, LocalEncodeRun | PoolEncodeRun | GroupEncodeRun)
Own = TypeVar("Own", bound="Session")

IDLE_SECONDS = 600.0
# What a decode or an encode found, for the log.
_FOUND = {"ready": "warm", "parked": "after giving memory back"}
_CLOSED_MEANWHILE = "this VAE was closed while it worked; load it again"


class Session:
    """A VAE's weights, devices, memory and processes.

    A context manager: leaving it closes it.

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
        idle_seconds: float = IDLE_SECONDS,
        group: dist.ProcessGroup | None = None,
        predecessor: Session | None = None,
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
        unchanged = self._weights = SameWeights(weights)
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

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group whose ranks work together, if one does."""
        return self._group

    @property
    def device_names(self) -> tuple[str, ...]:
        """Names of all devices that work together; of a group's, with their hosts."""
        return self._engine.names if isinstance(self._engine, GroupEngine) else tuple(map(str, self.devices))

    def memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that decoding latents of ``shape`` ``[B, z, T, h, w]`` takes on each device, weights included.

        It is what free devices would be used with; ``chunk="auto"`` makes do with less where there is less. A decode
        that begins while worker processes start may take more of the first device, if that is free.

        Raises:
            LatentError: it is no shape of latents.
        """
        batch, _, frames, rows, columns = latents_shape(shape)
        size = (batch, frames, rows, columns)
        if len(self.device_names) > 1:
            plan = plan_shards(rows, columns, len(self.device_names))
            size = (batch, frames, min(plan.tallest + 2, plan.rows), plan.columns)
        kernels = decode_kernels_planned(self.architecture, self.devices, self.dtype)
        chunk = self._chunk_number or largest_chunk(
            self.architecture,
            size,
            dtype=self.dtype,
            free=UNLIMITED,
            kernels=kernels,
            device_type=self.devices[0].type,
        )
        return decode_memory(self.architecture, size, chunk=chunk, dtype=self.dtype, kernels=kernels).total

    def encode_memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that encoding frames of ``shape`` ``[B, T, H, W, C]`` takes on each device, weights included.

        Videos are encoded one after the other, so that B does not matter; pictures, of one frame each, go several
        together. Otherwise as `memory_needed`.

        Raises:
            CheckpointError: the VAE has no encoder.
            FrameError: it is no shape of frames, or pictures are smaller than a latent voxel.
        """
        self._check_encoder()
        shape = frames_shape(shape, self.architecture)
        frames = self.architecture.encoded_frames(shape[1])
        image = frames == 1
        frames = shape[0] if image else frames
        rows, columns = self.architecture.latent_size(*shape[2:4])
        size = (rows, columns)
        if len(self.device_names) > 1:
            plan = plan_shards(rows, columns, len(self.device_names))
            size = (min(plan.tallest + 1, plan.rows), plan.columns)
        kernels = encode_kernels_planned(self.architecture, self.devices, self.encode_dtype)
        chunk = self._chunk_number or largest_encode_chunk(
            self.architecture,
            size,
            frames=frames,
            image=image,
            dtype=self.encode_dtype,
            free=UNLIMITED,
            kernels=kernels,
            device_type=self.devices[0].type,
        )
        needed = encode_memory(
            self.architecture,
            size,
            chunk=min(chunk, most_encoded_at_once(frames, image=image)),
            image=image,
            dtype=self.encode_dtype,
            kernels=kernels,
        )
        return needed.total

    def take_over(self, other: Session) -> None:
        """Goes on with ``other``'s worker processes, which `other` will start anew if it wants some.

        They keep ``other``'s weights beside this VAE's: two that take turns load each once.

        Nothing happens unless both have the same several devices, ``other``'s workers are there and idle, and none of
        this VAE's are in use.
        """
        mine, theirs = self._engine, other._engine
        if not isinstance(mine, WorkerPool) or not isinstance(theirs, WorkerPool) or mine is theirs:
            return
        if mine.devices == theirs.devices and not mine.running and theirs.stage in ("loading", "ready", "parked"):
            mine.stop(grace=0.0)
            mine.take_over(theirs, keep=True)

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
    def worked_on(self) -> tuple[torch.device, ...]:
        """The devices of the last decode or encode: one alone, where that ended before workers had started."""
        return self._engine.worked_on if isinstance(self._engine, WorkerPool) else self.devices

    @property
    def memory_held(self) -> int:
        """Bytes on each device that `park` would give back."""
        if isinstance(self._engine, WorkerPool):
            self._engine.settle()
            if self._engine.stage == "ready":
                return self._engine.held
        return self.weights_size if self._engine.running else 0

    @property
    def memory_to_start(self) -> int:
        """Bytes that worker processes will take on each device beside what `memory_needed` tells."""
        if not isinstance(self._engine, WorkerPool):
            return 0
        self._engine.settle()
        return 0 if self._engine.stage == "ready" else WORKER_BYTES

    @property
    def weights_size(self) -> int:
        """Bytes of the weights that are on each device now; while none are, of the decoder's."""
        return sum(map(self.part_size, self.loaded_parts or ("decoder",)))

    def part_size(self, part: str) -> int:
        """Bytes of the weights of ``"decoder"`` or ``"encoder"`` on each device; 0 of an encoder that is not there."""
        if part == "decoder":
            return parameter_count(self.architecture) * self.dtype.itemsize
        if self.architecture.encoder_width is None:
            return 0
        return encoder_parameter_count(self.architecture) * self.encode_dtype.itemsize

    @property
    def loaded_parts(self) -> frozenset[str]:
        """Of ``"decoder"`` and ``"encoder"`` those whose weights are on the devices now."""
        return self._engine.parts

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

    def _cancellable(self, on_wait: Callable[[], None] | None) -> cancellable:
        def check() -> None:
            self._check_open()
            if on_wait:
                on_wait()

        return cancellable(check)

    def _steps(self, run: Iterable[Step], on_wait: Callable[[], None] | None) -> Iterator[Step]:
        """What ``run`` yields; it can be cancelled while it works, and not while the caller does."""
        steps = iter(run)
        while True:
            with self._cancellable(on_wait):
                step = next(steps, None)
            if step is None:
                return
            yield step

    @contextlib.contextmanager
    def _running(
        self, begin: Callable[[], AnyRun], did: str, shape: Sequence[int], on_wait: Callable[[], None] | None
    ) -> Iterator[AnyRun]:
        """Within it a run goes on; what it did with frames of ``shape`` ``[B, T, H, W, C]`` is logged."""
        started = time.monotonic()
        try:
            with self._cancellable(on_wait):
                run = begin()
            with contextlib.closing(run):
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

    def _check_encoder(self) -> None:
        if self._closed:
            raise ClosedError("this VAE is closed; load it again")
        if self.architecture.encoder_width is None:
            source = self._weights.source
            raise CheckpointError(
                f"{source} has no encoder, so that this VAE can only decode; encode with the whole Wan VAE"
            )

    def _check(self, run: DecodeRun | EncodeRun) -> None:
        self._check_open()
        if not run.finite:
            decoded = isinstance(run, DecodeRun)
            results, inputs = ("frames", "latents") if decoded else ("latents", "frames")
            checkpoint = self._weights()
            if damaged := not_finite(checkpoint.decoder if decoded else checkpoint.encoder):
                raise CheckpointError(
                    f"the {results} are NaN, since {checkpoint.source} has weights that are no numbers: "
                    f"{listed(damaged)}; fetch the VAE again"
                )
            own = not decoded and self.encode_dtype != self.dtype
            dtype = self.dtype if decoded else self.encode_dtype
            kind = DeviceError if dtype == torch.float16 else LatentError if decoded else FrameError
            raise kind(_why_nan(results, inputs, dtype, setting="encode_dtype" if own else "dtype"))


def _why_nan(results: str, inputs: str, dtype: torch.dtype, *, setting: str) -> str:
    """What NaN in ``results`` computed in ``dtype`` comes of, and what to do; ``setting`` is what to change it by."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return (
            f"the {results} are NaN: in {name} the activations overflow, or the weights are damaged; try {setting} "
            f"bfloat16 or float32, or fetch the VAE again"
        )
    # The others reach as far as float32, or farther.
    return (
        f"the {results} are NaN, and {name} does not overflow with sound weights and {inputs}: the weights are "
        f"damaged, or the {inputs} far too large; fetch the VAE again, or look at how the {inputs} were made"
    )
