"""A pool of worker processes, one a device, that decode one video together.

The parent commands step after step and stays a few ahead; workers can't disagree on when to stop, because stopping is
that no next step comes. Each writes its rows into memory that all share and that becomes the returned tensor.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing.connection
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save

from ..checkpoint import Checkpoint, Weights
from ..errors import WanVAEError, WorkerError
from ..ops.dispatch import say_once
from .faults import INTERFACE, cause, hint
from .pool_run import PoolRun
from .process import WorkerProcess, end_all
from .pulse import PAUSE_SECONDS
from .shared_memory import SharedMemory

logger = logging.getLogger(__name__)

# A worker that says nothing for so long is stopped or stuck; it says something every second.
_SILENCE_SECONDS = 7.0
# Loading torch, CUDA and NCCL on many devices at once, from a cold disk.
_START_SECONDS = 300.0
_COPY_THREADS = 4
# A thread that waits for another one's decode for so long says so.
_WAIT_WORD_SECONDS = 5.0
# ComfyUI's choice of allocator is not the workers': cudaMallocAsync can't share memory between processes.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """With the program its workers end, those that are stopped too."""
    for pool in list(_pools):
        pool.stop(grace=0.5)


class WorkerPool:
    """Workers for one set of weights, devices and dtype; they start with the first decode and stay warm.

    Args:
        weights: called for the checkpoint whenever workers start.
        devices: one a worker; several of ``"cpu"`` are allowed.
        dtype: to compute in.
        path: where the checkpoint's file is, if it is one: each worker reads it itself.
        idle_seconds: without a decode for so long, the workers end and free their devices.
    """

    def __init__(
        self,
        weights: Weights,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        *,
        path: Path | None,
        idle_seconds: float,
    ) -> None:
        self.devices = tuple(devices)
        self.dtype = dtype
        self._weights = weights
        self._path = path
        self._idle_seconds = idle_seconds
        self.workers: list[WorkerProcess] = []
        self._process = os.getpid()
        # Counts how often the workers were ended, which may happen while they start.
        self._ended = 0
        self._changing = threading.RLock()
        self._decoding = threading.Lock()
        self._decoder_thread: threading.Thread | None = None
        self._idle_timer: threading.Timer | None = None
        _pools.add(self)

    @property
    def running(self) -> bool:
        """Whether the workers live."""
        return bool(self.workers)

    @property
    def ours(self) -> bool:
        """Whether the workers are this process's, and not those of the one that it was forked from."""
        return os.getpid() == self._process

    def run(self, latents: torch.Tensor, video_shape: torch.Size, chunk: int) -> PoolRun:
        """Begins a decode; other threads' decodes wait for its end.

        Args:
            latents: ``[B, z, T, h, w]``, de-normalised.
            video_shape: ``[B, T', H, W, C]`` of all frames.
            chunk: latent frames at once; 0 for as many as pay and fit.
        """
        return PoolRun(self, latents, video_shape, chunk)

    def close(self) -> None:
        """Ends the workers; a running decode ends with an error."""
        self.stop()

    def enter(self) -> None:
        """Takes the pool for a decode of this thread, when those of others are over."""
        if not self.ours:
            raise WanVAEError("this process was forked from the one that loaded the VAE; load it here, too")
        if self._decoder_thread is threading.current_thread():
            gc.collect()  # of one that was dropped the collector may not have heard
        if self._decoder_thread is threading.current_thread():
            raise WanVAEError(
                "another decode of this VAE is open in this very thread; finish or close its stream first"
            )
        if not self._decoding.acquire(timeout=_WAIT_WORD_SECONDS):
            logger.info("waiting for the end of another thread's decode with this VAE")
            self._decoding.acquire()
        self.belongs_here()
        if self._idle_timer:
            self._idle_timer.cancel()

    def belongs_here(self) -> None:
        """Notes that this thread goes on with the decode: a stream may be handed from one to another."""
        self._decoder_thread = threading.current_thread()

    def leave(self) -> None:
        """Ends what `enter` began; from now on the workers are idle."""
        self._decoder_thread = None
        self._decoding.release()
        if sys.is_finalizing():
            self.stop(grace=0.0)  # nothing can wait any more
        else:
            self._end_when_idle()

    def start(self) -> None:
        """Starts the workers if there are none that live, and waits until they are ready."""
        if self.workers and all(worker.alive for worker in self.workers):
            return
        if self.workers:
            logger.warning("workers ended since the last decode; starting new ones")
            self.stop(grace=0.5)
        ended = self._ended
        cuda = self.devices[0].type == "cuda"
        # Of a file no more than what tells whether it is still the same one: the workers read it.
        checkpoint = self._weights.describe() if self._path else self._weights()
        options = {
            "world_size": len(self.devices),
            # As a word: a torch.dtype would have the worker import torch before its environment is its own.
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": "nccl" if cuda else "gloo",
            "weights": str(self._path.absolute()) if self._path else None,
            "version": checkpoint.version and tuple(checkpoint.version),
            # On GPUs the host only copies frames: more threads than these would only be in each other's way.
            "threads": min(_COPY_THREADS if cuda else 2**10, max(1, torch.get_num_threads() // len(self.devices))),
        }
        environment = {
            **dict.fromkeys(_ALLOCATOR_VARIABLES),
            **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), INTERFACE),
        }
        started = time.monotonic()
        store, memory = -1, None
        try:
            store = os.memfd_create("wan-vae-parallel-store", os.MFD_CLOEXEC)
            if not self._path:
                memory = _in_shared_memory(checkpoint)
            for rank, device in enumerate(self.devices):
                worker = WorkerProcess(rank, device, options, environment)
                with self._changing:
                    if self._ended == ended:
                        self.workers.append(worker)
                        continue
                end_all([worker], grace=0.0)
                raise WorkerError("the workers were ended while they started; the next decode starts new ones")
            self.tell("files", memory is not None)
            self.hand_over(store, *([memory.descriptor] if memory else []))
            self.gather("ready", len(self.workers), patience=_START_SECONDS, limit=_START_SECONDS)
        except OSError as error:
            self.stop()
            raise WorkerError(
                f"workers can't start ({error}); if a limit stands against it, raise it (ulimit -n is that of open "
                f"files, of which each worker takes four), and start in a folder that is there"
            ) from error
        except BaseException:
            self.stop()
            raise
        finally:
            if store >= 0:
                os.close(store)
            if memory:
                memory.close()
        names = ", ".join(map(str, self.devices))
        logger.info("%d workers on %s started in %.1f s", len(self.workers), names, time.monotonic() - started)

    def stop(self, grace: float = 2.0) -> None:
        """Ends all workers, however they are: asked, then after ``grace`` seconds killed."""
        if not self.ours:
            return  # a forked copy: they are the parent's
        if self._idle_timer:
            self._idle_timer.cancel()
        with self._changing:
            self._ended += 1
            workers, self.workers = self.workers, []
        end_all(workers, grace)

    def tell(self, *message: object) -> None:
        """Sends ``message`` to all workers."""
        workers = self._living()
        for worker in workers:
            try:
                worker.connection.send(message)
            except OSError:
                raise self._cause(workers) from None

    def hand_over(self, *descriptors: int) -> None:
        """Gives all workers ``descriptors``, which follow a message that said so."""
        workers = self._living()
        for worker in workers:
            try:
                for descriptor in descriptors:
                    worker.hand_over(descriptor)
            except OSError:
                raise self._cause(workers) from None

    def _living(self) -> list[WorkerProcess]:
        """The workers; another thread, or a callback, may have ended them."""
        if not self.ours:
            raise WanVAEError("this process was forked from the one that decodes; load the VAE here, too")
        if not self.workers:
            raise WorkerError("the workers were ended while they decoded; the next decode starts new ones")
        return list(self.workers)

    def gather(
        self, kind: str, count: int, *, patience: float | None = None, limit: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Waits for a message of ``kind`` (for ``"done"`` also ``"end"``) from each of the first ``count`` workers.

        Args:
            kind: of message.
            count: of workers.
            patience: seconds that any of them may say nothing at all, unless it is stopped; by default a few.
            limit: seconds until all must have answered.
        """
        patience = _SILENCE_SECONDS if patience is None else patience
        answers: dict[int, tuple[Any, ...]] = {}
        workers = self._living()
        waiting: dict[object, WorkerProcess] = {worker.connection: worker for worker in workers}
        since = looked = time.monotonic()
        for worker in workers:
            worker.heard = since
        while len([rank for rank in answers if rank < count]) < count:
            pending = [w.connection for w in workers if w.rank not in answers or w.rank >= count]
            try:
                for ready in multiprocessing.connection.wait(pending, timeout=0.5):
                    worker = waiting[ready]
                    message = worker.connection.recv()
                    worker.heard = time.monotonic()
                    if message[0] == "failed":
                        raise self._cause(workers, {worker.rank: message[1:]})
                    if message[0] == "said":
                        _pass_on(*message[1:])
                    if message[0] == kind or (message[0] == "end" and kind == "done"):
                        answers[worker.rank] = message
            except (EOFError, OSError):
                raise self._cause(workers) from None
            self._living()
            # Of those that are waited for the pipe tells; one that has answered may die too, and hold the others up.
            if any(not w.alive and w.connection not in pending for w in workers):
                raise self._cause(workers)
            now = time.monotonic()
            if now - looked > PAUSE_SECONDS:
                for worker in workers:
                    worker.heard = now
            looked = now
            if limit is not None and now - since > limit:
                waited = ", ".join(str(w) for w in workers if w.rank not in answers)
                raise WorkerError(f"{waited} got no further for {limit:.0f} s{hint(workers[0].device)}")
            for worker in workers:
                silent = now - worker.heard
                stopped = silent > _SILENCE_SECONDS and worker.stopped
                if worker.connection in pending and (silent > patience or stopped):
                    raise WorkerError(
                        f"{worker} is not answering for {silent:.0f} s (process {worker.process.pid}); it and the "
                        f"others were ended, the next decode starts new ones{worker.last_lines()}"
                    )
        return [answers[rank] for rank in range(count)]

    def _cause(self, workers: list[WorkerProcess], heard: dict[int, tuple[Any, ...]] | None = None) -> WanVAEError:
        self._living()  # else it was another thread
        return cause(workers, heard)

    def _end_when_idle(self) -> None:
        if not self.workers or self._idle_seconds > threading.TIMEOUT_MAX:
            return
        weak = weakref.ref(self)  # the timer alone does not keep a pool that nobody uses

        def end() -> None:
            pool = weak()
            if pool and pool._idle_timer is timer and pool._decoding.acquire(blocking=False):
                try:
                    if pool.workers:
                        logger.info("workers idle for %.0f s: ending them", pool._idle_seconds)
                    pool.stop()
                finally:
                    pool._decoding.release()

        timer = threading.Timer(self._idle_seconds, end)
        timer.daemon = True
        self._idle_timer = timer
        timer.start()

    def __reduce__(self) -> NoReturn:
        raise TypeError("workers can't be copied or pickled")

    def __del__(self) -> None:
        if getattr(self, "workers", None):
            self.stop()


def _in_shared_memory(checkpoint: Checkpoint) -> SharedMemory:
    """The decoder's tensors as a safetensors file: one copy for all workers."""
    tensors: dict[str, torch.Tensor] = {}
    storages = set()
    for key, value in checkpoint.decoder.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # the format knows no tensors that share memory
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    content = save(tensors)
    memory = SharedMemory.create(len(content))
    memory.write(content)
    return memory


def _pass_on(level: int, text: str) -> None:
    """Logs what a worker said; of warnings, which all of them may have, one."""
    if level >= logging.WARNING:
        say_once(text)
    else:
        logger.log(level, "%s", text)
