"""A worker process: one rank, one device, its rows of each decode.

What the parent says and what it hears, as tuples of plain values (see `pool`):

| parent | worker |
| --- | --- |
| ``("files", weights)``, then a file descriptor | nothing; in the file the ranks find one another |
| if ``weights`` says so, another one | nothing; that file is the checkpoint |
| | ``("alive",)`` about once a second while it starts or decodes, whatever else goes on |
| | ``("said", level, text)`` what it logs; of news that concern all ranks the first one's |
| | ``("ready",)`` once, when the group stands and the weights are there |
| ``("open", request)``, then two file descriptors | ``("room", chunk)``: most latent frames at once that fit, or 0 |
| ``("begin", chunk)`` | nothing |
| ``("step",)`` | ``("done", frames, finite)`` when these frames' rows are in the buffer, or ``("end",)`` |
| ``("finish",)`` | ``("finished",)`` when the decode's memory is free |
| ``("close",)``, or the end of the pipe | the process ends |
| | ``("failed", kind, text)``, after which the process ends |
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from ..checkpoint import read_checkpoint
from ..errors import is_out_of_memory
from ..parallel.agree import Board, check_agreement
from ..parallel.edges import connect
from ..parallel.mailbox import Mailbox, open_mailbox
from ..parallel.plan import ShardPlan, plan_shards
from ..parallel.rows import frame_rows, to_own_rows
from ..tensor_file import FileVersion
from .download import to_host
from .shard import ShardDecoder
from .shared_memory import SharedMemory, populate

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0


def main(connection: Connection, options: dict[str, Any]) -> None:
    """Serves the parent until it says so or is gone; ends the process."""
    worker = _Worker(connection, options)
    try:
        worker.serve()
    except BaseException as error:  # noqa: BLE001 (whatever it is, the parent is told, and the process ends)
        traceback.print_exc()
        kind = "memory" if isinstance(error, Exception) and is_out_of_memory(error) else "error"
        worker.send("failed", kind, f"{type(error).__name__}: {error}")
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
        self.dtype: torch.dtype = getattr(torch, options["dtype"])
        self._parent: int = options["parent"]
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        # Whether the parent listens; it does not between decodes.
        self._heard = True
        while not connection.poll(_HEARTBEAT_SECONDS):
            self._check_parent()
        _, weights = connection.recv()
        self._store = recv_handle(connection)
        self._weights: int | None = recv_handle(connection) if weights else None
        self._decoder: ShardDecoder
        self._group: dist.ProcessGroup
        self._mailbox: Mailbox | None
        threading.Thread(target=self._listen, daemon=True).start()

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
        while True:
            try:
                if not self.connection.poll(_HEARTBEAT_SECONDS):
                    self._check_parent()
                    # A parent that does not read, as in a callback that takes its time, knows enough already.
                    if self._heard and select.select([], [self.connection], [], 0)[1]:
                        self.send("alive")
                    continue
                message = self.connection.recv()
                if message[0] == "open":
                    self._heard = True
                    # The descriptors follow their message, and must be taken before the next one.
                    message = (*message, recv_handle(self.connection), recv_handle(self.connection))
            except (EOFError, OSError, RuntimeError):  # the last is recv_handle's, of a pipe that ends
                self.end(1)
            if message[0] == "close":
                self.end(0)
            self._commands.put(message)

    def serve(self) -> None:
        logging.basicConfig()
        package = logging.getLogger(__name__.partition(".")[0])
        package.setLevel(logging.INFO)
        package.addHandler(_ToParent(self))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_num_threads(self.options["threads"])
        self._join_group()
        path = self.options["weights"] if self._weights is None else f"/proc/self/fd/{self._weights}"
        version = self.options["version"] and FileVersion(*self.options["version"])
        self._decoder = ShardDecoder(read_checkpoint(path, version), self.device, self.dtype)
        if self._weights is not None:
            os.close(self._weights)  # the last that keeps the host's copy
        board = Board(self._group)
        check_agreement(self._decoder.facts(), board)
        self._decoder.settle(board)
        connect(self._group, self.device)
        self._mailbox = open_mailbox(self._group, self.device, board)
        self._heard = False
        self.send("ready")
        while True:
            command, *arguments = self._commands.get()
            if command == "open":
                self._decode(*arguments)
            # Else the rest of a decode that is over already.

    def _join_group(self) -> None:
        size = self.options["world_size"]
        # A file without a name: closed to other users, and gone with the last rank.
        store = FileStore(f"/proc/self/fd/{self._store}", size)
        device_id = self.device if self.device.type == "cuda" else None
        backend = self.options["backend"]
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size, device_id=device_id)
        assert dist.group.WORLD is not None
        self._group = dist.group.WORLD

    def _decode(self, request: dict[str, Any], latents_file: int, frames_file: int) -> None:
        self._heard = True  # once more: the decode before this one may have ended behind this one's word
        latents_memory = SharedMemory(latents_file, request["latents_size"])
        frames_memory = SharedMemory(frames_file, request["frames_size"])
        latents_memory.close()
        frames_memory.close()
        latents = latents_memory.tensor(request["latents_shape"], request["latents_dtype"])
        video = frames_memory.tensor(request["frames_shape"], request["frames_dtype"])
        plan = plan_shards(latents.shape[3], latents.shape[4], dist.get_world_size())
        idle = self.rank >= plan.shards
        self.send(
            "room", request["chunk"] if idle else self._decoder.room(plan, self.rank, latents.shape, request["chunk"])
        )
        steps: Iterator[tuple[int, bool]] | None = None
        while True:
            command, *arguments = self._commands.get()
            if command == "begin":
                steps = iter(()) if idle else self._steps(latents, video, plan, *arguments)
            elif command == "step" and steps is not None:
                done = next(steps, None)
                self.send("end") if done is None else self.send("done", *done)
            elif command == "finish":
                break
        del steps
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        self._heard = False
        self.send("finished")
        # The mappings go after that word: the parent has its own, and need not wait.

    def _steps(
        self, latents: torch.Tensor, video: torch.Tensor, plan: ShardPlan, chunk: int
    ) -> Iterator[tuple[int, bool]]:
        """Decodes this rank's rows into ``video``; yields how many more frames are in it, and whether without NaN."""
        ratio = self._decoder.architecture.spatial_ratio
        shards = self._decoder.steps(latents, plan, self._group, chunk, self._mailbox)
        start, stop = frame_rows(plan, self.rank, ratio)
        own_rows = video[:, :, start:stop]

        def launched() -> Iterator[torch.Tensor]:
            done = 0
            for frames in shards:
                own = to_own_rows(frames, plan, self._group, ratio)
                # While the device works on them; of the video no more than that, since whoever streams it takes no
                # more memory.
                for part in own_rows[:, done : done + own.shape[1]]:
                    for frame in part:
                        populate(frame)
                done += own.shape[1]
                yield own

        done = 0
        for frames, finite in to_host(launched(), self.device):
            count = frames.shape[1]
            # Rows of one frame lie together in the video: each copy is one run of bytes.
            for into, part in zip(own_rows[:, done : done + count], frames, strict=True):
                for frame_into, frame in zip(into, part, strict=True):
                    frame_into.copy_(frame)
            done += count
            yield count, finite
