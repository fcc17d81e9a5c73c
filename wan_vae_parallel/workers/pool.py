"""A pool of worker processes, one a device, that decode or encode one video together.

The parent commands step after step and stays a few ahead; workers can't disagree on when to stop, because stopping is
that no next step comes. Each writes its rows into memory that all share and that becomes the returned tensor.

While they start, the first device decodes in this process (see `meanwhile`).

Workers are in one of these stages, all of them in the same:

| stage | they have |
| --- | --- |
| gone | no process |
| prepared | a process that has loaded its modules, or does so, and touched no device |
| loading | been told to take the weights; they may be on the devices already |
| ready | weights and connections on the devices |
| parked | a process that has given its device's memory back |
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import torch

from ..cancel import LOOK_SECONDS, Cancelled, check_cancelled
from ..errors import BusyError, WanVAEError, WorkerError
from ..files.checkpoint import Checkpoint
from ..ops.dispatch import note_failed
from ..ops.pixel_format import PixelFormat
from ..runtime.engine import LocalEngine
from ..runtime.source import Source
from .crew import Crew
from .encode_run import PoolEncodeRun
from .failures import INTERFACE
from .meanwhile import MeanwhileRun
from .process import WorkerProcess, end_all
from .run import PoolRun
from .shared_memory import SharedMemory
from .shared_weights import Part, share_weights
from .turn import Holder, Turn

logger = logging.getLogger(__name__)

# Loading torch, CUDA and NCCL on many devices at once, from a cold disk.
_START_SECONDS = 300.0
_COPY_THREADS = 4
# A thread that waits for another one's decode for so long says so.
_WAIT_WORD_SECONDS = 5.0
# Giving memory back takes a tenth of a second, and NCCL's half a one. Whoever wants memory does not wait for workers
# that are stuck.
_PARK_SECONDS = 5.0
# Workers that nothing was ever decoded with end after so long: a sampler may take its time before there is anything.
_PREPARED_SECONDS = 3600.0
# A decode that was cancelled may have steps that are under way: who cancelled does not wait for all of them.
_FINISH_SECONDS = 0.5
# Nor does the next one, for longer than new processes take: on the CPU a step may take minutes.
_REPLACE_SECONDS = 3.0
# Variables that libraries read when workers load weights, and not when they are made.
_LATE_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_SYMM_MEM_")
# ComfyUI's choice of allocator is not the workers': cudaMallocAsync can't share memory between processes.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

Stage = Literal["gone", "prepared", "loading", "ready", "parked"]

_owners = itertools.count()
_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """With the program its workers end, those that are stopped too."""
    for pool in list(_pools):
        pool.stop(grace=0.5)


class WorkerPool(Crew):
    """Workers for one set of weights, devices and dtype.

    Args:
        weights: called for the checkpoint whenever workers load them.
        devices: one a worker; several of ``"cpu"`` are allowed.
        dtype: to decode in.
        encode_dtype: to encode in.
        idle_seconds: without a decode for so long, workers that have had one end.

    Attributes:
        stage: of all workers, see above.
        held: bytes on each device that ready workers would give back.
        worked_on: the devices of the last decode or encode.
    """

    def __init__(
        self,
        weights: Callable[[], Checkpoint],
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        encode_dtype: torch.dtype,
        *,
        idle_seconds: float,
    ) -> None:
        super().__init__()
        self.devices = tuple(devices)
        self.dtype = dtype
        self.encode_dtype = encode_dtype
        self._weights = weights
        self._idle_seconds = idle_seconds
        self.stage: Stage = "gone"
        self.held = 0
        # Whether workers have been told of a decode, and whether its memory is not known to be free yet since.
        self._opened = False
        self._finishing = False
        # What workers know this pool's weights by.
        self._owner = next(_owners)
        # What decodes in this process while the workers start; between such decodes it holds nothing.
        self._local = LocalEngine(weights, self.devices[0], dtype, encode_dtype)
        self.worked_on = self.devices
        # The weights that ready workers have, this pool's and others' that they worked for, and those that loading ones
        # have been given.
        self._parts: set[tuple[int, Part]] = set()
        self._given: tuple[int, Part] | None = None
        # Memory that the last encode shared with the workers, for the next: for pixels, and for latents.
        self.rings: list[SharedMemory] = []
        # Counts how often the workers were ended, which may happen while they start.
        self._ended = 0
        self._changing = threading.RLock()
        # Of whoever decodes or encodes, and for moments of whoever looks after idle workers.
        self._turn = Turn()
        self._decoder_thread: threading.Thread | None = None
        self._idle_timer: threading.Timer | None = None
        _pools.add(self)

    @property
    def running(self) -> bool:
        """Whether there is memory on the devices, of workers or of a decode while they start."""
        return self.stage in ("loading", "ready") or self._local.running

    @property
    def parts(self) -> frozenset[str]:
        """Of ``"decoder"`` and ``"encoder"`` those whose weights are on the devices now, or on their way there."""
        parts = self._parts | ({self._given} if self._given else set())
        return frozenset(part for owner, part in parts if owner == self._owner) | self._local.parts

    @property
    def found(self) -> Stage:
        """`stage`, for whoever wants the workers now: those of which one has ended are gone."""
        return self.stage if all(worker.alive for worker in self.workers) else "gone"

    def run(
        self, latents: torch.Tensor, video_shape: torch.Size, chunk: int, pixels: PixelFormat | None = None
    ) -> PoolRun | MeanwhileRun:
        """Begins a decode; other threads' decodes wait for its end.

        Args:
            latents: ``[B, z, T, h, w]``, de-normalised.
            video_shape: ``[B, T', H, W, C]`` of all frames.
            chunk: latent frames at once; 0 for as many as pay and fit.
            pixels: what the workers make of the frames; by default nothing.
        """
        with self._entering() as turn:
            run: MeanwhileRun | PoolRun
            if self._far_from_ready() and MeanwhileRun.possible(self.devices, self.dtype):
                run = MeanwhileRun(self, self._local, latents, video_shape, chunk, pixels)
            else:
                run = PoolRun(self, latents, video_shape, chunk, pixels)
            run.turn = turn
            return run

    def encode(self, source: Source, chunk: int) -> PoolEncodeRun:
        """Begins an encode; other threads' decodes and encodes wait for its end.

        Args:
            source: of the videos.
            chunk: frames at once; 0 for as many as pay and fit.
        """
        with self._entering() as turn:
            run = PoolEncodeRun(self, source, chunk)
            run.turn = turn
            return run

    def close(self) -> None:
        """Ends the workers; a decode that they do ends with an error."""
        self.stop()
        if self._local.running:
            self._local.close()

    @contextlib.contextmanager
    def _entering(self) -> Iterator[Holder]:
        """Takes the pool for a decode of this thread, when those of others are over.

        It is its own until `leave`, and no longer than the run keeps what this gives it.
        """
        if not self.ours:
            raise WanVAEError("this process was forked from the one that loaded the VAE; load it here, too")
        if self._open_here():
            gc.collect()  # of one that was dropped the collector may not have heard
        if self._open_here():
            raise BusyError(
                "another decode or encode of this VAE is open in this very thread; finish or close its stream first"
            )
        said, since = False, time.monotonic()
        turn = Holder()
        try:
            while not self._turn.take(turn, LOOK_SECONDS):
                check_cancelled()
                if not said and time.monotonic() > since + _WAIT_WORD_SECONDS:
                    logger.info("waiting for the end of another thread's work with this VAE")
                    said = True
                    gc.collect()  # as above
            self.belongs_here()
            if self._opened:
                self.stop(grace=0.0)  # who had them was interrupted before it could end its decode
            self._replace_if_busy()
            if self._idle_timer:
                self._idle_timer.cancel()
            self.worked_on = self.devices
            yield turn
        except BaseException:
            self.leave(turn)
            raise

    def _open_here(self) -> bool:
        """Whether this thread has a decode or an encode open."""
        return self._turn.held and self._decoder_thread is threading.current_thread()

    def belongs_here(self) -> None:
        """Notes that this thread goes on with the decode: a stream may be handed from one to another."""
        self._decoder_thread = threading.current_thread()

    def leave(self, turn: Holder) -> None:
        """Ends a decode or an encode, if it is its turn; from now on the workers are idle."""
        if not self._turn.held_by(turn):
            return
        self._decoder_thread = None
        self._turn.give_back(turn)
        if sys.is_finalizing():
            self.stop(grace=0.0)  # nothing can wait any more
        else:
            self._end_when_idle()

    def prepare(self, ended: int | None = None) -> None:
        """Begins the workers' processes if there are none; they load their modules while the caller goes on.

        Args:
            ended: how often workers had been ended when the caller decided that there must be some.

        Raises:
            WorkerError: the system has no more processes or files, or somebody has ended the workers meanwhile.
        """
        if self.workers or not self.ours:
            return
        ended = self._ended if ended is None else ended
        options = {"world_size": len(self.devices)}
        environment = {
            **dict.fromkeys(_ALLOCATOR_VARIABLES),
            **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), INTERFACE),
        }
        try:
            for rank, device in enumerate(self.devices):
                worker = WorkerProcess(rank, device, options, environment)
                with self._changing:
                    if self._ended == ended:
                        self.workers.append(worker)
                        self.stage = "prepared"
                        continue
                end_all([worker], grace=0.0)
                raise WorkerError("the workers were ended while they started; the next call starts new ones")
        except OSError as error:
            self.stop(grace=0.0)
            raise WorkerError(
                f"workers can't start ({error}); if a limit stands against it, raise it (ulimit -n is that of open "
                f"files, of which each worker takes three; ulimit -u that of processes)"
            ) from error
        except BaseException:
            self.stop(grace=0.0)
            raise
        self._end_when_idle(max(self._idle_seconds, _PREPARED_SECONDS))

    def take_over(self, other: WorkerPool, *, keep: bool = False) -> None:
        """Makes ``other``'s processes this pool's, if it decodes on the same devices and is not decoding now.

        Args:
            other: has them.
            keep: they keep ``other``'s weights beside this pool's, for when it takes them back.
        """
        if self.workers or other.devices != self.devices:
            return
        with other._turn.at_once() as free:
            if not free:
                return
            if keep and other.stage == "ready":
                other._await_finish(_FINISH_SECONDS)
            if not keep or other.stage not in ("ready", "loading") or other._finishing:
                other._park()
            with other._changing:
                self.workers, other.workers = other.workers, []
                self.stage, other.stage = other.stage, "gone"
                self.held, other.held = other.held, 0
                self.rings, other.rings = other.rings, []
                # A third pool's weights go when the next ones come.
                self._parts = {one for one in other._parts if one[0] in (self._owner, other._owner)}
                # Those that still load go on with it.
                self._given, self._early = other._given, other._early
                other._parts, other._given, other._early = set(), None, {}
            if other._idle_timer:
                other._idle_timer.cancel()
        self._end_when_idle(max(self._idle_seconds, _PREPARED_SECONDS) if self.stage == "prepared" else None)

    def _far_from_ready(self) -> bool:
        """Whether no decode can begin on the workers soon: there are none, or they load modules, weights or kernels."""
        if self.found == "gone":
            return True
        if self.stage in ("ready", "parked"):
            return False
        with self._ended_if_lost():
            self.listen()
        if self.stage == "loading":
            return len(self._early.get("ready", {})) < len(self.workers)
        return not self.workers or not all(worker.prepared for worker in self.workers)

    def begin(self) -> None:
        """Begins the workers' processes if there are none that live."""
        if self.workers and self.found == "gone":
            logger.warning("workers ended since they were used last; starting new ones")
            self.stop(grace=0.5)
        self.prepare()

    def start(self, part: Part) -> None:
        """Waits until the workers are ready with a part's weights; starts them if there are none that live."""
        self.begin()
        started = time.monotonic()
        while not self._has(part):
            self._order(part)
            # A cancelled wait leaves them loading: the next one waits for the rest.
            self._take_ready()
            names = ", ".join(map(str, self.devices))
            logger.debug(
                "%d workers on %s were ready after %.2f s", len(self.workers), names, time.monotonic() - started
            )

    def advance(self, part: Part, soon: tuple[torch.Size, int] | None = None) -> bool:
        """`start` without waiting, for workers that have begun: tells them what they can be told by now.

        Args:
            part: whose weights.
            soon: the shape of latents, and a chunk, whose kernels they compile before they are ready.

        Returns:
            Whether they are ready with a part's weights.
        """
        if not self._has(part):
            self._order(part, soon)
        self._catch_up()
        return self._has(part) and self.found != "gone"

    def settle(self) -> None:
        """Finds out whether idle workers that were loading are ready by now, so that `stage` and `held` tell it."""
        if self.stage != "loading" or not self.ours:
            return
        with self._turn.at_once() as free:
            if not free:
                return
            with self._ended_if_lost():
                self._catch_up()

    @contextlib.contextmanager
    def _ended_if_lost(self) -> Iterator[None]:
        """Within it idle workers are heard; those that have failed are ended, so that the next call starts new ones."""
        try:
            yield
        except WanVAEError as error:
            logger.warning("%s", str(error))
            self.stop(grace=0.0)
        except BaseException:
            self.stop(grace=0.0)  # interrupted here, what one has said is lost
            raise

    def _catch_up(self) -> None:
        """Takes what workers have said by now, without waiting; raises if one has ended or is stopped."""
        self.listen()
        self.check_running()
        if self.stage == "loading" and len(self._early.get("ready", {})) == len(self.workers):
            self._take_ready()

    def _has(self, part: Part) -> bool:
        """Whether workers are ready with a part's weights."""
        return self.stage == "ready" and (self._owner, part) in self._parts

    def _order(self, part: Part, soon: tuple[torch.Size, int] | None = None) -> None:
        """Tells workers to load a part's weights, unless they have been told and not answered yet."""
        if self.stage not in ("ready", "loading"):
            self._load()
        if self._given is None:
            self._give_weights(part, soon)
        self.stage = "loading"

    def _take_ready(self) -> None:
        """Waits until the workers have loaded what they were given."""
        ready = self.gather("ready", len(self.workers), patience=_START_SECONDS, limit=_START_SECONDS)
        if self._given is not None:
            self._parts.add(self._given)
        self._given = None
        self.stage, self.held = "ready", max(held for _, held in ready)

    def park(self) -> bool:
        """Has ready workers give their devices' memory back, and keeps their processes.

        Returns:
            Whether they hold none now; not if a decode is under way.
        """
        if not self.ours:
            return False
        with self._turn.at_once() as free:
            if free:
                self._park()
            return free

    def _park(self) -> None:
        """`park` for whoever has the pool."""
        ended = self._ended
        try:
            if self.stage == "loading":
                self._catch_up()
            if self.stage == "ready":
                self._await_finish(_FINISH_SECONDS)
            if self.stage == "loading" or self._finishing:
                # Somebody cancelled that: new processes are sooner there than the end of it.
                self.stop(grace=0.0)
                self.prepare(ended + 1)
            if self.stage == "ready":
                self.tell("park")
                self.gather("parked", len(self.workers), limit=_PARK_SECONDS, check=None)
                self.stage, self.held, self._parts, self.rings = "parked", 0, set(), []
        except WanVAEError as error:
            logger.warning("%s", str(error))
            self.stop(grace=0.0)
        except BaseException:
            self.stop(grace=0.0)  # interrupted here, they are in the middle of who knows what
            raise

    def open(self, kind: str, request: dict[str, Any], *descriptors: int) -> None:
        """Tells ready workers of a decode or an encode; it lasts until `finish`."""
        self._opened = True
        self.tell(kind, {**request, "owner": self._owner})
        self.hand_over(*descriptors)

    def finish(self) -> None:
        """Ends a decode on the workers; who needs them next waits for those that are still at it, or starts others."""
        if self.stage != "ready" or not self._opened:
            return
        self._opened, self._finishing = False, True
        self.tell("finish")
        self._await_finish(_FINISH_SECONDS)

    def _replace_if_busy(self) -> None:
        """Starts new workers where these are at steps of a decode that was cancelled, and not done with them soon."""
        if self.stage != "ready":
            return
        try:
            self._await_finish(_REPLACE_SECONDS, check_cancelled)
        except WanVAEError as error:
            logger.warning("%s", str(error))
            self.stop(grace=0.0)
        if self._finishing:
            logger.info("workers are still at a step that was cancelled; starting new ones")
            self.stop(grace=0.0)
            self.prepare()

    def _await_finish(self, seconds: float, look: Callable[[], None] = lambda: None) -> None:
        """Waits until the last decode's memory is free, for at most ``seconds``; meanwhile ``look`` is called."""
        if self._finishing:
            deadline = time.monotonic() + seconds

            def check() -> None:
                look()
                if time.monotonic() > deadline:
                    raise _NotYet

            with contextlib.suppress(_NotYet):
                ended = self.gather("finished", len(self.workers), check=check)
                self._finishing = False
                for worker, (_, failed) in zip(self.workers, ended, strict=True):
                    if failed:
                        note_failed(worker.device)

    def _load(self) -> None:
        """Tells the workers to get ready for weights, so that they do that while this process reads them."""
        cuda = self.devices[0].type == "cuda"
        settings = {
            "backend": "nccl" if cuda else "gloo",
            # On GPUs the host only copies frames: more threads than these would only be in each other's way.
            "threads": min(_COPY_THREADS if cuda else 2**10, max(1, torch.get_num_threads() // len(self.devices))),
            "environment": {
                name: value
                for name, value in os.environ.items()
                if name.startswith(_LATE_VARIABLES) and not name.endswith("_SOCKET_IFNAME")
            },
        }
        with self._sharing():
            store = os.memfd_create("wan-vae-parallel-store", os.MFD_CLOEXEC)
            try:
                self._given, self._parts = None, set()
                self.tell("load", settings)
                self.stage = "loading"
                self.hand_over(store)
            finally:
                os.close(store)

    def _give_weights(self, part: Part, soon: tuple[torch.Size, int] | None) -> None:
        """Hands a part's weights to the workers."""
        with self._sharing():
            dtype = self.dtype if part == "decoder" else self.encode_dtype
            memory, manifest = share_weights(self._weights(), part, dtype)
            kept = sorted({self._owner, *(owner for owner, _ in self._parts)})
            manifest |= {"owner": self._owner, "kept": kept, "soon": soon}
            try:
                self.tell("weights", part, manifest)
                self.hand_over(memory.descriptor)
                self._given = self._owner, part
            finally:
                memory.close()

    @contextlib.contextmanager
    def _sharing(self) -> Iterator[None]:
        """Within it something is handed to all workers; what fails ends them."""
        try:
            yield
        except Cancelled:
            raise  # they still wait for it
        except OSError as error:
            self.stop(grace=0.0)
            raise WorkerError(f"no memory can be shared with workers ({error}); see ulimit -n and ulimit -f") from error
        except BaseException:
            self.stop(grace=0.0)
            raise

    def stop(self, grace: float = 2.0) -> None:
        """Ends all workers, however they are: asked, then after ``grace`` seconds killed."""
        if not self.ours:
            return  # a forked copy: they are the parent's
        if self._idle_timer:
            self._idle_timer.cancel()
        with self._changing:
            self._ended += 1
            workers, self.workers = self.workers, []
            # Those that only load have nothing to end well, and may not hear.
            grace = grace if self.stage in ("ready", "parked") else 0.0
            self.stage, self.held, self._early = "gone", 0, {}
            self._parts, self._given = set(), None
            self._opened = self._finishing = False
            self.rings = []
        end_all(workers, grace)

    def _end_when_idle(self, seconds: float | None = None) -> None:
        """Ends the workers if nobody decodes with them for so long, by default the pool's idle seconds."""
        seconds = self._idle_seconds if seconds is None else seconds
        if self._idle_timer:
            self._idle_timer.cancel()
        if not self.workers or seconds > threading.TIMEOUT_MAX:
            return
        weak = weakref.ref(self)  # the timer alone does not keep a pool that nobody uses

        def end() -> None:
            pool = weak()
            if pool is None or pool._idle_timer is not timer:
                return
            with pool._turn.at_once() as free:
                if free:
                    if pool.workers:
                        logger.info("workers idle for %.0f s: ending them", seconds)
                    pool.stop()
                else:  # not a decode, perhaps, but somebody who only looks after them
                    pool._end_when_idle(seconds)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        self._idle_timer = timer
        timer.start()

    def __reduce__(self) -> NoReturn:
        raise TypeError("workers can't be copied or pickled")

    def __del__(self) -> None:
        if getattr(self, "workers", None):
            self.stop()


class _NotYet(Exception):
    """Some have not answered by now."""
