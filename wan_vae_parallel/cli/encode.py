"""``encode``: a video, pictures or a tensor to latents."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import FrameError
from ..files.frames_in import is_tensor, open_frames, read_frames, resized
from ..files.latents import check_latent_output, save_latents
from ..images import encode_pictures
from ..loading import load_vae
from ..torchrun import launched, torchrun_group
from ..vae import VAE
from .shared import Progress, add_engine_options, check_no_input, frame_size, latent_size, positive, signals


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    encode = commands.add_parser("encode", help="encode a video, pictures or a tensor to latents")
    encode.add_argument(
        "frames",
        type=Path,
        metavar="VIDEO|PICTURES|SAFETENSORS",
        help="a video; frames/%%04d.png, a folder of pictures or one picture; or a tensor frames [B, T, H, W, C]",
    )
    encode.add_argument("--vae", type=Path, required=True, help="the Wan VAE's safetensors file, with its encoder")
    encode.add_argument("-o", "--output", type=Path, required=True, help="out.latent (ComfyUI's) or out.safetensors")
    encode.add_argument(
        "--size", type=frame_size, help="stretch frames to it, bicubic, as 832x480; default: as they are"
    )
    encode.add_argument("--frames", type=positive, dest="most", help="the first so many; default: all")
    encode.add_argument(
        "--images",
        action="store_true",
        help="each picture is a latent of its own, not a video's frame; always so with a VAE that knows no time",
    )
    encode.add_argument(
        "--normalized", action="store_true", help="latents as the diffusion model wants them (WanVideoWrapper)"
    )
    add_engine_options(encode, of="frames (of the video, at full resolution)")
    encode.set_defaults(run=_run, together=True)


def _run(options: argparse.Namespace) -> None:
    with torchrun_group(options.devices) if launched() else contextlib.nullcontext() as group:
        first = group is None or dist.get_rank(group) == 0
        if first:
            check_no_input(options.output, options.frames, options.vae)
            check_latent_output(options.output)
        else:
            logging.getLogger().setLevel(logging.WARNING)
        with load_vae(
            options.vae, devices=options.devices, dtype=options.dtype, chunk=options.chunk, group=group
        ) as vae:
            if options.size:
                latent_size(vae.architecture, options.size, encoded=True)
            options.images = options.images or vae.architecture.images_only
            if is_tensor(options.frames):
                latents, taken = _encode_tensor(vae, options, shown=first)
            else:
                latents, taken = _encode_stream(vae, options, shown=first)
            if first:
                with signals.held():
                    save_latents(options.output, latents)
                if options.images:
                    print(f"written: {options.output}, {len(latents)} latents of {taken} pictures")
                    return
                left = taken - vae.architecture.encoded_frames(taken)
                videos = f"{len(latents)} videos, each " if len(latents) > 1 else ""
                print(
                    f"written: {options.output}, {videos}{_counted(latents.shape[2], 'latent frame')} of "
                    + _counted(taken, "frame")
                    + (f", of which the last {left} make no whole latent frame" if left else "")
                )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _encode_tensor(vae: VAE, options: argparse.Namespace, *, shown: bool) -> tuple[torch.Tensor, int]:
    """Latents of frames that are all in memory, and how many frames a video has, or how many pictures there are."""
    frames = read_frames(options.frames, colours=vae.architecture.input_channels)
    frames = (frames if frames.dim() == 5 else frames[None])[:, : options.most]
    if options.size:
        frames = resized(frames, options.size)
    bar, architecture = Progress(shown=shown), vae.architecture
    if options.images:
        frames = frames.flatten(0, 1)[:, None]

    def show(done: int, total: int, _: torch.Tensor) -> None:
        signals.end_if_stopped()
        if not options.images:  # both count latent frames of all videos
            each, whole = total // len(frames), architecture.encoded_frames(frames.shape[1])
            videos, more = divmod(done, each)
            done, total = videos * whole + (architecture.frame_count(more) if more else 0), len(frames) * whole
        bar.show(done, total)

    with _named(options.frames):
        latents = vae.encode(frames, normalized=options.normalized, on_chunk=show)
    bar.close()
    return latents, len(frames) if options.images else frames.shape[1]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within it, errors about frames name the file that they are in."""
    try:
        yield
    except FrameError as error:
        raise FrameError(f"{path.name}: {error.text}") from error


def _encode_stream(vae: VAE, options: argparse.Namespace, *, shown: bool) -> tuple[torch.Tensor, int]:
    """The same of frames that are read one after the other, of which only a step's are ever in memory."""
    bar, taken, made = Progress(shown=shown), 0, 0
    parts = []
    with contextlib.ExitStack() as stack:
        with signals.held():
            source = stack.enter_context(
                open_frames(
                    options.frames,
                    colours=vae.architecture.input_channels,
                    most=options.most,
                    any_size=options.size is not None,
                )
            )

        def frames() -> Iterator[torch.Tensor]:
            nonlocal taken
            for frame in source:
                signals.end_if_stopped()
                taken += 1
                yield resized(frame, options.size) if options.size else frame

        if options.images:
            for latents in encode_pictures(vae, frames(), normalized=options.normalized):
                parts.append(latents)
                bar.show(taken, source.expected)
        else:
            for latents in vae.encode_stream(frames(), normalized=options.normalized):
                parts.append(latents)
                made += latents.shape[2]
                bar.show(vae.architecture.frame_count(made), source.expected)
        with signals.held():
            stack.close()
    bar.close()
    return torch.cat(parts, dim=0 if options.images else 2) if parts else torch.empty(0), taken
