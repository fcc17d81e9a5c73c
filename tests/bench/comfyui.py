"""The decode node's time in a real ComfyUI server, core's VAE beside ours, first decode to tenth.

    python -m tests.bench.comfyui [--sizes 1280x720,832x480] [--devices 1,2,4] [--decodes 10] [--json rows.json]
    python -m tests.bench.comfyui --first-after 10      # the loader runs 10 s before the first decode
    python -m tests.bench.comfyui --park                # a large model asks for all memory between decodes
    python -m tests.bench.comfyui --interrupt 0.5,2,5   # seconds into the first decode
    python -m tests.bench.comfyui --frames 1 --sizes 1328x1328,4096x4096 --devices 1,4      # images, as Qwen-Image's
    python -m tests.bench.comfyui --frames 1 --batch 8 --sizes 1328x1328 --devices 1        # eight of them together
    python -m tests.bench.comfyui --cpu --width 8 --sizes 80x48 --frames 9 --decodes 3   # tries all this anywhere

ComfyUI is found as the tests find it (COMFYUI_PATH, COMFYUI_PYTHON). Each row has a server of its own, so that its
first decode is one. Random weights of Wan 2.1 at the published width, encoder included, stored in bf16; every decode
has latents of its own, so that nothing comes from ComfyUI's cache.

What is timed is the whole execution of the decode node, by a clock around ComfyUI's own function for it, in the server;
the time between two websocket messages (this node begins, the next one does) is its check. Loading the latents and
looking at the frames are nodes of their own.

Caches of kernels and their settings are the user's, unless --warm-cache or --cold-cache gives this run others.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import websocket
from safetensors.torch import load_file, save_file

from tests.bench.footprint import MARK, described, gpu_names, settled, used_on_gpus
from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import REPOSITORY, Run, Server, find_comfyui, node

PACK = {"bench": Path(__file__).parent / "comfyui_pack"}
CHECKPOINT = "wan21.safetensors"
# Two clocks may differ by this much before the row says so.
CLOCKS_DIFFER_SECONDS, CLOCKS_DIFFER_SHARE = 0.03, 0.03
# bf16 on random weights: means of the frames differ by far less, unless something else was decoded.
MEANS_DIFFER = 0.02
# What one row may fail with while the others go on: prompts, a server that does not start, connections.
FAILURES = (AssertionError, RuntimeError, OSError, websocket.WebSocketException)


@dataclass(frozen=True)
class Contender:
    """Whose VAE decodes: core's, or ours on ``devices`` devices."""

    devices: int = 0

    @property
    def name(self) -> str:
        return "ours" if self.devices else "core"

    def loader(self, options: argparse.Namespace) -> dict:
        if not self.devices:
            return node("VAELoader", vae_name=CHECKPOINT)
        names = ["cpu"] * self.devices if options.cpu else [f"cuda:{i}" for i in range(self.devices)]
        return node(
            "WanVAEParallelLoader", vae_name=CHECKPOINT, devices=",".join(names), dtype="auto", chunk=options.chunk
        )

    def decode(self, options: argparse.Namespace) -> dict:
        wired = {"samples": ["latent", 0], "vae": ["vae", 0]}
        if self.devices and options.own_node:
            return node("WanVAEParallelDecode", **wired, normalized_latents=False)
        return node("VAEDecode", **wired)


@dataclass
class Decoded:
    """One decode node's execution: seconds by the server's clock, and by websocket messages."""

    seconds: float
    messages: float
    loader: float
    progress: int
    frames: dict
    peak: int = 0


@dataclass
class Row:
    """What one server measured."""

    contender: Contender
    size: str
    decodes: list[Decoded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [one.seconds for one in self.decodes]


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
            {"vae": self.contender.loader(self.options), "held": node("ProbeDiscard", vae=["vae", 0])},
            timeout=self.options.timeout,
        ).check()

    def ask_for_room(self) -> None:
        """Has the stand-in of a large model ask for all memory of ComfyUI's device."""
        self.server.run(
            {
                "vae": self.contender.loader(self.options),
                "room": node("ProbeAskForRoom", vae=["vae", 0], call=next(self._asked)),
            },
            timeout=self.options.timeout,
        ).check()

    def free(self) -> None:
        """What ComfyUI's button for it does."""
        self.server.post("/free", {"unload_models": True, "free_memory": True})

    def graph(self, size: str, index: int) -> dict:
        """The graph of decode ``index``, whose latents lie in the input folder after this."""
        name = f"latent_{size}_{index}.safetensors"
        columns, rows = (int(side) // 8 for side in size.split("x"))
        shape = (self.options.batch, 16, (self.options.frames - 1) // 4 + 1, rows, columns)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        save_file({"tensor": latents}, self.server.input / name)
        return {
            "latent": node("ProbeLoadTensor", name=name),
            "vae": self.contender.loader(self.options),
            "decode": self.contender.decode(self.options),
            "seen": node("ProbeDiscard", image=["decode", 0]),
        }

    def decode(self, size: str, index: int) -> Decoded:
        """Decodes latents ``index`` of a size, and says how long the node took."""
        begun: dict[str, float] = {}

        def on_message(message: dict) -> None:
            name = message.get("data", {}).get("node")
            if message["type"] == "executing" and name:
                begun.setdefault(name, time.perf_counter())

        run = self.server.run(self.graph(size, index), on_message=on_message, timeout=self.options.timeout).check()
        executed, peaks = self.executions(run), self.executions(run, of="peak")
        frames = run.outputs("seen")
        return Decoded(
            seconds=executed["decode"],
            messages=begun["seen"] - begun["decode"],
            loader=executed.get("vae", 0.0),
            progress=len(run.progress("decode")),
            frames={"shape": frames["shape"], "mean": frames["mean"][0], "deviation": frames["deviation"][0]},
            peak=peaks["decode"],
        )

    def executions(self, run: Run, of: str = "seconds") -> dict[str, float]:
        """Seconds of each node of a prompt, by the server's clock; or its ``"peak"`` of memory in the server, bytes."""
        lines = (self.server.output / "executions.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if line["prompt"] == run.prompt_id]
        if of == "peak":
            return {line["node"]: line["peak"] for line in found}
        return {line["node"]: line["ended"] - line["started"] for line in found}

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


def measure(options: argparse.Namespace, contender: Contender, size: str) -> Row:
    """First decode to last in a fresh server."""
    row = Row(contender, size)
    with bench(options, contender) as server:
        if options.first_after is not None or options.park:
            server.load()
            due = time.monotonic() + (options.first_after or 0)
            if options.park or options.first_after >= 3:
                server.memory("after the loader", seconds=max(2.0, due - time.monotonic() - 1))
            time.sleep(max(0.0, due - time.monotonic()))
        for index in range(options.decodes if contender.devices else options.core_decodes):
            if options.park and index:
                server.ask_for_room()
                if index == 1:
                    server.memory("parked")
                time.sleep(options.pause)
            row.decodes.append(server.decode(size, index))
            if options.park and index < 2:
                server.memory("idle after the decode from parked" if index else "idle after the first decode")
            time.sleep(options.pause)
        if options.park:
            server.free()
            time.sleep(1)
            server.memory("after /free")
            row.notes.append(f"the decode after /free {server.decode(size, options.decodes).seconds:.2f} s")
        # Of several devices the memory is the workers', which this process does not see.
        if contender.devices <= 1 and (peak := max(one.peak for one in row.decodes)):
            row.notes.append(f"peak {peak / 2**30:.2f} GiB")
        row.notes += server.notes()
    return row


def measure_interrupt(options: argparse.Namespace, contender: Contender, size: str, after: float) -> str:
    """Interrupts the first decode of a fresh server after some seconds; says how long that took to take effect."""
    with bench(options, contender) as server:
        begun, asked, progress = [], [], []

        def ask() -> None:
            asked.append(time.perf_counter())
            server.server.post("/interrupt")

        def on_message(message: dict) -> None:
            if message["type"] == "progress":
                progress.append((time.perf_counter(), message["data"]["value"]))
            elif message["type"] == "executing" and message["data"].get("node") == "decode":
                begun.append(time.perf_counter())
                timer.start()

        timer = threading.Timer(after, ask)
        run = server.server.run(server.graph(size, 0), on_message=on_message, timeout=options.timeout)
        ended = time.perf_counter()
        timer.cancel()
        where = f"| {contender.name} | {contender.devices or 1} | {size} | {after:g} s | "
        if not asked:
            return f"{where}too late | {run.ended} after {ended - begun[0]:.2f} s in all | | |"
        frames = max((value for moment, value in progress if moment <= asked[0]), default=0)
        state = f"at frame {frames:g}" if frames else "before the first chunk"
        again = server.decode(size, 1)
        found = "; ".join(server.notes())
        return f"{where}{state} | {run.ended} after {ended - asked[0]:.2f} s | {again.seconds:.2f} s | {found} |"


def fill_cache(options: argparse.Namespace, contenders: list[Contender]) -> None:
    """One decode of each size and number of devices, so that no compiling or measuring is left to do."""
    for contender in contenders:
        if contender.devices:
            with bench(options, contender) as server:
                taken = [f"{size} {server.decode(size, -1 - i).seconds:.1f} s" for i, size in enumerate(options.sizes)]
            print(f"# filling the cache on {contender.devices}: first decodes {', '.join(taken)}", flush=True)


def table_row(row: Row, core: Row | None) -> str:
    """A row of the table, with core's times over ours."""
    first, *more = row.seconds
    cells = [row.contender.name, str(row.contender.devices or 1), row.size]
    loader = row.decodes[0].loader
    cells += [f"{loader:.2f} s" if loader > 0.001 else "before", *_beside(first, core and core.seconds[:1])]
    cells += _beside(more[0], core and core.seconds[1:2]) if more else ["", ""]
    rest = more[1:]
    later = _beside(statistics.median(rest), core and core.seconds[2:]) if rest else ["", ""]
    if rest:
        later[0] += f" ({min(rest):.3f} to {max(rest):.3f})"
    return f"| {' | '.join([*cells, *later, '; '.join(row.notes)])} |"


def _beside(seconds: float, core: list[float] | None) -> list[str]:
    return [f"{seconds:.3f} s", f"{statistics.median(core) / seconds:.2f}" if core else ""]


def doubts(row: Row, core: Row | None) -> list[str]:
    """Where the two clocks or the frames disagree."""
    found = []
    for i, one in enumerate(row.decodes):
        allowed = CLOCKS_DIFFER_SECONDS + CLOCKS_DIFFER_SHARE * one.seconds
        if abs(one.messages - one.seconds) > allowed:
            found.append(f"decode {i + 1}: {one.messages:.3f} s between messages, {one.seconds:.3f} s in the server")
        beside = core.decodes[i].frames if core and i < len(core.decodes) else one.frames
        if one.frames["shape"] != beside["shape"] or abs(one.frames["mean"] - beside["mean"]) > MEANS_DIFFER:
            found.append(f"decode {i + 1}: frames {one.frames}, core's {beside}")
        if not one.frames["deviation"] > 0.01:
            found.append(f"decode {i + 1}: frames are all but one colour: {one.frames}")
    return found


def heading(options: argparse.Namespace) -> str:
    """Machine, versions and what was asked for."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    path, python = options.comfyui
    version = (path / "comfyui_version.py").read_text().rpartition("=")[2].strip(' \n"')
    theirs = "import torch; print(torch.__version__, torch.backends.cudnn.version())"
    torch_version = subprocess.run([str(python), "-c", theirs], capture_output=True, text=True, check=True).stdout
    names = gpu_names()  # not by torch, which would make this process a CUDA context
    where = "CPU" if options.cpu else f"{len(names)} x {', '.join(dict.fromkeys(names))}"
    cache = "cold" if options.cold_cache else "warm" if options.warm_cache else "the user's"
    return (
        f"# {where}, {os.cpu_count()} cores, Python {platform.python_version()}, torch and cuDNN "
        f"{torch_version.strip()}, ComfyUI {version} {options.server_options}\n"
        f"# commit {commit.stdout.strip() or 'unknown'}; {options.frames} frames, width {options.width}; "
        f"cache: {cache}; first decode "
        + ("right after the loader" if options.first_after is None else f"{options.first_after:g} s after the loader")
        + ("; before each later one a model asks for all memory" if options.park else "")
    )


def parse() -> argparse.Namespace:
    """The command line's options, with what they lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1280x720,832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--batch", type=int, default=1, help="videos, or with --frames 1 images, in each decode")
    parser.add_argument("--devices", default="1,2,4", help="numbers of devices; those that are not there are left out")
    parser.add_argument("--decodes", type=int, default=10, help="decodes in each server")
    parser.add_argument("--core-decodes", type=int, help="those of core's VAE; as many as ours by default")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between decodes")
    parser.add_argument("--first-after", type=float, help="seconds between the loader's prompt and the first decode's")
    parser.add_argument("--park", action="store_true", help="a large model asks for all memory between decodes")
    parser.add_argument("--interrupt", help="seconds into the first decode, with commas; nothing else is measured then")
    parser.add_argument("--no-core", action="store_true")
    parser.add_argument("--own-node", action="store_true", help="our decode node in place of core's VAE Decode")
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--server-options", default="", help='more options of ComfyUI, as in "--highvram"')
    caches = parser.add_mutually_exclusive_group()
    caches.add_argument("--warm-cache", action="store_true", help="one of this run's, filled before it is measured")
    caches.add_argument("--cold-cache", action="store_true", help="an empty one for each server")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a prompt may take")
    parser.add_argument("--json", type=Path, help="where to write every number")
    given = sys.argv[1:]
    if "--server-options" in given[:-1]:  # argparse takes a value that begins with a dash for another option
        at = given.index("--server-options")
        given[at : at + 2] = [f"--server-options={given[at + 1]}"]
    options = parser.parse_args(given)
    options.sizes = options.sizes.split(",")
    options.core_decodes = options.core_decodes or options.decodes
    there = 8 if options.cpu else torch.cuda.device_count()
    options.devices = [count for count in map(int, options.devices.split(",")) if count <= there]
    options.comfyui = find_comfyui()
    if options.comfyui is None:
        parser.error("no ComfyUI found: set COMFYUI_PATH and COMFYUI_PYTHON")
    if not there:
        parser.error("no GPU found: give --cpu to try this without one")
    if (options.frames - 1) % 4:
        parser.error(f"{options.frames} frames are not one and a multiple of four")
    return options


def main() -> None:
    options = parse()
    contenders = [Contender(count) for count in options.devices]
    if not options.no_core:
        contenders.insert(0, Contender())
    with tempfile.TemporaryDirectory() as folder:
        options.folder, options.models, options.cache = folder, Path(folder) / "models", None
        options.models.mkdir()
        random_checkpoint(options.models / CHECKPOINT, width=options.width)
        tensors = load_file(options.models / CHECKPOINT)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, options.models / CHECKPOINT)
        title = heading(options)
        print(title, flush=True)
        if options.warm_cache:
            options.cache = Path(folder) / "cache"
            fill_cache(options, contenders)
        failed = interrupts(options, contenders) if options.interrupt else times(options, contenders, title)
    if failed:
        raise SystemExit(f"{failed} of the rows failed")


def interrupts(options: argparse.Namespace, contenders: list[Contender]) -> int:
    """Prints the table of interrupts; returns how many rows failed."""
    print("| who | devices | size | asked after | asked | took effect | the next decode | log |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for size, contender in itertools.product(options.sizes, contenders):
        for after in map(float, options.interrupt.split(",")):
            try:
                print(measure_interrupt(options, contender, size, after), flush=True)
            except FAILURES as error:
                failed += 1
                print(failed_row(contender, size, error), flush=True)
    return failed


def times(options: argparse.Namespace, contenders: list[Contender], title: str) -> int:
    """Prints the table of decodes and writes the file of all numbers; returns how many rows failed."""
    print("| who | devices | size | loader | first | core / it | second | core / it | median of later | core / it | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[Row] = []
    failed = 0
    for size in options.sizes:
        core = None
        for contender in contenders:
            try:
                row = measure(options, contender, size)
            except FAILURES as error:
                failed += 1
                print(failed_row(contender, size, error), flush=True)
                continue
            rows.append(row)
            if not contender.devices:
                core = row
            print(table_row(row, core if contender.devices else None), flush=True)
            for doubt in doubts(row, core):
                print(f"#   {doubt}", flush=True)
            if options.json:
                written = {"heading": title, "rows": [as_json(row) for row in rows]}
                options.json.write_text(json.dumps(written, indent=1))
    return failed


def failed_row(contender: Contender, size: str, error: Exception) -> str:
    """In place of a row; the server's log came before it."""
    words = " ".join(str(error).split())
    words = words if len(words) < 400 else f"{words[:100]} ... {words[-250:]}"
    return f"| {contender.name} | {contender.devices or 1} | {size} | failed: {type(error).__name__}: {words} |"


def as_json(row: Row) -> dict:
    """Every number of a row."""
    decodes = [vars(one) for one in row.decodes]
    who = {"who": row.contender.name, "devices": row.contender.devices or 1, "size": row.size}
    return {**who, "notes": row.notes, "decodes": decodes}


if __name__ == "__main__":
    main()
