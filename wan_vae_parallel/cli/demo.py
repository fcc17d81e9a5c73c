"""``demo``: a small VAE and an animation, decoded, encoded and shown."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..demo import demo_latents, save_demo_checkpoint
from ..errors import OutOfMemoryError
from ..files.latents import save_latents
from ..files.pictures import comparison_sheet, contact_sheet
from ..files.video import open_output
from ..files.whole import replacing
from ..loading import load_vae
from ..memory import free_memory, gibibytes
from ..to_video import USUAL_FPS
from .shared import Progress, add_engine_options, frame_size, latent_size, make_folder, positive, signals

# It encodes no more of its frames, whatever their number: without a GPU it takes its time.
_ROUND_TRIP_FRAMES = 13


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    demo = commands.add_parser("demo", help="make a small VAE and an animation's latents, decode, encode and show them")
    demo.add_argument("-o", "--output", type=Path, default=Path("wan-vae-parallel-demo"), help="folder to write to")
    demo.add_argument("--architecture", choices=sorted(USUAL_FPS), default="wan2.1", help="default: %(default)s")
    demo.add_argument("--width", type=int, default=16, help="base width of the VAE; default: %(default)s")
    demo.add_argument("--size", type=frame_size, default=(448, 256), help="of the frames, as 448x256")
    demo.add_argument("--latent-frames", type=positive, default=9, help="N make 4 * (N - 1) + 1 frames")
    add_engine_options(demo)
    demo.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    folder: Path = options.output
    described = Architecture.published(options.architecture, width=options.width)
    rows, columns = latent_size(described, options.size)
    # The latents are drawn at eight times their size, and decode to frames of the size asked for.
    pixels, frame_count = 3 * options.size[0] * options.size[1], described.frame_count(options.latent_frames)
    needed = 4 * (frame_count * (pixels + rows * columns) + min(frame_count, _ROUND_TRIP_FRAMES) * pixels)
    if needed > free_memory(torch.device("cpu")):
        raise OutOfMemoryError(
            f"the demo's frames would take {gibibytes(needed)}, more than is free; ask for fewer or smaller ones"
        )
    make_folder(folder)
    checkpoint, latent_file = folder / "demo_vae.safetensors", folder / "demo.latent"
    with signals.held():
        save_demo_checkpoint(checkpoint, options.architecture, options.width)
    latents = demo_latents(described, frames=options.latent_frames, rows=rows, columns=columns)
    with signals.held():
        save_latents(latent_file, latents)
    with load_vae(checkpoint, devices=options.devices, dtype=options.dtype, chunk=options.chunk) as vae:
        frames = _with_bar(vae.decode, latents)
        beginning = frames[:, :_ROUND_TRIP_FRAMES]
        again = _with_bar(vae.decode, vae.encode(beginning))
    video, sheet, round_trip = folder / "demo.mp4", folder / "demo.png", folder / "demo_roundtrip.png"
    with signals.held():
        with open_output(video, shape=frames.shape, fps=USUAL_FPS[options.architecture]) as write:
            write(frames)
        with replacing(sheet) as temporary:
            contact_sheet(frames[0]).save(temporary)
        with replacing(round_trip) as temporary:
            comparison_sheet(beginning[0], again[0]).save(temporary)
    print(f"video:         {video}")
    print(f"contact sheet: {sheet}")
    print(f"round trip:    {round_trip}: the first frames, and below them the same encoded and decoded again")
    print(f"VAE:           {checkpoint}")
    print(f"latents:       {latent_file}")


def _with_bar(decode: Callable[..., torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """What ``decode`` makes of latents, with a bar."""
    bar = Progress()
    frames = decode(latents, on_chunk=lambda done, total, _: bar.show(done, total))
    bar.close()
    return frames
