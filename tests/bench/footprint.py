"""What a server and its workers hold: memory on each GPU by process, and on the host.

GPU memory is nvidia-smi's: in a container that has process ids of its own it can name no process, and only
`used_on_gpus` tells something.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

MARK = "WAN_VAE_PARALLEL_BENCH"


@dataclass
class Footprint:
    """One process: MiB by GPU index, and MiB of private host memory."""

    pid: int
    name: str
    parent: int
    gpus: dict[int, int] = field(default_factory=dict)
    host: int = 0


def footprints(server: int, mark: str) -> list[Footprint]:
    """The server's, and those of all processes that have ``mark`` from its environment, whoever their parent is."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit() or f"{MARK}={mark}".encode() not in (entry / "environ").read_bytes():
                continue
            status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
            if status["State"].split()[0] != "Z":
                pid = int(entry.name)
                name = "server" if pid == server else _role((entry / "cmdline").read_bytes())
                host = int(status["RssAnon"].split()[0]) // 1024
                found[pid] = Footprint(pid, name, int(status["PPid"]), host=host)
    servers = {pid for pid, one in found.items() if one.name == "forkserver"}
    for pid in servers:
        if found[pid].parent in servers:  # forked, so it has its parent's command line
            found[pid].name = "worker"
    for index, pid, used in _gpu_processes():
        if pid in found:
            found[pid].gpus[index] = found[pid].gpus.get(index, 0) + used
    return sorted(found.values(), key=lambda one: (one.name != "server", one.pid))


def settled(server: int, mark: str, *, seconds: float = 15) -> list[Footprint]:
    """`footprints`, as soon as they stay what they are for a second and a half, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    readings = [footprints(server, mark)]
    while time.monotonic() < deadline:
        time.sleep(0.5)
        readings.append(footprints(server, mark))
        if len(readings) > 3 and all(_gpus(reading) == _gpus(readings[-1]) for reading in readings[-4:]):
            break
    return readings[-1]


def gpu_names() -> list[str]:
    """Each GPU's, without a CUDA context in this process."""
    return [name for (name,) in _query("--query-gpu=name")]


def used_on_gpus() -> list[int]:
    """MiB in use on each GPU, by whomever."""
    return [int(used) for (used,) in _query("--query-gpu=memory.used")]


def described(processes: list[Footprint]) -> str:
    """One line for a table: each process with what it holds."""
    parts = []
    for one in processes:
        gpus = ", ".join(f"{used} MiB on {index}" for index, used in sorted(one.gpus.items())) or "no GPU"
        parts.append(f"{one.name} {one.pid}: {gpus}, {one.host} MiB host")
    return "; ".join(parts)


def _gpus(processes: list[Footprint]) -> list[tuple[int, dict[int, int]]]:
    return [(one.pid, one.gpus) for one in processes]


def _role(command: bytes) -> str:
    words = command.decode(errors="replace").replace("\0", " ")
    return "worker" if "workers/bootstrap.py" in words else "process"


def _gpu_processes() -> list[tuple[int, int, int]]:
    """(GPU index, pid, MiB) of each compute process."""
    indices = {uuid: int(index) for index, uuid in _query("--query-gpu=index,uuid")}
    rows = _query("--query-compute-apps=gpu_uuid,pid,used_gpu_memory")
    return [(indices[uuid], int(pid), int(used)) for uuid, pid, used in rows if used.isdigit()]


def _query(query: str) -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
