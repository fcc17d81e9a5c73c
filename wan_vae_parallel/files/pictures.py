"""Frames as 8-bit pictures.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

import torch
from PIL import Image


def contact_sheet(frames: torch.Tensor, *, columns: int = 4, rows: int = 2, width: int = 1280) -> Image.Image:
    """A picture of ``columns * rows`` frames spread over a video.

    Args:
        frames: ``[T, H, W, C]`` in [0, 1].
        columns: frames beside one another.
        rows: frames above one another.
        width: of the sheet, in pixels.
    """
    count = min(columns * rows, len(frames))
    columns, rows = min(columns, count), -(-count // columns)
    cell = width // columns, max(1, width * frames.shape[1] // (columns * frames.shape[2]))
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]))
    for place in range(count):
        index = place * (len(frames) - 1) // max(1, count - 1)
        picture = to_picture(frames[index]).convert("RGB").resize(cell, Image.Resampling.LANCZOS)
        sheet.paste(picture, (place % columns * cell[0], place // columns * cell[1]))
    return sheet


def comparison_sheet(above: torch.Tensor, below: torch.Tensor, *, columns: int = 4, width: int = 1280) -> Image.Image:
    """A picture of ``columns`` frames of one video, and below them the same of another, each ``[T, H, W, C]``."""
    sheets = [contact_sheet(frames, columns=columns, rows=1, width=width) for frames in (above, below)]
    both = Image.new("RGB", (sheets[0].width, sheets[0].height + sheets[1].height))
    both.paste(sheets[0], (0, 0))
    both.paste(sheets[1], (0, sheets[0].height))
    return both


def to_picture(frame: torch.Tensor) -> Image.Image:
    """One frame ``[H, W, C]`` in [0, 1], C of 1, 3 or 4, as an 8-bit picture."""
    return Image.fromarray(to_bytes(frame).squeeze(-1).numpy())


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1] as 8 bits, rounded to the nearest."""
    return (frames * 255).round_().to(torch.uint8)
