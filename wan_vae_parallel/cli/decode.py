"""``decode``: latents to a video, pictures or a tensor."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..files.formats import FORMATS, QUALITIES
from ..files.latents import read_latents
from ..loading import load_vae
from ..to_video import VideoDecode, joined, output_settings
from ..torchrun import launched, torchrun_group
from .shared import Progress, add_engine_options, check_no_input, quality, rate, signals


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    decode = commands.add_parser("decode", help="decode latents to a video, pictures or a tensor")
    decode.add_argument(
        "latents",
        type=Path,
        nargs="+",
        help="ComfyUI's .latent, or a safetensors file with one 5-D tensor; several follow one another in one video",
    )
    decode.add_argument("--vae", type=Path, required=True, help="the Wan VAE's safetensors file")
    decode.add_argument(
        "--vae-alpha", type=Path, help="a second VAE, which decodes the frames' alpha: Wan-Alpha's alpha_channel"
    )
    decode.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="out.mp4, .mkv, .mov or .webm; out.safetensors; frames/%%04d.png",
    )
    decode.add_argument("--fps", type=rate, help="of the video; default: 16 for Wan 2.1, 24 for Wan 2.2")
    decode.add_argument("--format", choices=list(FORMATS), help="default: h264, vp9 for .webm, png8 for pictures")
    decode.add_argument(
        "--quality",
        type=quality,
        default="high",
        help=f"{', '.join(QUALITIES)}, or the encoder's CRF, where less is better; default: %(default)s",
    )
    decode.add_argument("--audio", type=Path, help="a file with sound; it is cut, or filled with silence")
    decode.add_argument(
        "--clear", action="store_true", help="remove pictures of an older, longer video that would follow the new ones"
    )
    decode.add_argument("--ffmpeg", help="another one than imageio-ffmpeg's: a path, or a name on the PATH")
    decode.add_argument(
        "--normalized", action="store_true", help="the latents are as the diffusion model made them (WanVideoWrapper)"
    )
    add_engine_options(decode)
    decode.set_defaults(run=_run, together=True)


def _run(options: argparse.Namespace) -> None:
    with torchrun_group(options.devices) if launched() else contextlib.nullcontext() as group:
        check_no_input(options.output, *options.latents, options.vae, options.vae_alpha, options.audio)
        parts = [read_latents(path) for path in options.latents]
        first = group is None or dist.get_rank(group) == 0
        if not first:
            logging.getLogger().setLevel(logging.WARNING)
        engine = {"devices": options.devices, "dtype": options.dtype, "chunk": options.chunk, "group": group}
        with contextlib.ExitStack() as stack:
            vae = stack.enter_context(load_vae(options.vae, **engine))
            alpha = stack.enter_context(load_vae(options.vae_alpha, **engine)) if options.vae_alpha else None
            latents = joined(parts, vae.architecture)
            settings = output_settings(
                vae.architecture,
                fps=options.fps,
                format=options.format,
                quality=options.quality,
                audio=options.audio,
                old_pictures="clear" if options.clear else "refuse",
                ffmpeg=options.ffmpeg,
            )
            bar = Progress(shown=first)
            decode = VideoDecode(
                vae,
                latents,
                options.output,
                settings,
                options.normalized,
                vae_alpha=alpha,
                on_wait=signals.end_if_stopped,
            )
            files = decode.run(on_chunk=lambda done, total, _: bar.show(done, total), at_work=signals.held)
            bar.close()
            if files:
                print(f"written: {files[0]}" + (f" to {files[-1]}" if len(files) > 1 else ""))
