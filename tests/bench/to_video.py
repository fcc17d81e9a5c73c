"""From latents to a finished MP4 in one real ComfyUI server: seconds, and the host's memory at its peak.

    python -m tests.bench.to_video [--size 1280x720] [--frames 81,241,961] [--devices 2] [--repeats 3]
    python -m tests.bench.to_video --ways video --frames 241,961         # memory of the one node
    python -m tests.bench.to_video --cpu --width 8 --size 80x48 --frames 9 --repeats 1   # tries all this anywhere

| way | nodes |
| --- | --- |
| video | Wan VAE Decode to Video (Parallel) |
| ours | Wan VAE Decode (Parallel), Create Video, Save Video |
| core | VAE Decode of core's VAE, Create Video, Save Video |

Seconds are from the decode node's start to the end of the last node, by the server's clock. Memory is what all of the
server's processes hold, workers and ffmpeg too, shared pages counted once (proportional set size, looked at 20 times a
second), above what they hold before the prompt; with it, what each kind of process held when it was most. Of each way
and length the first, in which workers start, has columns of its own. Weights are random, of Wan 2.1 at the published
width, in bf16; latents change slowly over space and time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

from tests.bench.comfyui.bench import Bench, bench, machine
from tests.bench.comfyui.works import CHECKPOINT, Contender
from tests.bench.footprint import MARK
from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import find_comfyui, node

WAYS = ("video", "ours", "core")
_LOOK_SECONDS = 0.05


def held(mark: str) -> Counter[str]:
    """Bytes that processes with ``mark`` in their environment hold by kind of process, what they share counted once."""
    found: Counter[str] = Counter()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                program = (entry / "cmdline").read_bytes()
                kind = "ffmpeg" if b"ffmpeg" in program else "server" if b"main.py" in program else "workers"
                lines = (entry / "smaps_rollup").read_text().splitlines()
                found[kind] += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return found


@contextlib.contextmanager
def peak_of(mark: str) -> Iterator[list[Counter[str]]]:
    """Within it, memory is looked at; the list has what was held when it was most."""
    most, over = [Counter[str]()], threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            most[0] = max(most[0], held(mark), key=Counter.total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def graph(options: argparse.Namespace, contender: Contender, way: str, name: str, frames: int) -> dict:
    """Latents to a file, by one of the ways."""
    wired = {"samples": ["latent", 0], "vae": ["vae", 0]}
    nodes = {
        "latent": node("ProbeLoadTensor", name=name),
        "vae": contender.loader(cpu=options.cpu, chunk=options.chunk),
    }
    prefix = f"bench/{way}_{frames}"
    if way == "video":
        given = {"fps": 16.0, "format": "MP4 H.264 8 bit", "quality": options.quality, "save": True}
        return {**nodes, "decode": node("WanVAEParallelDecodeToVideo", **wired, **given, filename_prefix=prefix)}
    decode = node("WanVAEParallelDecode" if way == "ours" else "VAEDecode", **wired)
    return {
        **nodes,
        "decode": decode,
        "create": node("CreateVideo", images=["decode", 0], fps=16.0),
        "save": node("SaveVideo", video=["create", 0], filename_prefix=prefix, format="auto", codec="auto"),
    }


def latents(frames: int, rows: int, columns: int, *, seed: int) -> torch.Tensor:
    """``[1, 16, T, h, w]``, as smooth as a video's: encoders take several times as long for noise."""
    coarse = torch.Size((2 + frames // 4, 2 + rows // 8, 2 + columns // 8))
    noise = torch.randn(1, 16, *coarse, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(noise, (frames, rows, columns), mode="trilinear") * 1.5


def measure(options: argparse.Namespace, server: Bench, way: str, frames: int) -> dict:
    """Seconds of each repeat, and the most memory above what was there before."""
    contender = Contender(0 if way == "core" else options.devices)
    columns, rows = (int(side) // 8 for side in options.size.split("x"))
    seconds, memory = [], []
    for repeat in range(options.repeats + 1):
        name = f"latent_{way}_{frames}_{repeat}.safetensors"
        save_file({"tensor": latents((frames - 1) // 4 + 1, rows, columns, seed=repeat)}, server.server.input / name)
        time.sleep(options.pause)
        before = held(server.mark)
        with peak_of(server.mark) as most:
            run = server.server.run(graph(options, contender, way, name, frames), timeout=options.timeout).check()
        lines = (server.server.output / "executions.jsonl").read_text().splitlines()
        mine = [one for one in map(json.loads, lines) if one["prompt"] == run.prompt_id]
        begun = next(one["started"] for one in mine if one["node"] == "decode")
        seconds.append(max(one["ended"] for one in mine) - begun)
        memory.append({kind: most[0][kind] - before[kind] for kind in most[0] | before})
    warm = seconds[1:] or seconds
    return {"way": way, "frames": frames, "seconds": seconds, "median": statistics.median(warm), "bytes": memory}


def told(memory: dict[str, int]) -> str:
    """The sum, and of what."""
    parts = ", ".join(f"{kind} {count / 2**30:.2f}" for kind, count in sorted(memory.items()))
    return f"{sum(memory.values()) / 2**30:.2f} GiB ({parts})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", default="81,241,961", help="one and a multiple of four each")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--quality", default="high")
    parser.add_argument("--repeats", type=int, default=3, help="after a first one")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between prompts")
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--server-options", default="")
    parser.add_argument("--timeout", type=float, default=1200)
    parser.add_argument("--json", type=Path, help="where to write every number")
    options = parser.parse_args()
    options.comfyui, options.cold_cache, options.warm_cache, options.cache = find_comfyui(), False, False, None
    if options.comfyui is None:
        parser.error("no ComfyUI found: set COMFYUI_PATH and COMFYUI_PYTHON")
    lengths = [int(count) for count in options.frames.split(",")]
    ways = options.ways.split(",")
    if set(ways) - set(WAYS) or any((count - 1) % 4 for count in lengths):
        parser.error(f"ways are {', '.join(WAYS)}, and frames one and a multiple of four")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options.folder, options.models = folder, Path(folder) / "models"
        options.models.mkdir()
        random_checkpoint(options.models / CHECKPOINT, width=options.width)
        tensors = load_file(options.models / CHECKPOINT)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, options.models / CHECKPOINT)
        options.frames = lengths[0]
        title = machine(options)
        print(f"{title}; {options.size}, ours on {options.devices} devices, quality {options.quality}", flush=True)
        print("| way | frames | first | its peak above idle | median of later | the largest of their peaks |")
        print("| --- | --- | --- | --- | --- | --- |")
        with bench(options, Contender(options.devices)) as server:
            for frames in lengths:
                for way in ways:
                    row = measure(options, server, way, frames)
                    rows.append(row)
                    print(
                        f"| {way} | {frames} | {row['seconds'][0]:.2f} s | {told(row['bytes'][0])} | "
                        f"{row['median']:.2f} s | "
                        f"{told(max(row['bytes'][1:] or row['bytes'], key=lambda one: sum(one.values())))} |",
                        flush=True,
                    )
                    if options.json:
                        options.json.write_text(json.dumps({"heading": title, "rows": rows}, indent=1))
            for note in server.notes():
                print(f"# the log says: {note}")


if __name__ == "__main__":
    main()
