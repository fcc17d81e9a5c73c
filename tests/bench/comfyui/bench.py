"""One ComfyUI server of `tests/bench/comfyui`, what is asked of it, and what its clocks tell."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.comfyui.works import Contender
from tests.bench.footprint import MARK, described, gpu_names, settled, used_on_gpus
from tests.comfyui.server import REPOSITORY, Run, Server, node

PACK = {"bench": Path(__file__).parent / "pack"}


def machine(options: argparse.Namespace) -> str:
    """GPUs, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    path, python = options.comfyui
    version = (path / "comfyui_version.py").read_text().rpartition("=")[2].strip(' \n"')
    theirs = "import torch; print(torch.__version__, torch.backends.cudnn.version())"
    torch_version = subprocess.run([str(python), "-c", theirs], capture_output=True, text=True, check=True).stdout
    names = gpu_names()  # not by torch, which would make this process a CUDA context
    where = "CPU" if options.cpu else f"{len(names)} x {', '.join(dict.fromkeys(names))}"
    return (
        f"# {where}, {os.cpu_count()} cores, Python {platform.python_version()}, torch and cuDNN "
        f"{torch_version.strip()}, ComfyUI {version} {options.server_options}\n"
        f"# commit {commit.stdout.strip() or 'unknown'}"
    )


@dataclass
class Timed:
    """One run of the work: its seconds, its node's, its node's by websocket messages; bytes on the server's GPU."""

    seconds: float
    node: float
    messages: float
    loader: float
    progress: int
    result: dict
    peak: int = 0


@dataclass
class Row:
    """What one server measured."""

    contender: Contender
    size: str
    runs: list[Timed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [one.seconds for one in self.runs]


class Bench:
    """A server for one row, and prompts for it."""

    def __init__(self, options: argparse.Namespace, folder: Path, contender: Contender, cache: Path | None) -> None:
        self.options, self.contender = options, contender
        self.mark = uuid.uuid4().hex
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "vae").symlink_to(options.models)
        environment = {MARK: self.mark}
        if cache:
            environment |= {"XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        arguments = [*(["--cpu"] if options.cpu else []), *shlex.split(options.server_options)]
        self.server = Server(*options.comfyui, folder, *arguments, packs=PACK, environment=environment)
        self._started = len(self.server.log())
        self._asked = itertools.count()

    def stop(self) -> None:
        self.server.stop()

    def load(self) -> None:
        """Runs the loader node alone."""
        self.server.run(
            {"vae": self._loader(), "held": node("ProbeDiscard", vae=["vae", 0])}, timeout=self.options.timeout
        ).check()

    def ask_for_room(self) -> None:
        """Has the stand-in of a large model ask for all memory of ComfyUI's device."""
        self.server.run(
            {"vae": self._loader(), "room": node("ProbeAskForRoom", vae=["vae", 0], call=next(self._asked))},
            timeout=self.options.timeout,
        ).check()

    def free(self) -> None:
        """What ComfyUI's button for it does."""
        self.server.post("/free", {"unload_models": True, "free_memory": True})

    def graph(self, size: str, index: int) -> dict:
        """The graph of the run ``index``."""
        work = self.options.work.graph(self.contender, self.server.input, size, self.options.frames, index)
        return {"vae": self._loader(), **work}

    def run(self, size: str, index: int) -> Timed:
        """Runs the work once, and says how long it took."""
        begun: dict[str, float] = {}

        def on_message(message: dict) -> None:
            name = message.get("data", {}).get("node")
            if message["type"] == "executing" and name:
                begun.setdefault(name, time.perf_counter())

        run = self.server.run(self.graph(size, index), on_message=on_message, timeout=self.options.timeout).check()
        executed, peaks = self.executions(run), self.executions(run, of="peak")
        seen = run.outputs("seen")
        return Timed(
            seconds=executed[self.options.work.timed],
            node=executed["work"],
            messages=begun["seen"] - begun["work"],
            loader=executed.get("vae", 0.0),
            progress=len(run.progress("work")),
            result={"shape": seen["shape"], "mean": seen["mean"][0], "deviation": seen["deviation"][0]},
            peak=peaks["work"],
        )

    def executions(self, run: Run, of: str = "seconds") -> dict[str, float]:
        """Seconds of each node of a prompt, by the server's clock; or its ``"peak"`` of memory in the server, bytes."""
        lines = (self.server.output / "executions.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if line["prompt"] == run.prompt_id]
        if of == "peak":
            return {line["node"]: line["peak"] for line in found}
        return {line["node"]: line["ended"] - line["started"] for line in found}

    def interrupt(self, size: str, after: float) -> str:
        """Interrupts the first run after some seconds; says how long that took to take effect, as cells of a row."""
        begun, asked, progress = [], [], []

        def ask() -> None:
            asked.append(time.perf_counter())
            self.server.post("/interrupt")

        def on_message(message: dict) -> None:
            if message["type"] == "progress":
                progress.append((time.perf_counter(), message["data"]["value"]))
            elif message["type"] == "executing" and message["data"].get("node") == "work":
                begun.append(time.perf_counter())
                timer.start()

        timer = threading.Timer(after, ask)
        run = self.server.run(self.graph(size, 0), on_message=on_message, timeout=self.options.timeout)
        ended = time.perf_counter()
        timer.cancel()
        if not asked:
            return f"too late | {run.ended} after {ended - begun[0]:.2f} s in all | | |"
        frames = max((value for moment, value in progress if moment <= asked[0]), default=0)
        state = f"at frame {frames:g}" if frames else "before the first chunk"
        again = self.run(size, 1)
        found = "; ".join(self.notes())
        return f"{state} | {run.ended} after {ended - asked[0]:.2f} s | {again.seconds:.2f} s | {found} |"

    def memory(self, state: str, seconds: float = 15) -> None:
        """Prints what each process holds, once that no longer changes, or after some seconds."""
        processes = settled(self.server.process.pid, self.mark, seconds=seconds)
        all_used = ", ".join(map(str, used_on_gpus())) or "none"
        who = f"{self.contender.name} {self.contender.devices or ''}".strip()
        print(f"#   {who}, {state}: {described(processes)}; in use on the GPUs, MiB: {all_used}", flush=True)

    def notes(self) -> list[str]:
        """What the server's log tells, since it is up, that makes times mean something else."""
        log = self.server.log()[self._started :]
        return [word for word in ("tiled", "out of memory", "Traceback") if word.lower() in log.lower()]

    def _loader(self) -> dict:
        return self.contender.loader(cpu=self.options.cpu, chunk=self.options.chunk)


@contextlib.contextmanager
def bench(options: argparse.Namespace, contender: Contender) -> Iterator[Bench]:
    """A server in a folder that goes with it."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        cache = Path(name) / "cache" if options.cold_cache else options.cache
        started = Bench(options, Path(name) / "server", contender, cache)
        try:
            yield started
        except BaseException:
            print(started.server.log()[-4000:], flush=True)
            raise
        finally:
            started.stop()
