"""What processes leave on a Linux machine, read from /proc: children, open ports, shared memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

from tests.forking import helpers
from wan_vae_parallel.workers.pool import _pools
from wan_vae_parallel.workers.process import WorkerProcess

LISTEN = "0A"
# The environment variable by which the suite's processes are known.
MARK = "WAN_VAE_PARALLEL_MARK"
_MOST_PATIENCE = 20.0


def worker_processes() -> list[WorkerProcess]:
    """The engine's living workers of this process, by rank; of all VAEs that have some."""
    workers = [worker for pool in list(_pools) for worker in pool.workers if worker.alive]
    return sorted(workers, key=lambda worker: worker.rank)


def state(pid: int) -> str:
    """The process's state letter (R, S, T, Z...), or nothing if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def gone(pid: int) -> bool:
    """Whether the process ended; one that only waits to be reaped has."""
    return state(pid) in ("", "Z")


def children() -> dict[int, str]:
    """Command lines of this process's children by pid, without multiprocessing's own helpers and the tests'."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if parent == os.getpid() and not _is_helper(int(entry.name), command):
                found[int(entry.name)] = command
    return found


def strays(mark: str) -> dict[int, str]:
    """Command lines of all processes but this one, by pid, that got ``mark`` with their environment.

    Whoever their parent is now: one that lost its own belongs to nobody's children.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit() or mark.encode() not in (entry / "environ").read_bytes():
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pid = int(entry.name)
            if pid != os.getpid() and not gone(pid) and not _is_helper(pid, command):
                found[pid] = command
    return found


def _is_helper(pid: int, command: str) -> bool:
    """Whether others are started, or looked after, by the process; it stays as long as this one."""
    return "resource_tracker" in command or pid in (*helpers, forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


def open_files(pid: int | str = "self") -> list[str]:
    """What the process's descriptors lead to."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(link))
    return links


def listening(pid: int | str = "self") -> list[str]:
    """Local addresses, as the kernel writes them, that the process listens on."""
    sockets = {link[8:-1] for link in open_files(pid) if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and fields[9] in sockets:
                    found.append(fields[1])
    return found


def shared_maps() -> int:
    """Mappings of the engine's anonymous shared memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:wan-vae-parallel")


def shared_files() -> int:
    """Open descriptors of the engine's anonymous shared memory in this process."""
    return sum("memfd:wan-vae-parallel" in link for link in open_files())


def shared_bytes() -> int:
    """Memory that the engine's anonymous shared memory takes, of what is open in this process."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:wan-vae-parallel" in os.readlink(link):
                total += link.stat().st_blocks * 512
    return total


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of the process that is in RAM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def shared_names() -> set[str]:
    """Files in /dev/shm, without those that processes have which are neither this one nor started by it."""
    names = set(os.listdir("/dev/shm"))
    for entry in Path("/proc").iterdir() if names else ():
        if entry.name.isdigit() and not _is_ours(int(entry.name)):
            names -= _shared_names_of(entry)
    return names


def _shared_names_of(process: Path) -> set[str]:
    """Files in /dev/shm that a process has open or mapped."""
    found = set()
    with contextlib.suppress(OSError):
        found |= {line.rpartition("/dev/shm/")[2] for line in (process / "maps").read_text().splitlines()}
    with contextlib.suppress(OSError):
        found |= {link.rpartition("/dev/shm/")[2] for link in open_files(process.name)}
    return found


def _is_ours(pid: int) -> bool:
    """Whether the process is this one, descends from it, or got the suite's mark, whoever its parent is now."""
    with contextlib.suppress(OSError):
        mark = os.environ.get(MARK)
        if mark and mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return True
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = _parent(pid)
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def patience(seconds: float) -> float:
    """How long to wait on this machine for what takes up to ``seconds`` on an idle one."""
    with contextlib.suppress(OSError, AttributeError):
        # Half of a core is left to a process where as many wait as there are cores.
        return seconds * min(_MOST_PATIENCE, max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1)))
    return seconds


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition()`` comes true within ``seconds``, as an idle machine counts them."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > patience(seconds):
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def nothing_left(folder: Path):
    """Asserts at its end that this process is as it was: children, ports, shared memory, files in ``folder``."""
    # Other tests of this session may have a server running.
    names, ports, before = shared_names(), listening(), set(children())
    yield
    # Other programs on this machine come and go in /dev/shm, so theirs get some time to go.
    wait_until(lambda: not set(children()) - before and not shared_names() - names, 5)
    assert not set(children()) - before
    assert shared_names() - names == set()
    assert sorted(listening()) == sorted(ports)
    assert os.listdir(folder) == []
