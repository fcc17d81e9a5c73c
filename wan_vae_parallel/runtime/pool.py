"""A pool of worker processes, one a device, that decode one video together.

The parent commands step after step and stays a few ahead; workers can't disagree on when to stop, because stopping is
that no next step comes. Each writes its rows into memory that all share and that becomes the returned tensor.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoint import Checkpoint
from ..errors import OutOfMemoryError, WanVAEError, WorkerError
from ..parallel.plan import describe_plan, plan_shards
from . import bootstrap
from .shared_memory import SharedMemory

logger = logging.getLogger(__name__)

# Steps that are commanded before the first of them is done: the devices never wait for the parent.
_AHEAD = 3
# A worker that says nothing for so long is stopped or stuck; it says something every second.
_SILENCE_SECONDS = 7.0
# Loading torch, CUDA and NCCL on many devices at once, from a cold disk.
_START_SECONDS = 300.0
# What the others of a worker that died still say within this time tells whose fault it was.
_CAUSE_SECONDS = 1.0
_LOG_LINES = 20
_COPY_THREADS = 4
# ComfyUI's choice of allocator is not the workers': cudaMallocAsync can't share memory between processes.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

_start_lock = threading.Lock()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, rank: int, device: torch.device, options: dict[str, Any], environment: dict[str, Any]) -> None:
        self.rank = rank
        self.device = device
        self.lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self.heard = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        log, their_log = context.Pipe(duplex=False)
        self.process = context.Process(
            target=runpy.run_path,
            args=(bootstrap.__file__,),
            kwargs={
                "init_globals": {
                    "connection": theirs,
                    "log": their_log,
                    "environment": environment,
                    "options": {**options, "rank": rank, "device": str(device)},
                },
                "run_name": "__wan_vae_worker__",
            },
            name=f"wan-vae-worker-{rank}",
            daemon=True,
        )
        with _hidden_main():
            self.process.start()
        theirs.close()
        their_log.close()
        self._reader = threading.Thread(target=self._read_log, args=(log,), daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.device}"

    def last_lines(self) -> str:
        """What it printed last, for a message."""
        self._reader.join(0.5)  # a dead worker's pipe ends; a living one's goes on
        return "; its last lines:\n" + "\n".join(self.lines) if self.lines else ""

    def _read_log(self, log: Connection) -> None:
        with log, open(log.fileno(), errors="replace", closefd=False) as stream:
            for line in stream:
                self.lines.append(line.rstrip())
                logger.debug("%s: %s", self, self.lines[-1])


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
        self._workers: list[_Worker] = []
        self._decoding = threading.Lock()
        self._decoder_thread: int | None = None
        self._idle_timer: threading.Timer | None = None

    @property
    def running(self) -> bool:
        """Whether the workers live."""
        return bool(self._workers)

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
        self._stop()

    def _start(self) -> None:
        if self._workers:
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
        interfaces = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        environment = {**dict.fromkeys(_ALLOCATOR_VARIABLES), **interfaces}
        started = time.monotonic()
        store = os.memfd_create("wan-vae-parallel-store", os.MFD_CLOEXEC)
        try:
            for rank, device in enumerate(self.devices):
                self._workers.append(_Worker(rank, device, options, environment))
            for worker in self._workers:
                worker.connection.send(("store",))
                send_handle(worker.connection, store, worker.process.pid)
            self._gather("ready", len(self._workers), patience=_START_SECONDS)
        except BaseException:
            self._stop()
            raise
        finally:
            os.close(store)
            if memory:
                memory.close()
        names = ", ".join(map(str, self.devices))
        logger.info("%d workers on %s started in %.1f s", len(self._workers), names, time.monotonic() - started)

    def _stop(self, grace: float = 2.0) -> None:
        """Ends all workers, however they are: asked, then after ``grace`` seconds killed."""
        workers, self._workers = self._workers, []
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

    def _tell(self, *message: object) -> None:
        workers = self._living()
        for worker in workers:
            try:
                worker.connection.send(message)
            except OSError:
                raise self._cause(workers) from None

    def _living(self) -> list[_Worker]:
        """The workers; another thread, or a callback, may have ended them."""
        if not self._workers:
            raise WorkerError("the workers were ended while they decoded; the next decode starts new ones")
        return list(self._workers)

    def _gather(self, kind: str, count: int, *, patience: float = _SILENCE_SECONDS) -> list[tuple[Any, ...]]:
        """Waits for a message of ``kind`` (for ``"done"`` also ``"end"``) from each of the first ``count`` workers."""
        answers: dict[int, tuple[Any, ...]] = {}
        workers = self._living()
        waiting: dict[object, _Worker] = {worker.connection: worker for worker in workers}
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

    def _cause(self, workers: list[_Worker], heard: dict[int, tuple[Any, ...]] | None = None) -> WanVAEError:
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

    def _death(self, worker: _Worker) -> WorkerError:
        return WorkerError(
            f"{worker} died with exit code {worker.process.exitcode}; the others were ended, the next decode starts "
            f"new ones{worker.last_lines()}"
        )

    def _failure(self, worker: _Worker, kind: str, text: str) -> WanVAEError:
        if kind == "memory":
            return _StepOutOfMemory(f"{worker} ran out of memory: {text}")
        hint = ""
        if "NCCL" in text:
            hint = (
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
                    pool._stop()
                finally:
                    pool._decoding.release()

        self._idle_timer = threading.Timer(self._idle_seconds, end)
        self._idle_timer.daemon = True
        self._idle_timer.start()

    def __del__(self) -> None:
        if self._workers:
            self._stop()


class _StepOutOfMemory(WanVAEError):
    """A worker ran out of memory in the middle of a step, where the others wait for it."""


class PoolRun:
    """One decode of a pool: iterate for the frames as they become final; close it in any case."""

    def __init__(self, pool: WorkerPool, latents: torch.Tensor, video_shape: torch.Size, chunk: int) -> None:
        self._pool = pool
        self._chunk = chunk
        self._begun = 0
        if pool._decoder_thread == threading.get_ident():
            raise WanVAEError(
                "another decode of this VAE is open in this very thread; finish or close its stream first"
            )
        pool._decoding.acquire()
        pool._decoder_thread = threading.get_ident()
        try:
            if pool._idle_timer:
                pool._idle_timer.cancel()
            self._latents_shape = latents.shape
            # In shared memory once, for all workers.
            source = latents.detach().to("cpu").contiguous()
            self._latents_memory = SharedMemory.create(max(1, source.nbytes))
            self._latents_memory.tensor(source.shape, source.dtype).copy_(source)
            self._latents_dtype = source.dtype
            dtype = torch.promote_types(pool.dtype, torch.float32)
            self._video_memory = SharedMemory.create(video_shape.numel() * dtype.itemsize)
            self.video = self._video_memory.tensor(video_shape, dtype)
            plan = plan_shards(latents.shape[3], latents.shape[4], len(pool.devices))
            self._shards = plan.shards
            logger.info("decoding on %s", describe_plan(plan, pool.devices))
        except BaseException:
            self._leave()
            raise

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[B, t, H, W, C]``, views of `video`."""
        chunk, sent = self._chunk, 0
        while True:
            done = 0
            try:
                for count in self._attempt(chunk):
                    fresh = self.video[:, max(done, sent) : done + count]
                    done += count
                    if fresh.shape[1]:
                        sent = done
                        yield fresh
                return
            except _StepOutOfMemory as error:
                self._pool._stop()
                if self._begun <= 1:
                    raise OutOfMemoryError(f"{error}; not even one latent frame at a time fits") from error
                chunk = self._begun // 2
                logger.warning("%s; going on with chunk %d, same frames", error, chunk)
            except WorkerError:
                self._pool._stop(grace=0.5)
                raise

    def _attempt(self, chunk: int) -> Iterator[int]:
        """Decodes from the beginning; yields the number of new frames of each step."""
        pool = self._pool
        pool._start()
        self._open(chunk)
        room = [answer[1] for answer in pool._gather("room", self._shards, patience=_START_SECONDS)]
        self._begun = min(room)
        if self._begun == 0:
            pool._tell("finish")
            short = [str(pool.devices[rank]) for rank, most in enumerate(room) if most == 0]
            raise OutOfMemoryError(
                f"{', '.join(short)} has not the memory for its rows, even one latent frame at a time; use more "
                f"devices, free some of its memory, or decode smaller frames"
            )
        pool._tell("begin", self._begun)
        ahead = 0
        while True:
            while ahead < _AHEAD:
                pool._tell("step")
                ahead += 1
            answers = pool._gather("done", self._shards)
            ahead -= 1
            counts = {answer[1] if answer[0] == "done" else 0 for answer in answers}
            if len(counts) != 1:
                raise WorkerError(f"workers disagree on the frames of a step: {sorted(counts)}")
            if counts == {0}:
                return
            yield counts.pop()

    def _open(self, chunk: int) -> None:
        request = {
            "latents_shape": self._latents_shape,
            "latents_dtype": self._latents_dtype,
            "latents_size": self._latents_memory.size,
            "frames_shape": self.video.shape,
            "frames_dtype": self.video.dtype,
            "frames_size": self._video_memory.size,
            "chunk": chunk,
        }
        self._pool._tell("open", request)
        for worker in self._pool._workers:
            for memory in (self._latents_memory, self._video_memory):
                send_handle(worker.connection, memory.descriptor, worker.process.pid)

    def close(self) -> None:
        """Ends the decode where it is; the workers free its memory and stay, `video` stays the caller's."""
        pool = self._pool
        try:
            if pool._workers:
                pool._tell("finish")
                pool._gather("finished", len(pool._workers), patience=_START_SECONDS)
        except WanVAEError as error:
            # The decode is over either way; the next one starts new workers.
            logger.warning("%s", error)
            pool._stop()
        finally:
            self._latents_memory.close()
            self._video_memory.close()
            pool._end_when_idle()
            self._leave()

    def _leave(self) -> None:
        self._pool._decoder_thread = None
        self._pool._decoding.release()


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Lets a process be spawned without its running the parent's main program again, which may be ComfyUI's."""
    with _start_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
