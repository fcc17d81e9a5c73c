"""One encode of a pool of workers: pieces of the video handed over a few ahead, through memory that all share.

n frames of a piece, H x W pixels, C colours; t latent frames of a step, h x w latent rows and columns, z channels
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from ..cancel import Cancelled
from ..errors import FrameError, OutOfMemoryError, WanVAEError, WorkerError
from ..frames import check_range
from ..memory import host_room
from ..model.lines import Piece
from ..parallel.plan import describe_plan, plan_shards
from ..runtime.host_bytes import copy
from ..runtime.pieces import pieces
from ..runtime.source import Source
from .failures import StepOutOfMemory, lost_unused
from .protocol import STEP_SECONDS, Workers
from .shared_memory import SharedMemory, populating
from .turn import Holder

logger = logging.getLogger(__name__)

# Of the memory that workers share, what stays for the next encode: on four GPUs four pieces of eight frames of 720p are
# 340 MiB, and of sixteen of 704x1280, as Wan 2.2 has them, 660.
_KEPT_BYTES = 3 * 2**28
# Pieces that are handed over before the first of them is done: a GPU's latents come one piece behind.
_AHEAD = 3


def most_latents(chunk: int) -> int:
    """Latent frames of a step, at most: what the coarsest stage makes of two chunks, and repeats."""
    return 3 * chunk + 2


class PoolEncodeRun:
    """One encode of a pool: iterate for the latents as they become final; close it in any case.

    Args:
        pool: whose workers encode; the caller has entered it, and closing the run leaves it.
        source: of the videos.
        chunk: frames at once; 0 for as many as pay and fit.
    """

    # What the pool is entered with.
    turn: Holder

    def __init__(self, pool: Workers, source: Source, chunk: int) -> None:
        self._pool = pool
        self._source = source
        self._chunk = chunk
        self._begun = 0
        # Whether the newest latents are finite.
        self.finite = True
        # What the encode found, and where it is done, for a log.
        self.found = pool.found
        plan = plan_shards(source.rows, source.columns, len(pool.devices))
        self._shards = plan.shards
        self.where = describe_plan(plan, pool.devices)
        # Whether the source is asked for frames: what fails then is its own, and workers only wait.
        self._asking = False

    @property
    def chunk(self) -> int:
        """Frames at once, as far as it is known."""
        return self._begun

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the video's number and ``[z, t, h, w]``, each valid until the next."""
        for video in range(self._source.videos):
            if video:
                self._pool.finish()
            for latents in self._video(video):
                yield video, latents

    def close(self) -> None:
        """Ends the encode where it is; the workers free its memory and stay."""
        pool = self._pool
        if not pool.ours:
            return
        try:
            pool.finish()
        except WanVAEError as error:
            # The encode is over either way; the next one starts new workers.
            logger.warning("%s", str(error))
            pool.stop()
        except BaseException:
            # Interrupted here, the workers are in the middle of who knows what.
            pool.stop(grace=0.5)
            raise
        finally:
            if sum(ring.size for ring in pool.rings) > _KEPT_BYTES:
                pool.rings = []
            pool.leave(self.turn)

    def _video(self, video: int) -> Iterator[torch.Tensor]:
        chunk, sent = self._chunk, 0
        self._pool.belongs_here()
        while True:
            done = 0
            try:
                for latents in self._attempt(video, chunk):
                    fresh = latents[:, max(0, sent - done) :]
                    done += latents.shape[1]
                    if fresh.shape[1]:
                        sent = done
                        yield fresh
                        self._pool.belongs_here()
                return
            except StepOutOfMemory as error:
                self._pool.stop()
                if self._begun <= 1 or not self._source.again:
                    what = {0: "it had not begun yet", 1: "not even one frame at a time fits"}.get(
                        self._begun, "a stream can't be read again"
                    )
                    raise OutOfMemoryError(
                        f"{error}; {what}; use more devices, a smaller chunk or smaller frames, or free some memory"
                    ) from error
                chunk = self._begun // 2
                logger.warning("%s; going on with chunk %d, same latents", str(error), chunk)
            except (Cancelled, GeneratorExit, OutOfMemoryError, FrameError):
                raise  # between two messages
            except BaseException as error:
                # Interrupted here, some workers may have got a command, or given an answer, that others have not.
                again = self.found != "gone" and not self._begun and lost_unused(error)
                if not self._asking:
                    self._pool.stop(grace=0.5)
                if not again:
                    raise
                self.found = "gone"

    def _attempt(self, video: int, chunk: int) -> Iterator[torch.Tensor]:
        """Encodes a video from its beginning; yields ``[z, t, h, w]``."""
        pool, source = self._pool, self._source
        self._begun = 0
        pool.start("encoder")
        request = {name: getattr(source, name) for name in ("rows", "columns", "frames", "image")} | {"chunk": chunk}
        pool.open("encode", request)
        room = [answer[1] for answer in pool.gather("room", self._shards)]
        self._begun = chunk = min(room)
        if chunk == 0:
            short = [str(pool.devices[rank]) for rank, most in enumerate(room) if most == 0]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one frame at a time; use more devices, free "
                f"some of its memory, or encode smaller frames"
            )
        before = pool.rings
        pixels, latents = self._open_rings(chunk)
        with contextlib.nullcontext() if pool.rings is before else populating(pixels):
            yield from self._through_rings(pieces(source.blocks(video, chunk), ahead=source.again), pixels, latents)

    def _through_rings(
        self, parts: Iterator[Piece], pixels: torch.Tensor, latents: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Hands pieces over and yields the latents that come of them."""
        pool = self._pool
        cuda = pool.devices[0].type == "cuda"
        sent, done, ended = 0, 0, False
        while True:
            # Pieces that take the CPU seconds are not handed over before the one before is done.
            while not ended and sent - done < (_AHEAD if cuda else 1):
                self._asking = True
                piece = next(parts, None)
                self._asking = False
                if piece is None:
                    pool.tell("last")
                    ended = True
                else:
                    if piece.frames is not None:
                        copy(pixels[sent % len(pixels), : len(piece.frames)], piece.frames)
                    pool.tell("piece", piece.counts)
                sent += 1
            answers = pool.gather("done", self._shards, limit=STEP_SECONDS if cuda else None)
            counts = {answer[1] for answer in answers}
            if len(counts) != 1:
                raise WorkerError(f"workers disagree on the latent frames of a step: {sorted(counts)}")
            self.finite = all(answer[2] for answer in answers)
            for answer in answers:
                check_range(*answer[3])
            (count,) = counts
            assert count <= latents.shape[2], "a step makes no more latent frames than a ring's place has"
            newest = latents[done % len(latents), :, :count]
            done += 1
            if count:
                yield newest
            if ended and done == sent:
                return

    def _open_rings(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the pixels of a few pieces, and for the latents of a few steps; if it can be, that of before.

        To make its pages takes longer than what four GPUs make of the pixels.
        """
        pool, source = self._pool, self._source
        wide = torch.promote_types(pool.encode_dtype, torch.float32)
        pixel_shape = torch.Size((_AHEAD + 1, chunk, source.height, source.width, source.colours))
        latent_shape = torch.Size((_AHEAD + 1, source.channels, most_latents(chunk), source.rows, source.columns))
        kinds = ((pixel_shape, source.dtype), (latent_shape, wide))
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in kinds]
        request = {
            "chunk": chunk,
            "pixels_shape": pixel_shape,
            "pixels_dtype": source.dtype,
            "latents_shape": latent_shape,
            "latents_dtype": wide,
            "sizes": sizes,
            "kept": sum(sizes) <= _KEPT_BYTES,
        }
        if [ring.size for ring in pool.rings] == sizes:
            pool.tell("again", request)
        else:
            pool.rings = []
            try:
                with host_room(pixel_shape, source.dtype, doing="encode"):
                    rings = [SharedMemory.create(size) for size in sizes]
            except OSError as error:
                raise WorkerError(
                    f"no memory can be shared with workers ({error}); see ulimit -n and ulimit -f"
                ) from error
            pool.tell("rings", request)
            pool.hand_over(*(ring.descriptor for ring in rings))
            for ring in rings:
                ring.close()
            pool.rings = rings
        with torch.inference_mode(False):  # they may be written to in another mode than they were made in
            pixels, latents = (ring.tensor(*kind) for ring, kind in zip(pool.rings, kinds, strict=True))
        return pixels, latents
