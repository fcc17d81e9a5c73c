"""``bench``: decodes and encodes, measured here."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from .. import bench
from ..architecture import Architecture
from ..devices import DTYPES, parse_devices, parse_dtype
from ..errors import CheckpointError, WanVAEError, about_file
from ..files.whole import check_writable
from ..to_video import USUAL_FPS
from .shared import chunk_size, dtype_name, frame_sizes, latent_size, make_folder, positive, signals


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    measure = commands.add_parser("bench", help="measure decodes and encodes here: a table, a JSON file and a plot")
    measure.add_argument("--vae", type=Path, help="a Wan VAE's file; default: random weights")
    measure.add_argument(
        "--architecture", choices=sorted(USUAL_FPS), default="wan2.1", help="without --vae; default: %(default)s"
    )
    measure.add_argument(
        "--direction", choices=[*bench.DIRECTIONS, "both"], default="both", help="default: %(default)s"
    )
    measure.add_argument("--width", type=positive, help="of random weights; default: the published one")
    measure.add_argument(
        "--sizes", type=frame_sizes, default="1280x720,832x480", help="of the frames; default: %(default)s"
    )
    measure.add_argument("--frames", type=positive, default=81, help="default: %(default)s")
    measure.add_argument("--devices", default="auto", help="1, 2, 4... and all of them are measured; default: auto")
    measure.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: %(default)s")
    measure.add_argument(
        "--chunk", type=chunk_size, default="auto", help="ours: (latent) frames at once; default: %(default)s"
    )
    measure.add_argument("--repeats", type=positive, default=3, help="calls after a first one; default: %(default)s")
    measure.add_argument("-o", "--output", type=Path, default=Path("wan-vae-parallel-bench"), help="folder to write to")
    measure.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.vae:
        architecture, weights = bench.weights_of(options.vae)
    else:
        architecture = Architecture.published(options.architecture, width=options.width)
        weights = bench.random_weights(architecture)
    for size in options.sizes:
        latent_size(architecture, size)
    directions = bench.DIRECTIONS if options.direction == "both" else (options.direction,)
    if architecture.encoder_width is None and "encode" in directions:
        if options.direction == "encode":
            raise CheckpointError(
                about_file(options.vae, "has no encoder; take the whole VAE's file, or measure decodes")
            )
        directions = ("decode",)
        print(f"{options.vae} has no encoder; only decodes are measured", file=sys.stderr)
    devices = parse_devices(options.devices)
    dtype = parse_dtype(options.dtype, devices[0])
    folder: Path = options.output
    make_folder(folder)
    figures, plot = folder / "bench.json", folder / "bench.png"
    for path in (figures, plot):
        check_writable(path)
    no_plot = bench.why_no_plot()
    if no_plot:
        print(no_plot, file=sys.stderr)
    facts = bench.environment(devices)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[bench.Row] = []
    settings = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "architecture": str(architecture),
        "dtype": dtype_name(dtype),
        "repeats": options.repeats,
        "chunk": options.chunk,
        "directions": directions,
    }
    for row in bench.measure(
        architecture=architecture,
        weights=weights,
        sizes=options.sizes,
        latent_frames=1 if architecture.images_only else architecture.latent_frames(options.frames),
        devices=devices,
        dtype=dtype,
        repeats=options.repeats,
        chunk=options.chunk,
        directions=directions,
    ):
        if not rows:
            plot.unlink(missing_ok=True)  # an older run's would lie beside this one's figures
        rows.append(row)
        # After each, so that what comes to a bad end still has figures.
        with signals.held():
            bench.save_json(figures, rows, facts, settings)
        result = row.failed if row.seconds is None else f"{row.seconds:.3f} s"
        print(f"{row.direction} {row.size}, {row.what} on {', '.join(row.devices)}: {result}", file=sys.stderr)
    print(bench.table(rows))
    print(f"figures: {figures}")
    if all(row.seconds is None for row in rows):
        raise WanVAEError(f"nothing could be measured; {figures} says why for each row")
    if not no_plot:
        title = f"{architecture.name}, {rows[0].frames} frames, {dtype_name(dtype)}, {facts.get('gpu', 'CPU')}"
        with signals.held():
            bench.save_plot(plot, rows, title)
        print(f"plot:    {plot}")
