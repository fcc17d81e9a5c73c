"""A worker process: one rank, one device, its rows of each decode and encode.

It loads its modules, touches no device, and waits until it is told to. Parked, it holds nothing on its device but what
the driver keeps for a process.

Weights have an owner, the pool that they are of: two pools may take turns with the same workers, which keep both's.

What the parent says and what it hears, as tuples of plain values (see `pool`):

| parent | worker |
| --- | --- |
| | ``("prepared",)`` once, when its modules are loaded |
| ``("load", settings)``, then a file descriptor | nothing; in the file the ranks find one another |
| ``("weights", part, manifest)``, then another one | ``("ready", held)``: bytes held on the device |
| | ``("alive",)`` about once a second while it loads or decodes, whatever else goes on |
| | ``("said", level, text)`` what it logs; of news that concern all ranks the first one's |
| ``("open", request)``, then two file descriptors | ``("room", chunk)``: most latent frames at once that fit, or 0 |
| ``("begin", chunk)`` | nothing |
| ``("step",)`` | ``("done", frames, finite)`` when these frames' rows are in the buffer, or ``("end",)`` |
| ``("encode", request)`` | ``("room", chunk)``: most frames at once that fit, or 0 |
| ``("rings", request)``, then two file descriptors | nothing; the one is for pixels, the other for latents |
| ``("again", request)`` | nothing; the last encode's memory is this one's, too |
| ``("piece", counts)`` | ``("done", frames, finite, (least, most))``; on a GPU when the next piece has come |
| ``("last",)`` | the same once more |
| ``("finish",)`` | ``("finished", failed)`` when the decode's or encode's memory is free: `dispatch.kernels_failed` |
| ``("park",)`` | ``("parked",)`` when the device has its memory back |
| ``("close",)``, or the end of the pipe | the process ends |
| | ``("failed", kind, text)``, after which the process ends |
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import logging
import os
import pkgutil
import queue
import select
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from ..errors import is_out_of_memory, summary
from ..memory import give_back_host_memory
from ..model.lines import Piece
from ..ops.dispatch import kernels_failed
from ..ops.pixel_format import PixelFormat
from ..parallel.coordination import Coordinator, check_agreement
from ..parallel.edges import connect
from ..parallel.peer_memory import PeerMemory, open_peer_memory
from ..parallel.plan import ShardPlan, plan_shards
from ..parallel.rows import frame_rows, to_own_rows
from ..runtime.device_to_host import latents_to_host, to_host
from ..runtime.shard import ShardDecoder, ShardEncoder
from ..runtime.steps import Frames
from .shared_memory import SharedMemory, populate
from .shared_weights import Manifest, Part, shared_weights

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0
# Without another decode for so long, the one before lets go of its memory.
_IDLE_SECONDS = 0.2
# Of CUDA's limits: bytes of stack for each thread.
_STACK_SIZE = 0
_LEAST_STACK_BYTES = 256
# How many file descriptors follow a message.
_DESCRIPTORS = {"load": 1, "weights": 1, "open": 2, "rings": 2}


def load_kernels() -> None:
    """Loads what a worker on a GPU will want, which takes a moment, without a touch of the device."""

    def name_cache() -> None:
        # What Triton names its cache's entries after: it reads all of itself for that, half a gigabyte.
        with contextlib.suppress(ImportError, AttributeError):
            from triton.runtime.cache import triton_key

            triton_key()

    naming = threading.Thread(target=name_cache)  # as low in priority as this one
    naming.start()
    import torch.distributed._symmetric_memory  # noqa: F401

    with contextlib.suppress(ImportError):  # where something is missing, its use will say so
        from ..ops import kernels

        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    naming.join()


def main(connection: Connection, options: dict[str, Any]) -> None:
    """Serves the parent until it says so or is gone; ends the process."""
    worker = _Worker(connection, options)
    try:
        worker.serve()
    except BaseException as error:  # noqa: BLE001 (whatever it is, the parent is told, and the process ends)
        traceback.print_exc()
        kind = "memory" if isinstance(error, Exception) and is_out_of_memory(error) else "error"
        worker.send("failed", kind, summary(error) if kind == "memory" else f"{type(error).__name__}: {summary(error)}")
        worker.end(1)
    worker.end(0)


class _ToParent(logging.Handler):
    """Passes on what the engine logs here to the parent, whose log people read."""

    def __init__(self, worker: _Worker) -> None:
        super().__init__(logging.WARNING if worker.rank else logging.INFO)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.send("said", record.levelno, record.getMessage())


class _Worker:
    def __init__(self, connection: Connection, options: dict[str, Any]) -> None:
        self.connection = connection
        self.options = options
        self.rank: int = options["rank"]
        self.device = torch.device(options["device"])
        self._parent: int = options["parent"]
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        # Whether the parent listens; it does not between decodes.
        self._heard = False
        # What has been asked for and not begun yet; what to let go of while the main thread goes on.
        self._pages: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._gone: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        # What the last encode shared with the parent, for the next.
        self._rings: list[SharedMemory] = []
        # Whether the device has work for a while.
        self._busy = threading.Event()
        # Gives the device's memory back while the last frames are copied.
        self._emptying: threading.Thread | None = None
        self._store: int | None = None
        # By the pool whose weights they have, and the part. Each works on its own; all lie on the device together.
        self._decoders: dict[int, ShardDecoder] = {}
        self._encoders: dict[int, ShardEncoder] = {}
        # The one that works now.
        self._decoder: ShardDecoder | None = None
        self._group: dist.ProcessGroup | None = None
        self._peer_memory: PeerMemory | None = None
        # Whether devices have what they exchange bytes through.
        self._connected = False
        for work in (self._listen, self._make_pages, self._let_go):
            threading.Thread(target=work, daemon=True).start()

    def send(self, *message: object) -> None:
        """Tells the parent; a parent that is gone ends this process."""
        try:
            with self._sending:
                self.connection.send(message)
        except OSError:
            self.end(1)

    def end(self, code: int) -> None:
        """Ends the process at once, whatever its threads or the device wait for."""
        os._exit(code)

    def _check_parent(self) -> None:
        """Ends the process without its parent; one that the parent forked may hold the pipe open beyond its end."""
        if os.getppid() != self._parent:
            self.end(1)

    def _listen(self) -> None:
        """Takes the parent's words while the main thread works, shows that the process lives, sees the parent's end."""
        try:
            self._serve_listener()
        except BaseException:  # noqa: BLE001 (whatever it is: nobody would hear the parent any more)
            traceback.print_exc()
            self.end(1)

    def _serve_listener(self) -> None:
        # Not select, which knows no descriptors from 1024 on, and this one's number is the parent's.
        writable = select.poll()
        writable.register(self.connection, select.POLLOUT)
        while True:
            try:
                if not self.connection.poll(_HEARTBEAT_SECONDS):
                    self._check_parent()
                    # A parent that does not read, as in a callback that takes its time, knows enough already.
                    if self._heard and writable.poll(0):
                        self.send("alive")
                    continue
                message = self.connection.recv()
                if message[0] in ("load", "weights", "open", "encode", "park"):
                    self._heard = True
                # The descriptors follow their message, and must be taken before the next one.
                message = (*message, *(recv_handle(self.connection) for _ in range(_DESCRIPTORS.get(message[0], 0))))
            except (EOFError, OSError, RuntimeError):  # the last is recv_handle's, of a pipe that ends
                self.end(1)
            if message[0] == "close":
                self.end(0)
            self._commands.put(message)

    def _make_pages(self) -> None:
        """Brings pages of the video into being while the main thread launches and the device works."""
        while True:
            populate(self._pages.get())

    def _let_go(self) -> None:
        """Unmaps what was shared. The system takes longer for that than for a step, and whoever wants memory waits.

        So it is not done when the next decode begins, but when that keeps the device busy, or after a moment.
        """
        while True:
            shared = self._gone.get()
            self._busy.wait(_IDLE_SECONDS)
            shared.clear()

    def serve(self) -> None:
        logging.basicConfig()
        package = logging.getLogger(__name__.partition(".")[0])
        package.setLevel(logging.INFO)
        package.addHandler(_ToParent(self))
        self.send("prepared")
        while True:
            command, *arguments = self._commands.get()
            if command == "load":
                self._load(*arguments)
            elif command == "weights":
                self._take_weights(*arguments)
            elif command == "open":
                self._decode(*arguments)
            elif command == "encode":
                self._encode(*arguments)
            elif command == "park":
                self._park()
            # Else the rest of a decode that is over already.

    def _load(self, settings: dict[str, Any], store: int) -> None:
        self._heard = True
        os.environ.update(settings["environment"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.synchronize(self.device)  # while the parent reads the weights
        torch.set_num_threads(settings["threads"])
        if self._group is None:
            self._group = self._join_group(settings, store)
        else:
            os.close(store)

    def _take_weights(self, part: Part, manifest: Manifest, descriptor: int) -> None:
        self._heard = True
        assert self._group is not None, "weights came before the ranks' meeting"
        owner: int = manifest["owner"]
        # Of two sets of one pool's weights there is room for one. Nothing keeps the host's copy longer than this takes.
        self._decoder = None
        self._drop({*self._decoders, *self._encoders}.difference(manifest["kept"]))
        (self._decoders if part == "decoder" else self._encoders).pop(owner, None)
        model: ShardDecoder | ShardEncoder
        if part == "decoder":
            model = ShardDecoder(*shared_weights(descriptor, manifest), self.device, manifest["dtype"])
            self._decoders[owner] = model
        else:
            model = ShardEncoder(*shared_weights(descriptor, manifest), self.device, manifest["dtype"])
            self._encoders[owner] = model
        coordinator = Coordinator(self._group)
        check_agreement(model.facts(), coordinator)
        model.tune(coordinator)
        if not self._connected:
            self._peer_memory = open_peer_memory(self._group, self.device, coordinator)
            if self._peer_memory is None:
                connect(self._group, self.device)
            self._connected = True
        if isinstance(model, ShardDecoder) and manifest["soon"]:
            self._rehearse(model, coordinator, *manifest["soon"])
        held = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0
        if self._peer_memory:
            held += self._peer_memory.size
        self._heard = False
        self.send("ready", held)

    def _rehearse(self, decoder: ShardDecoder, coordinator: Coordinator, shape: torch.Size, asked: int) -> None:
        """Compiles the kernels of a decode that the parent has begun by itself, which goes on the longer."""
        group = self._group
        assert group is not None
        plan = plan_shards(shape[3], shape[4], dist.get_world_size(group))
        room = decoder.room(plan, self.rank, shape, asked) if self.rank < plan.shards else 0
        chunk = min((one for one in coordinator.exchange(room) if one), default=0)
        if room:
            try:
                decoder.rehearse(plan, group, shape, chunk, self._peer_memory)
            except Exception as error:  # noqa: BLE001 (what fails here does so in the decode, which tells of it)
                logger.debug("no kernels were compiled ahead: %s", error)
        self._empty_cache()

    def _drop(self, owners: Iterable[int]) -> None:
        """Lets go of some pools' weights."""
        for owner in owners:
            self._decoders.pop(owner, None)
            self._encoders.pop(owner, None)

    def _park(self) -> None:
        self._decoder = None
        self._rings = []
        self._drop({*self._decoders, *self._encoders})
        self._connected = False
        if self.device.type == "cuda" and self._peer_memory is None and self._group is not None:
            # NCCL's memory is the group's; without it the group may stay.
            dist.destroy_process_group()
            self._group = None
        self._peer_memory = None
        gc.collect()
        if self.device.type == "cuda":
            give_back(self.device)
        self._heard = False
        self.send("parked")

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # which each thread has its own of
                torch.cuda.synchronize()
                torch.cuda.empty_cache()

    def _join_group(self, settings: dict[str, Any], store: int) -> dist.ProcessGroup:
        if self._store is not None:
            os.close(self._store)
        self._store = store  # open as long as the group
        size = self.options["world_size"]
        # A file without a name: closed to other users, and gone with the last rank.
        dist.init_process_group(
            settings["backend"],
            store=FileStore(f"/proc/self/fd/{store}", size),
            rank=self.rank,
            world_size=size,
        )
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def _decode(self, request: dict[str, Any], latents_file: int, frames_file: int) -> None:
        self._heard = True  # once more: the decode before this one may have ended behind this one's word
        group = self._group
        assert request["owner"] in self._decoders, "a decode was opened on a worker without weights"
        decoder = self._decoder = self._decoders[request["owner"]]
        latents_memory = SharedMemory(latents_file, request["latents_size"])
        frames_memory = SharedMemory(frames_file, request["frames_size"])
        latents_memory.close()
        frames_memory.close()
        latents = latents_memory.tensor(request["latents_shape"], request["latents_dtype"])
        pixels = PixelFormat(**request["pixels"]) if request["pixels"] else None
        batch, total, height, width, colours = request["frames_shape"]
        values = pixels.frame_bytes(height, width) if pixels else height * width * colours
        video = frames_memory.tensor(torch.Size((batch, total, values)), request["frames_dtype"])
        shared = [latents_memory, frames_memory, video]
        del latents_memory, frames_memory
        plan = plan_shards(latents.shape[3], latents.shape[4], dist.get_world_size(group))
        idle = self.rank >= plan.shards
        if idle:
            self.send("room", request["chunk"])
        else:
            self.send("room", decoder.room(plan, self.rank, latents.shape, request["chunk"]))
            # Already, while the parent hears of it.
            latents = decoder.own_rows(latents, plan, self.rank)
        steps: Iterator[tuple[int, bool]] | None = None
        while True:
            command, *arguments = self._commands.get()
            if command == "begin":
                if idle:
                    steps = iter(())
                    continue
                start, stop = frame_rows(plan, self.rank, decoder.architecture.spatial_ratio)
                row = width * colours
                runs = pixels.row_runs(height, width, start, stop) if pixels else [(start * row, stop * row)]
                steps = self._steps(latents, video, runs, plan, arguments[0], pixels)
            elif command == "step" and steps is not None:
                done = next(steps, None)
                self.send("end") if done is None else self.send("done", *done)
            elif command == "finish":
                break
        del steps, latents, video
        self._finish(shared)

    def _finish(self, shared: list[Any]) -> None:
        """Ends a decode or an encode, whose ``shared`` memory it lets go."""
        self._busy.clear()
        if self._emptying:
            self._emptying.join()
            self._emptying = None
        else:
            self._empty_cache()
        self._heard = False
        self.send("finished", kernels_failed(self.device))
        if self.device.type == "cpu":
            give_back_host_memory()
        # The mappings go after that word: the parent has its own, and need not wait.
        self._gone.put(shared)

    def _encode(self, request: dict[str, Any]) -> None:
        self._heard = True
        group = self._group
        assert request["owner"] in self._encoders, "an encode was opened on a worker without weights"
        encoder = self._encoders[request["owner"]]
        plan = plan_shards(request["rows"], request["columns"], dist.get_world_size(group))
        idle = self.rank >= plan.shards
        asked, image = request["chunk"], request["image"]
        self.send("room", asked if idle else encoder.room(plan, self.rank, request["frames"], asked, image=image))
        # Until there is memory for it, or the encode ends before it has begun.
        while (message := self._commands.get())[0] not in ("rings", "again", "finish"):
            pass
        if message[0] != "finish":
            command, wanted, *descriptors = message
            if command == "rings":
                self._gone.put(self._rings)
                self._rings = [SharedMemory(*pair) for pair in zip(descriptors, wanted["sizes"], strict=True)]
                for memory in self._rings:
                    memory.close()
            with contextlib.suppress(_Finished):
                if not idle:
                    self._encode_pieces(encoder, plan, wanted, *self._rings, image=image)
                while self._commands.get()[0] != "finish":
                    pass
            if not wanted["kept"]:
                self._gone.put(self._rings)
                self._rings = []
        self._finish([])

    def _encode_pieces(
        self,
        encoder: ShardEncoder,
        plan: ShardPlan,
        request: dict[str, Any],
        pixel_memory: SharedMemory,
        latent_memory: SharedMemory,
        *,
        image: bool,
    ) -> None:
        """Encodes this rank's rows of each piece; `_Finished` ends it early."""
        group = self._group
        assert group is not None
        pixels = pixel_memory.tensor(request["pixels_shape"], request["pixels_dtype"])
        latents = latent_memory.tensor(request["latents_shape"], request["latents_dtype"])
        start, stop = plan.bounds[self.rank], plan.bounds[self.rank + 1]
        own = latents[..., start:stop] if plan.transposed else latents[..., start:stop, :]

        def pieces() -> Iterator[Piece]:
            for number in itertools.count():
                command, *arguments = self._commands.get()
                if command == "last":
                    return
                if command == "finish":
                    raise _Finished
                (counts,) = arguments
                new = counts.count(0)
                yield Piece(pixels[number % len(pixels), :new] if new else None, counts)
                self._busy.set()

        steps = encoder.steps(
            pieces(), plan, group, request["chunk"], self._peer_memory, image=image, pixels=pixels.dtype
        )
        for number, (means, finite, least, most) in enumerate(latents_to_host(steps, self.device)):
            count = 0
            if means is not None:
                count = means.shape[1]
                own[number % len(own), :, :count].copy_(means)
            self.send("done", count, finite, (least, most))

    def _steps(
        self,
        latents: torch.Tensor,
        video: torch.Tensor,
        runs: Sequence[tuple[int, int]],
        plan: ShardPlan,
        chunk: int,
        pixels: PixelFormat | None = None,
    ) -> Iterator[tuple[int, bool]]:
        """Decodes this rank's rows into ``video``; yields how many more frames are in it, and whether without NaN.

        Args:
            latents: of this rank's rows.
            video: ``[B, T, n]``, all values of a frame in a row.
            runs: which of a frame's values are of this rank's rows, first and last; one run a plane.
            plan: the split.
            chunk: latent frames at once.
            pixels: what to make of the frames; by default nothing.
        """
        decoder, group = self._decoder, self._group
        assert decoder is not None
        assert group is not None
        ratio = decoder.architecture.spatial_ratio
        shards = decoder.steps(latents, plan, group, chunk, self._peer_memory)
        own_runs = [video[..., start:stop] for start, stop in runs]

        more = True

        def launched() -> Iterator[Frames]:
            nonlocal more
            done = 0
            for frames in shards:
                own = to_own_rows(frames, plan, group, ratio, self._peer_memory)
                # While the device works on them; of the video no more than that, since whoever streams it takes no
                # more memory.
                for frame in itertools.chain.from_iterable(
                    one for run in own_runs for one in run[:, done : done + own.shape[1]]
                ):
                    self._pages.put(frame)
                done += own.shape[1]
                yield Frames.of(own, pixels)
                del own, frames
                self._busy.set()
            more = False

        done = 0
        for frames, finite in to_host(launched(), self.device):
            count = frames.shape[1]
            if not more:
                self._emptying = threading.Thread(target=self._empty_cache)
                self._emptying.start()
            # Rows of one frame's plane lie together in the video: each copy is one run of bytes.
            parts = frames.flatten(2).split([stop - start for start, stop in runs], dim=2)
            for run, values in zip(own_runs, parts, strict=True):
                for into, part in zip(run[:, done : done + count], values, strict=True):
                    for frame_into, frame in zip(into, part, strict=True):
                        frame_into.copy_(frame)
            done += count
            yield count, finite


class _Finished(Exception):
    """The parent wants no more."""


def give_back(device: torch.device) -> None:
    """Returns to ``device`` all memory that this process can do without while it does nothing."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        # Threads' stacks, for as many threads as the device can run at once: those of the kernels that ran. A kernel
        # that needs more gets it with its launch.
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(_LEAST_STACK_BYTES))
