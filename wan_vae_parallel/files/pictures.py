"""Frames as 8-bit pictures, and texts in pictures.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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


def add_texts(path: Path, texts: Mapping[str, str]) -> None:
    """Puts texts into a PNG file (RFC 2083, 4.2.3), behind its header, where viewers and ComfyUI look for them."""
    content = path.read_bytes()
    header = len(_SIGNATURE) + 12 + 13  # a chunk's length, type and sum around a header of 13 bytes
    chunks = [_text_chunk(key, text) for key, text in texts.items()]
    path.write_bytes(b"".join([content[:header], *chunks, content[header:]]))


def _text_chunk(key: str, text: str) -> bytes:
    name = key.encode("latin-1", "replace")[:79]
    try:
        kind, data = b"tEXt", name + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:  # by the later kind, whose texts are of any language
        kind, data = b"iTXt", name + b"\0\0\0\0\0" + text.encode()
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
