"""A pool of worker processes, one a device, that decode one video together.

The parent commands step after step and stays a few ahead; workers can't disagree on when to stop, because stopping is
that no next step comes. Each writes its rows into memory that all share and that becomes the returned tensor.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoint import Checkpoint
from ..errors import WanVAEError, WorkerError
from .pool_run import START_SECONDS, PoolRun, StepOutOfMemory
from .process import WorkerProcess
from .shared_memory import SharedMemory

logger = logging.getLogger(__name__)

# A worker that says nothing for so long is stopped or stuck; it says something every second.
_SILENCE_SECONDS = 7.0
# What the others of a worker that died still say within this time tells whose fault it was.
_CAUSE_SECONDS = 1.0
_COPY_THREADS = 4
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# ComfyUI's choice of allocator is not the workers': cudaMallocAsync can't share memory between processes.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


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
        weights: Callable[[], Checkpoint],
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
        self._decoding = threading.Lock()
        self._decoder_thread: int | None = None
        self._idle_timer: threading.Timer | None = None

    @property
    def running(self) -> bool:
        """Whether the workers live."""
        return bool(self.workers)

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
        if self._decoder_thread == threading.get_ident():
            raise WanVAEError(
                "another decode of this VAE is open in this very thread; finish or close its stream first"
            )
        self._decoding.acquire()
        self._decoder_thread = threading.get_ident()
        if self._idle_timer:
            self._idle_timer.cancel()

    def leave(self) -> None:
        """Ends what `enter` began; from now on the workers are idle."""
        self._end_when_idle()
        self._decoder_thread = None
        self._decoding.release()

    def start(self) -> None:
        """Starts the workers if there are none, and waits until they are ready."""
        if self.workers:
            return
        cuda = self.devices[0].type == "cuda"
        checkpoint, memory = self._weights(), None
        path = self._path
        if path is None:
            # One copy for all workers, which open it through the parent's descriptor.
            content = bytearray(
                save({key: value.detach().cpu().contiguous() for key, value in checkpoint.decoder.items()})
            )
            memory = SharedMemory.create(len(content))
            memory.tensor(torch.Size((len(content),)), torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
            path = Path(f"/proc/{os.getpid()}/fd/{memory.descriptor}")
        options = {
            "world_size": len(self.devices),
            "dtype": self.dtype,
            "backend": "nccl" if cuda else "gloo",
            "weights": str(path.absolute()),
            # On GPUs the host only copies frames: more threads than these would only be in each other's way.
            "threads": min(_COPY_THREADS if cuda else 2**10, max(1, torch.get_num_threads() // len(self.devices))),
        }
        # All ranks are on this machine: nothing needs to listen beyond it.
        interfaces = {name: os.environ.get(name, "lo") for name in _INTERFACE_VARIABLES}
        environment = {**dict.fromkeys(_ALLOCATOR_VARIABLES), **interfaces}
        started = time.monotonic()
        store = os.memfd_create("wan-vae-parallel-store", os.MFD_CLOEXEC)
        try:
            for rank, device in enumerate(self.devices):
                self.workers.append(WorkerProcess(rank, device, options, environment))
            for worker in self.workers:
                worker.connection.send(("store",))
                send_handle(worker.connection, store, worker.process.pid)
            self.gather("ready", len(self.workers), patience=START_SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(store)
            if memory:
                memory.close()
        names = ", ".join(map(str, self.devices))
        logger.info("%d workers on %s started in %.1f s", len(self.workers), names, time.monotonic() - started)

    def stop(self, grace: float = 2.0) -> None:
        """Ends all workers, however they are: asked, then after ``grace`` seconds killed."""
        workers, self.workers = self.workers, []
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.connection.send(("close",))
        deadline = time.monotonic() + grace
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()

    def tell(self, *message: object) -> None:
        """Sends ``message`` to all workers."""
        workers = self._living()
        for worker in workers:
            try:
                worker.connection.send(message)
            except OSError:
                raise self._cause(workers) from None

    def _living(self) -> list[WorkerProcess]:
        """The workers; another thread, or a callback, may have ended them."""
        if not self.workers:
            raise WorkerError("the workers were ended while they decoded; the next decode starts new ones")
        return list(self.workers)

    def gather(self, kind: str, count: int, *, patience: float = _SILENCE_SECONDS) -> list[tuple[Any, ...]]:
        """Waits for a message of ``kind`` (for ``"done"`` also ``"end"``) from each of the first ``count`` workers."""
        answers: dict[int, tuple[Any, ...]] = {}
        workers = self._living()
        waiting: dict[object, WorkerProcess] = {worker.connection: worker for worker in workers}
        since = time.monotonic()
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
                    if message[0] == kind or (message[0] == "end" and kind == "done"):
                        answers[worker.rank] = message
            except (EOFError, OSError):
                raise self._cause(workers) from None
            self._living()
            # What a worker said last may still lie in its pipe when it is dead.
            if any(not w.process.is_alive() and not w.connection.poll() for w in workers):
                raise self._cause(workers)
            for worker in workers:
                if worker.connection in pending and time.monotonic() - worker.heard > patience:
                    raise WorkerError(
                        f"{worker} is not answering for {patience:.0f} s (process {worker.process.pid}); it and the "
                        f"others were ended, the next decode starts new ones{worker.last_lines()}"
                    )
        return [answers[rank] for rank in range(count)]

    def _cause(self, workers: list[WorkerProcess], heard: dict[int, tuple[Any, ...]] | None = None) -> WanVAEError:
        """Why the workers end, once one has: the first to fall takes others along, which then say so too."""
        self._living()
        failed = dict(heard or {})
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline and any(w.process.is_alive() for w in workers):
            time.sleep(0.05)
        for worker in workers:
            with contextlib.suppress(EOFError, OSError):
                while worker.connection.poll():
                    message = worker.connection.recv()
                    if message[0] == "failed":
                        failed[worker.rank] = message[1:]
        codes = {worker.rank: worker.process.exitcode for worker in workers}
        for rank, (kind, text) in failed.items():
            if kind == "memory":
                return self._failure(workers[rank], kind, text)
        for worker in workers:
            if (codes[worker.rank] or 0) < 0:  # killed from outside
                return self._death(worker)
        for rank, (kind, text) in failed.items():
            return self._failure(workers[rank], kind, text)
        return self._death(next((w for w in workers if codes[w.rank] is not None), workers[0]))

    def _death(self, worker: WorkerProcess) -> WorkerError:
        return WorkerError(
            f"{worker} died with exit code {worker.process.exitcode}; the others were ended, the next decode starts "
            f"new ones{worker.last_lines()}"
        )

    def _failure(self, worker: WorkerProcess, kind: str, text: str) -> WanVAEError:
        if kind == "memory":
            return StepOutOfMemory(f"{worker} ran out of memory: {text}")
        hint = ""
        for name in _INTERFACE_VARIABLES:
            value = os.environ.get(name)
            if value and (value in text or ("NCCL" in text and name.startswith("NCCL"))):
                hint += f"; {name} is {value!r}: name an interface of this machine, or unset {name}"
        if "NCCL" in text:
            hint += (
                "; if the GPUs can't reach one another, try NCCL_P2P_DISABLE=1, or give the container more shared "
                "memory (--shm-size, --ipc=host)"
            )
        return WorkerError(f"{worker} failed: {text}{hint}{worker.last_lines()}")

    def _end_when_idle(self) -> None:
        weak = weakref.ref(self)  # the timer alone does not keep a pool that nobody uses

        def end() -> None:
            pool = weak()
            if pool and pool._decoding.acquire(blocking=False):
                try:
                    logger.info("workers idle for %.0f s: ending them", pool._idle_seconds)
                    pool.stop()
                finally:
                    pool._decoding.release()

        self._idle_timer = threading.Timer(self._idle_seconds, end)
        self._idle_timer.daemon = True
        self._idle_timer.start()

    def __del__(self) -> None:
        if self.workers:
            self.stop()
