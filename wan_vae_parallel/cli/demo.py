"""``demo``: a small VAE and an animation, decoded, encoded and shown."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..demo import SMALLEST_WIDTH, demo_latents, save_demo_checkpoint
from ..errors import OutOfMemoryError
from ..files.latents import save_latents
from ..files.pictures import comparison_sheet, contact_sheet
from ..files.video import open_output
from ..files.whole import replacing
from ..loading import load_vae
from ..memory import free_memory, gibibytes
from ..to_video import USUAL_FPS
from .shared import Progress, add_engine_options, command_name, frame_size, latent_size, make_folder, positive, signals

logger = logging.getLogger(__name__)

# It encodes no more of its frames, whatever their number: without a GPU it takes its time.
_ROUND_TRIP_FRAMES = 5


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    demo = commands.add_parser("demo", help="make a small VAE and an animation's latents, decode, encode and show them")
    demo.add_argument("-o", "--output", type=Path, default=Path("wan-vae-parallel-demo"), help="folder to write to")
    demo.add_argument("--architecture", choices=sorted(USUAL_FPS), default="wan2.1", help="default: %(default)s")
    demo.add_argument("--width", type=int, help="base width of the VAE; default: the smallest, 8, or 16 of Wan 2.2")
    demo.add_argument("--size", type=frame_size, default=(384, 256), help="of the frames; default: 384x256")
    demo.add_argument("--latent-frames", type=positive, default=9, help="N make 4 * (N - 1) + 1 frames")
    add_engine_options(demo)
    demo.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    folder: Path = options.output
    width = SMALLEST_WIDTH[options.architecture] if options.width is None else options.width
    described = Architecture.published(options.architecture, width=width)
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
    logger.info("making a small VAE, and an animation of %d frames as latents", frame_count)
    with signals.held():
        save_demo_checkpoint(checkpoint, options.architecture, width)
    latents = demo_latents(described, frames=options.latent_frames, rows=rows, columns=columns)
    with signals.held():
        save_latents(latent_file, latents)
    with load_vae(checkpoint, devices=options.devices, dtype=options.dtype, chunk=options.chunk) as vae:
        logger.info("decoding it on %s", ", ".join(map(str, vae.devices)))
        frames = _with_bar(vae.decode, latents)
        beginning = frames[:, :_ROUND_TRIP_FRAMES]
        logger.info("encoding its first %d frames, and decoding them again", beginning.shape[1])
        again = _with_bar(vae.decode, _with_bar(vae.encode, beginning, each=described.frame_count))
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
    print(_next_steps(video, checkpoint, latent_file))


def _next_steps(video: Path, checkpoint: Path, latents: Path) -> str:
    command = command_name()
    return f"""
Look at {video}: a wheel turns, a ball bounces, a word drifts.

Next, with a VAE and latents of your own in place of the demo's:
  {command} info {checkpoint}     # what memory it takes
  {command} decode {latents} --vae {checkpoint} -o again.mp4
  {command} bench     # how fast it is here
In ComfyUI: copy {latents} to ComfyUI/input/ and {checkpoint} to
ComfyUI/models/vae/, and open a workflow that decodes a latent from the template browser, under this pack's name.
A real Wan 2.1 VAE: wan_2.1_vae.safetensors, of https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged"""


def _with_bar(
    work: Callable[..., torch.Tensor], given: torch.Tensor, each: Callable[[int], int] = lambda count: count
) -> torch.Tensor:
    """What ``work`` makes of what is given, with a bar; ``each`` makes frames of what it counts."""
    bar = Progress()
    made = work(given, on_chunk=lambda done, total, _: bar.show(each(done), each(total)))
    bar.close()
    return made
