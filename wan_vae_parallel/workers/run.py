"""One decode of a pool of workers: steps commanded a few ahead, chunks made smaller where memory is short."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import torch

from ..cancel import Cancelled
from ..errors import OutOfMemoryError, WanVAEError, WorkerError
from ..memory import chunk_to_hand_on, host_room
from ..ops.pixel_format import PixelFormat
from ..parallel.plan import describe_plan, plan_shards
from .failures import StepOutOfMemory, lost_unused
from .protocol import STEP_SECONDS, Workers
from .shared_memory import SharedMemory
from .turn import Holder

logger = logging.getLogger(__name__)

# Steps that are commanded before the first of them is done: the devices never wait for the parent.
_AHEAD = 2


class PoolRun:
    """One decode of a pool: iterate for the frames as they become final; close it in any case.

    Args:
        pool: whose workers decode; the caller has entered it, and closing the run leaves it.
        latents: ``[B, z, T, h, w]``, de-normalised.
        video_shape: ``[B, T', H, W, C]`` of all frames.
        chunk: latent frames at once; 0 for as many as pay and fit.
        pixels: what the workers make of the frames; by default nothing.
        sent: frames that the caller has already.
    """

    # What the pool is entered with.
    turn: Holder

    def __init__(
        self,
        pool: Workers,
        latents: torch.Tensor,
        video_shape: torch.Size,
        chunk: int,
        pixels: PixelFormat | None = None,
        sent: int = 0,
    ) -> None:
        self._pool = pool
        self._pixels = pixels
        self._frames_shape = video_shape
        self._chunk = chunk
        self._begun = 0
        self._sent = sent
        # Frames that nobody looks at again.
        self._discarded = sent
        # Whether the newest frames are free of NaN.
        self.finite = True
        # What the decode found, for a log.
        self.found = pool.found
        try:
            self._latents_shape = latents.shape
            shape, dtype = video_shape, torch.promote_types(pool.dtype, torch.float32)
            if pixels is not None:
                shape = torch.Size((*video_shape[:2], pixels.frame_bytes(*video_shape[2:4])))
                dtype = torch.uint8
            with host_room(shape, dtype):
                # In shared memory once, for all workers, as they will compute with them.
                self._latents_memory = SharedMemory.create(max(1, latents.numel() * pool.dtype.itemsize))
                self._latents_memory.tensor(latents.shape, pool.dtype).copy_(latents.detach())
                self._video_memory = SharedMemory.create(shape.numel() * dtype.itemsize)
            self.video = self._video_memory.tensor(shape, dtype)
            plan = plan_shards(latents.shape[3], latents.shape[4], len(pool.devices))
            self._shards = plan.shards
            self.where = describe_plan(plan, pool.devices)
        except OSError as error:
            raise WorkerError(f"no memory can be shared with workers ({error}); see ulimit -n and ulimit -f") from error

    @property
    def chunk(self) -> int:
        """Latent frames at once, as far as it is known."""
        return self._begun

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]``, or bytes ``[B, t, n]``, views of `video`."""
        chunk, sent = self._chunk, self._sent
        self._pool.belongs_here()
        while True:
            done = 0
            try:
                for count in self._attempt(chunk):
                    fresh = self.video[:, max(done, sent) : done + count]
                    done += count
                    if done <= self._discarded:  # decoded once more
                        self.discard(done)
                    if fresh.shape[1]:
                        sent = done
                        yield fresh
                        self._pool.belongs_here()
                return
            except StepOutOfMemory as error:
                self._pool.stop()
                if self._begun <= 1:
                    what = "not even one latent frame at a time fits" if self._begun else "it had not begun yet"
                    raise OutOfMemoryError(
                        f"{error}; {what}; use more devices, free some memory, or decode smaller frames"
                    ) from error
                chunk = self._begun // 2
                logger.warning("%s; going on with chunk %d, same frames", str(error), chunk)
            except (Cancelled, GeneratorExit, OutOfMemoryError):
                raise  # between two messages
            except BaseException as error:
                # Interrupted here, some workers may have got a command, or given an answer, that others have not.
                again = self.found != "gone" and not self._begun and lost_unused(error)
                self._pool.stop(grace=0.5)
                if not again:
                    raise
                self.found = "gone"

    def _attempt(self, chunk: int) -> Iterator[int]:
        """Decodes from the beginning; yields the number of new frames of each step."""
        pool = self._pool
        self._begun = 0
        pool.start("decoder")
        self._open(chunk)
        room = [answer[1] for answer in pool.gather("room", self._shards)]
        self._begun = min(room)
        if self._pixels and not chunk:
            self._begun = chunk_to_hand_on(self._begun, self._frames_shape)
        if self._begun == 0:
            short = [str(pool.devices[rank]) for rank, most in enumerate(room) if most == 0]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one latent frame at a time; use more "
                f"devices, free some of its memory, or decode smaller frames"
            )
        pool.tell("begin", self._begun)
        # Steps that take the CPU seconds are not commanded before the one before is done: it needs no more work ahead.
        for _ in range(_AHEAD if pool.devices[0].type == "cuda" else 1):
            pool.tell("step")
        done = 0
        while True:
            answers = pool.gather("done", self._shards, limit=STEP_SECONDS if pool.devices[0].type == "cuda" else None)
            counts = {answer[1] if answer[0] == "done" else 0 for answer in answers}
            if len(counts) != 1:
                raise WorkerError(f"workers disagree on the frames of a step: {sorted(counts)}")
            if counts == {0}:
                raise WorkerError(f"workers ended after {done} of {self.video.shape[1]} frames")
            self.finite = all(answer[2] for answer in answers)
            (count,) = counts
            done += count
            if done == self.video.shape[1]:
                yield count
                return
            pool.tell("step")  # before anybody looks at the frames
            yield count

    def _open(self, chunk: int) -> None:
        request = {
            "latents_shape": self._latents_shape,
            "latents_dtype": self._pool.dtype,
            "latents_size": self._latents_memory.size,
            "frames_shape": self._frames_shape,
            # As plain values: a node pack's modules have names that workers don't know.
            "pixels": dataclasses.asdict(self._pixels) if self._pixels else None,
            "frames_dtype": self.video.dtype,
            "frames_size": self._video_memory.size,
            "chunk": chunk,
        }
        self._pool.open("open", request, self._latents_memory.descriptor, self._video_memory.descriptor)

    def discard(self, frames: int) -> None:
        """Gives back the memory of the first ``frames`` frames of `video`, which nobody will look at again."""
        self._discarded = max(self._discarded, frames)
        frame = self.video[0, 0].nbytes
        for video in range(len(self.video)):
            start = video * self.video[0].nbytes
            # Of a page that two frames share, the later frame keeps it.
            self._video_memory.discard(start, start + frames * frame)

    def close(self) -> None:
        """Ends the decode where it is; the workers free its memory and stay, `video` stays the caller's."""
        pool = self._pool
        if not pool.ours:
            self._latents_memory.close()
            self._video_memory.close()
            return
        try:
            pool.finish()
        except WanVAEError as error:
            # The decode is over either way; the next one starts new workers.
            logger.warning("%s", str(error))
            pool.stop()
        except BaseException:
            # Interrupted here, the workers are in the middle of who knows what.
            pool.stop(grace=0.5)
            raise
        finally:
            self._latents_memory.close()
            self._video_memory.close()
            pool.leave(self.turn)
