"""What ``torchrun`` started: its process group, and an end on all machines that leaves nothing half-written."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .errors import DeviceError, WanVAEError, WorkerError, summary
from .files.whole import remove_unfinished
from .parallel.coordination import (
    LOOK_SECONDS,
    WORD_SECONDS,
    WORK_SECONDS,
    failure,
    report_failure,
    with_rank,
    word_store,
)
from .workers.heartbeat import PAUSE_SECONDS, SILENT_SECONDS, Heartbeat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# torchrun, which tells processes to end, itself kills after 30.
_UNWIND_SECONDS = 3.0
_TOLD_SECONDS = 10.0


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def torchrun_group(devices: str) -> Iterator[dist.ProcessGroup]:
    """The group of all processes that torchrun started: over NCCL with a GPU each, over gloo on the CPU.

    An error in it ends all of them within seconds: those that hear of it raise it too, and those that can't, since
    they wait for a rank that is gone, are ended. A rank that is stopped, or whose machine is gone, is an error too.

    Args:
        devices: ``"auto"`` or ``"cpu"``.

    Raises:
        DeviceError: more processes on this machine than GPUs.
        WorkerError: the processes can't reach one another.
    """
    cuda = devices != "cpu" and torch.cuda.is_available()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    name = f"rank {rank} on {socket.gethostname()}/{f'cuda:{local_rank}' if cuda else 'cpu'}"
    store, words = _store(name), word_store(_store(name), range(world_size))
    heartbeat = Heartbeat(words, rank, name, world_size, _neighbours(rank, world_size))
    over = _watch(words, name, heartbeat)
    try:
        _join(store, name, torch.device("cuda", local_rank) if cuda else None)
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    except BaseException as error:
        # The others hear of it and raise it too. If they may be in the middle of a decode, they get the time to be
        # ended before their connections to this process are, upon which NCCL would kill them as they are.
        middle = not isinstance(error, WanVAEError) or _failed(words)
        report_failure(words, with_rank(error, name))
        time.sleep(2 * LOOK_SECONDS + (_UNWIND_SECONDS if middle else 0))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        heartbeat.end()
        over.set()


def _neighbours(rank: int, world_size: int) -> tuple[int, int]:
    """The next rank of all, and the next one on this machine."""
    local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return (rank + 1) % world_size, rank - local + (local + 1) % local_size


def _store(name: str) -> Store:
    """A connection of its own to the store through which ranks find one another; waits for no other connection's.

    What the ranks of an attempt before this one said there (``torchrun --max-restarts``) is not heard.
    """
    try:
        found = dist.rendezvous("env://", timeout=timedelta(seconds=WORD_SECONDS))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt {attempt}", next(found)[0])
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"{name} can't reach the first machine at {os.environ.get('MASTER_ADDR')}, port "
            f"{os.environ.get('MASTER_PORT')} ({summary(error)}); look at --master-addr and --master-port, and "
            f"whether a firewall lets them pass"
        ) from error


def _join(store: Store, name: str, device: torch.device | None) -> None:
    if device is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise DeviceError(
                f"torchrun started {device.index + 1} or more processes on this machine, which has {count} GPUs; "
                f"take --nproc-per-node {count}, or --devices cpu"
            )
        torch.cuda.set_device(device)
    backend = "nccl" if device else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            device_id=device,
            timeout=timedelta(seconds=WORK_SECONDS),
        )
    except (RuntimeError, ValueError) as error:
        variable = f"{backend.upper()}_SOCKET_IFNAME"
        raise WorkerError(
            f"{name} can't join the others over {backend} ({summary(error)}); {variable} is "
            f"{os.environ.get(variable, '')!r}: set it to the interface by which this machine reaches the others, and "
            f"see that a firewall lets all ports pass there"
            + ("; where GPUs can't reach one another, try NCCL_P2P_DISABLE=1" if device else "")
        ) from error


def _watch(words: Store, name: str, heartbeat: Heartbeat) -> threading.Event:
    """Ends this process when SIGTERM or another rank's failure says so, if it does not unwind by itself.

    It can't while it waits for bytes of a rank that is gone. Meanwhile ranks look after one another.

    Returns:
        To be set when nothing has to end any more.
    """
    over = threading.Event()
    if os.name != "posix":
        return over
    told_to_end, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)

    told_so = threading.Event()
    # A store whose machine is gone may never answer, whatever its time-out: asked in a thread of its own, this one
    # hears what is wrong and whether that is this rank's own word, at least an empty one each time.
    heard: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()

    def ask() -> None:
        cause, own = "", False
        while not cause and not over.is_set():
            try:
                cause = failure(words)
                own = cause.startswith(name)
                if not cause and told_so.is_set():
                    cause = report_failure(words, f"{name} was told to end; look at the first error there")
                elif not cause and (reason := heartbeat.beat()):
                    cause = report_failure(words, reason)
            except RuntimeError as error:
                cause = f"{name} lost the first machine ({summary(error)}); look at the output there"
            heard.put((cause, own))
            told_so.wait(LOOK_SECONDS)

    def watch() -> None:
        cause, own = "", False
        answered = looked = time.monotonic()
        while not cause:
            if select.select([told_to_end], [], [], LOOK_SECONDS)[0] and signal.SIGTERM in os.read(told_to_end, 1):
                told_so.set()  # by torchrun, where another process of this machine has died
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                while not cause:
                    cause, own = heard.get_nowait()
                    answered = now
            if now - looked > PAUSE_SECONDS:
                answered = now
            if not cause and now - answered > (_TOLD_SECONDS if told_so.is_set() else SILENT_SECONDS):
                cause = f"{name} hears nothing from the first machine for {now - answered:.0f} s; look at it"
            looked = now
            if over.is_set():
                return
        # The first rank goes first, as it has files to remove; one that failed itself has to wait for the others.
        patience = _UNWIND_SECONDS if name.startswith("rank 0 ") else _UNWIND_SECONDS + 2 * LOOK_SECONDS
        if not over.wait(3 * patience if own else patience):
            remove_unfinished()
            print(f"error: {cause}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=ask, daemon=True).start()
    threading.Thread(target=watch, daemon=True).start()
    return over


def _failed(words: Store) -> bool:
    try:
        return bool(failure(words))
    except RuntimeError:
        return True
