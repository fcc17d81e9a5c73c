"""One decode that begins on the first device, in this process, while a pool's workers load their modules.

Loading torch takes a process seconds, which is longer than one GPU takes for most videos; kernels that are not on disk
take seconds more. The workers go on from where this process is if they have both before it has ended, and would end
sooner though they begin the video anew. The frames are the same: where our kernels do all of the work, bits do not
depend on the number of devices.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Iterator, Sequence

import torch

from ..cancel import Cancelled, check_cancelled
from ..errors import WanVAEError, is_out_of_memory
from ..memory import chunk_to_hand_on, fits, free_memory, largest_chunk
from ..ops.dispatch import kernels_expected
from ..ops.gpu import gpu, takes_processes
from ..ops.pixel_format import PixelFormat
from ..parallel.plan import plan_shards
from ..runtime.engine import LocalEngine, LocalRun
from ..runtime.local import LocalDecoder
from .protocol import WORKER_BYTES, Workers
from .run import PoolRun
from .turn import Holder

logger = logging.getLogger(__name__)

# What a first decode of ready workers takes besides its steps, about: memory, compiled kernels from disk.
_BEGIN_SECONDS = 1.0


class MeanwhileRun:
    """One decode of a pool: iterate for the frames as they become final; close it in any case.

    Args:
        pool: whose workers load; the caller has entered it, and closing the run leaves it.
        engine: decodes on the pool's first device; closing the run gives its memory back.
        latents: ``[B, z, T, h, w]``, de-normalised.
        video_shape: ``[B, T', H, W, C]`` of all frames.
        chunk: latent frames at once; 0 for as many as pay and fit.
        pixels: what to make of the frames; by default nothing.
    """

    # No memory of its own for the whole video: frames are handed out step by step.
    video: torch.Tensor | None = None
    # What the pool is entered with.
    turn: Holder

    def __init__(
        self,
        pool: Workers,
        engine: LocalEngine,
        latents: torch.Tensor,
        video_shape: torch.Size,
        chunk: int,
        pixels: PixelFormat | None = None,
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._latents = latents
        self._video_shape = video_shape
        self._chunk = chunk
        self._pixels = pixels
        # What the decode found, for a log.
        self.found = pool.found
        # Frames that were handed out, and those of them that this process decoded.
        self._sent = self._own = 0
        # Whether this process may hold memory on the device.
        self._holding = False
        # Of this process, and of the workers once they go on.
        self._decoder: LocalDecoder | None = None
        self._local: LocalRun | None = None
        self._run: PoolRun | None = None
        # Whether the workers have failed, so that this process ends the decode.
        self._lost = False

    @staticmethod
    def possible(devices: Sequence[torch.device], dtype: torch.dtype, decoder: LocalDecoder | None = None) -> bool:
        """Whether the first of ``devices`` makes the bits that all of them make together, and takes a process more.

        Args:
            devices: of the pool.
            dtype: to decode in.
            decoder: the first device's, once it is loaded; until then it is as far as is known.
        """
        if torch.cuda._is_in_bad_fork() or not all(kernels_expected(device, dtype) for device in devices):
            return False
        if decoder is not None and not decoder.kernels:
            return False
        return len({gpu(device).capability for device in devices}) == 1 and takes_processes(devices[0])

    @property
    def finite(self) -> bool:
        """Whether the newest frames are free of NaN."""
        run = self._run or self._local
        return run is None or run.finite

    @property
    def chunk(self) -> int:
        """Latent frames at once, as far as it is known."""
        run = self._run or self._local
        return run.chunk if run else self._chunk

    @property
    def where(self) -> str:
        """The devices, for a log."""
        if self._run is None:
            return f"{self._engine.device} alone, while the workers start"
        return f"{self._engine.device}, then {self._run.where}" if self._own else self._run.where

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]``, or bytes ``[B, t, n]``, on the host, each valid until the next."""
        pool = self._pool
        pool.belongs_here()
        with self._dispensable():
            pool.begin()
        try:
            yield from self._alone()
        except BaseException as error:
            if not isinstance(error, Exception) or not is_out_of_memory(error):
                # The error may be kept for long, and with it what functions hold that it passed: the device's memory.
                traceback.clear_frames(error.__traceback__)
                raise
            device = self._engine.device
            logger.warning("%s has not the memory to decode alone; the workers go on, same frames", device)
        self._own = self._sent
        if self._sent == self._video_shape[1]:
            return
        self._give_back()
        pool.worked_on = pool.devices
        if self._run is None:
            self._run = self._begin_run()
        for frames in self._run:
            self._sent += frames.shape[1]
            yield frames
            self._run.discard(self._sent)

    def close(self) -> None:
        """Ends the decode where it is and frees its memory; the workers stay."""
        pool = self._pool
        try:
            if pool.ours:
                self._give_back()
        finally:
            if self._run is not None:
                self._run.close()
            elif pool.ours:
                pool.leave(self.turn)

    def _alone(self) -> Iterator[torch.Tensor]:
        """Frames that this process decodes, until they are all or the workers are to go on."""
        pool, seconds, counted = self._pool, 0.0, 0
        self._local = self._begin_local()
        if self._local is None:
            return
        pool.worked_on = pool.devices[:1]
        steps = iter(self._local)
        while True:
            since = time.monotonic()
            frames = next(steps, None)
            if frames is None:
                return
            if self._sent:  # the first ones took what comes but once
                seconds += time.monotonic() - since
                counted += frames.shape[1]
            self._sent += frames.shape[1]
            yield frames
            del frames
            pool.belongs_here()
            check_cancelled()
            if not self._lost and self._hand_over(seconds / max(1, counted)):
                return

    def _begin_local(self) -> LocalRun | None:
        """A decode on the first device; none if its frames might differ from the workers', or it has not the memory."""
        engine, latents = self._engine, self._latents
        device = engine.device
        self._holding = True
        decoder = self._decoder = engine.decoder()
        size = (latents.shape[0], latents.shape[2], latents.shape[3], latents.shape[4])
        kernels = decoder.kernels
        # A worker is going to begin there, too.
        free = free_memory(device) - (WORKER_BYTES if device.type == "cuda" else 0)
        if not self.possible(self._pool.devices, engine.dtype, decoder):
            return None
        if not fits(decoder.architecture, size, chunk=1, dtype=engine.dtype, free=free, kernels=kernels):
            logger.info("%s has not the memory to decode alone while the workers start", device)
            return None
        chunk = self._chunk
        if not chunk:
            chunk = largest_chunk(
                decoder.architecture, size, dtype=engine.dtype, free=free, kernels=kernels, device_type=device.type
            )
            chunk = chunk_to_hand_on(chunk, self._video_shape) if self._pixels else chunk
        return LocalRun(engine, latents, self._video_shape, chunk, self._pixels)

    def _hand_over(self, rate: float) -> bool:
        """Brings the workers nearer; whether they are to go on.

        Args:
            rate: seconds that this process takes for a frame; 0 if that is not known yet.
        """
        with self._dispensable():
            # Not before this process's settings are measured and kept: they look them up then.
            frames, chunk = self._video_shape[1], self._chunk
            if self._pixels and not chunk:
                chunk = chunk_to_hand_on(frames, self._video_shape)
            ready = self._pool.advance("decoder", (self._latents.shape, chunk))
            shards = plan_shards(self._latents.shape[3], self._latents.shape[4], len(self._pool.devices)).shards
            anew = rate * frames / shards + _BEGIN_SECONDS
            if (
                ready
                and rate * (frames - self._sent) > anew
                and self.possible(self._pool.devices, self._engine.dtype, self._decoder)
            ):
                self._run = self._begin_run()
        return self._run is not None

    def _begin_run(self) -> PoolRun:
        run = PoolRun(self._pool, self._latents, self._video_shape, self._chunk, self._pixels, self._sent)
        run.turn = self.turn
        return run

    @contextlib.contextmanager
    def _dispensable(self) -> Iterator[None]:
        """Within it workers are asked for something; if they fail the decode goes on without them."""
        pool = self._pool
        try:
            yield
        except WanVAEError as error:
            check_cancelled()  # whoever has closed the VAE has ended them
            if not pool.ours:
                raise
            self._lost = True
            pool.stop(grace=0.0)
            logger.warning("%s; %s goes on alone", error, self._engine.device)
        except Cancelled:
            raise  # between two messages
        except BaseException:
            # Interrupted here, some workers may have got a command, or given an answer, that others have not.
            pool.stop(grace=0.5)
            raise

    def _give_back(self) -> None:
        """Frees what this process holds on the device."""
        if self._holding:
            self._decoder = None
            if self._local is not None:
                self._local.close()
            self._engine.close()
            self._holding = False
