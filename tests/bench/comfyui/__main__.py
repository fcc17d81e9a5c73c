"""A node's time in a real ComfyUI server, core's VAE beside ours, first run to tenth: decoding, or encoding.

    python -m tests.bench.comfyui [--sizes 1280x720,832x480] [--devices 1,2,4] [--runs 10] [--json rows.json]
    python -m tests.bench.comfyui --work encode         # VAE Encode of random pixels
    python -m tests.bench.comfyui --work image          # the VAE's encode within WanImageToVideo
    python -m tests.bench.comfyui --first-after 10      # the loader runs 10 s before the first decode
    python -m tests.bench.comfyui --park                # a large model asks for all memory between decodes
    python -m tests.bench.comfyui --interrupt 0.5,2,5   # seconds into the first decode
    python -m tests.bench.comfyui --frames 1 --sizes 1328x1328,4096x4096 --devices 1,4      # images, as Qwen-Image's
    python -m tests.bench.comfyui --frames 1 --batch 8 --sizes 1328x1328 --devices 1        # eight of them together
    python -m tests.bench.comfyui --cpu --width 8 --sizes 80x48 --frames 9 --runs 3   # tries all this anywhere

ComfyUI is found as the tests find it (COMFYUI_PATH, COMFYUI_PYTHON). Each row has a server of its own, so that its
first run is one. Random weights of Wan 2.1 at the published width, encoder included, stored in bf16; every run has
latents or pixels of its own, so that nothing comes from ComfyUI's cache.

What is timed is the whole execution of the node, by a clock around ComfyUI's own function for it, in the server; the
time between two websocket messages (this node begins, the next one does) is its check. What it is given and looking at
what it returns are nodes of their own. Of WanImageToVideo, whose node makes frames of its own, it is the VAE's
``encode`` alone; the node's whole time stands in the last column.

Caches of kernels and their settings are the user's, unless --warm-cache or --cold-cache gives this run others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import websocket
from safetensors.torch import load_file, save_file

from tests.bench.comfyui.bench import Row, bench, machine
from tests.bench.comfyui.works import CHECKPOINT, Contender, Decode, Encode, ImageToVideo
from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import find_comfyui

# Two clocks may differ by this much before the row says so.
CLOCKS_DIFFER_SECONDS, CLOCKS_DIFFER_SHARE = 0.03, 0.03
# bf16 on random weights: means differ by far less of the results' deviation, unless something else came out.
MEANS_DIFFER = 0.1
# What one row may fail with while the others go on: prompts, a server that does not start, connections.
FAILURES = (AssertionError, RuntimeError, OSError, websocket.WebSocketException)


def measure(options: argparse.Namespace, contender: Contender, size: str) -> Row:
    """First run to last in a fresh server."""
    row = Row(contender, size)
    with bench(options, contender) as server:
        if options.first_after is not None or options.park:
            server.load()
            due = time.monotonic() + (options.first_after or 0)
            if options.park or options.first_after >= 3:
                server.memory("after the loader", seconds=max(2.0, due - time.monotonic() - 1))
            time.sleep(max(0.0, due - time.monotonic()))
        for index in range(options.runs if contender.devices else options.core_runs):
            if options.park and index:
                server.ask_for_room()
                if index == 1:
                    server.memory("parked")
                time.sleep(options.pause)
            row.runs.append(server.run(size, index))
            if options.park and index < 2:
                server.memory("idle after the run from parked" if index else "idle after the first run")
            time.sleep(options.pause)
        if options.park:
            server.free()
            time.sleep(1)
            server.memory("after /free")
            row.notes.append(f"the run after /free {server.run(size, options.runs).seconds:.2f} s")
        if options.work.timed != "work":
            row.notes.append(f"the whole node {statistics.median(one.node for one in row.runs[1:] or row.runs):.3f} s")
        # Of several devices the memory is the workers', which the server does not see.
        if contender.devices <= 1 and (peak := max(one.peak for one in row.runs)):
            row.notes.append(f"peak {peak / 2**30:.2f} GiB")
        row.notes += server.notes()
    return row


def fill_cache(options: argparse.Namespace, contenders: list[Contender]) -> None:
    """One run of each size and number of devices, so that no compiling or measuring is left to do."""
    for contender in contenders:
        if contender.devices:
            with bench(options, contender) as server:
                taken = [f"{size} {server.run(size, -1 - i).seconds:.1f} s" for i, size in enumerate(options.sizes)]
            print(f"# filling the cache on {contender.devices}: first runs {', '.join(taken)}", flush=True)


def table_row(row: Row, core: Row | None) -> str:
    """A row of the table, with core's times over ours."""
    first, *more = row.seconds
    cells = [row.contender.name, str(row.contender.devices or 1), row.size]
    loader = row.runs[0].loader
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
    """Where the two clocks or the results disagree."""
    found = []
    for i, one in enumerate(row.runs):
        allowed = CLOCKS_DIFFER_SECONDS + CLOCKS_DIFFER_SHARE * one.node
        if abs(one.messages - one.node) > allowed:
            found.append(f"run {i + 1}: {one.messages:.3f} s between messages, {one.node:.3f} s in the server")
        ours, theirs = one.result, core.runs[i].result if core and i < len(core.runs) else one.result
        apart = abs(ours["mean"] - theirs["mean"])
        if ours["shape"] != theirs["shape"] or apart > MEANS_DIFFER * theirs["deviation"]:
            found.append(f"run {i + 1}: {ours}, core's {theirs}")
        if not ours["deviation"] > 0.01:
            found.append(f"run {i + 1}: all but one value: {ours}")
    return found


def heading(options: argparse.Namespace) -> str:
    """Machine, versions and what was asked for."""
    cache = "cold" if options.cold_cache else "warm" if options.warm_cache else "the user's"
    return (
        f"{machine(options)}; {type(options.work).__name__}, {options.frames} frames, width {options.width}; "
        f"cache: {cache}; first run "
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
    parser.add_argument("--work", choices=["decode", "encode", "image"], default="decode")
    parser.add_argument("--runs", type=int, default=10, help="runs in each server")
    parser.add_argument("--core-runs", type=int, help="those of core's VAE; as many as ours by default")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between runs")
    parser.add_argument("--first-after", type=float, help="seconds between the loader's prompt and the first run's")
    parser.add_argument("--park", action="store_true", help="a large model asks for all memory between runs")
    parser.add_argument("--interrupt", help="seconds into the first run, with commas; nothing else is measured then")
    parser.add_argument("--no-core", action="store_true")
    parser.add_argument("--own-node", action="store_true", help="our nodes in place of core's VAE Decode and Encode")
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
    own = options.own_node
    options.work = {"decode": Decode(own, options.batch), "encode": Encode(own), "image": ImageToVideo()}[options.work]
    options.core_runs = options.core_runs or options.runs
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
    print("| who | devices | size | asked after | asked | took effect | the next run | log |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for size, contender in itertools.product(options.sizes, contenders):
        for after in map(float, options.interrupt.split(",")):
            try:
                with bench(options, contender) as server:
                    told = server.interrupt(size, after)
                print(f"| {contender.name} | {contender.devices or 1} | {size} | {after:g} s | {told}", flush=True)
            except FAILURES as error:
                failed += 1
                print(failed_row(contender, size, error), flush=True)
    return failed


def times(options: argparse.Namespace, contenders: list[Contender], title: str) -> int:
    """Prints the table of times and writes the file of all numbers; returns how many rows failed."""
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
    who = {"who": row.contender.name, "devices": row.contender.devices or 1, "size": row.size}
    return {**who, "notes": row.notes, "runs": [vars(one) for one in row.runs]}


if __name__ == "__main__":
    main()
