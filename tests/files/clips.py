"""Frames with known colours, how they are written to a file, and what ffmpeg reads of it."""

import stat
import subprocess

import numpy
import torch

from wan_vae_parallel.files.ffmpeg import find_ffmpeg
from wan_vae_parallel.files.video import open_output

WIDTH, HEIGHT, COUNT = 96, 64, 5
COLOURS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1)]
NAMES = {"h264": "v.mp4", "h265": "v.mp4", "vp9": "v.webm", "prores": "v.mov", "ffv1": "v.mkv"}


def picture():
    """Grey and coloured ramps above, patches of saturated colours below."""
    frame = torch.zeros(HEIGHT, WIDTH, 3)
    ramp = torch.linspace(0, 1, WIDTH)
    frame[:16] = ramp[None, :, None]
    frame[16:32] = torch.stack([ramp, 1 - ramp, ramp / 2 + 0.25], dim=-1)
    for i, colour in enumerate(COLOURS):
        frame[32:, i * 12 : (i + 1) * 12] = torch.tensor(colour, dtype=torch.float32)
    return frame


FRAMES = picture().expand(1, COUNT, HEIGHT, WIDTH, 3)
SHAPE = FRAMES.shape


def write(path, frames=FRAMES, **options):
    with open_output(path, shape=frames.shape, **{"fps": 16, **options}) as put:
        for step in frames.split(2, dim=1):
            put(step)


def by_ffmpeg(path):
    """Frames as ffmpeg's own decoder and converter make them, by the file's tags."""
    done = subprocess.run(
        [
            *(find_ffmpeg(), "-v", "error", "-i", str(path)),
            # Left, in the middle of two rows, as players take it; by itself this converter takes the middle of both.
            *("-vf", "scale=in_h_chr_pos=0:in_v_chr_pos=128:flags=accurate_rnd+full_chroma_int+bicubic"),
            *("-f", "rawvideo", "-pix_fmt", "rgb48le", "-"),
        ],
        capture_output=True, check=True,
    )  # fmt: skip
    values = numpy.frombuffer(done.stdout, dtype="<u2").reshape(-1, HEIGHT, WIDTH, 3)
    return torch.from_numpy(values.astype("float32") / 65535)


def program(path, text):
    """A script in ffmpeg's place."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
