"""Draws the pack's icon and banner for the ComfyUI registry: one picture, decoded as rows that fit without a seam.

python docs/draw.py
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_FOLDER = Path(__file__).parent
_OVERSAMPLING = 4
_ICON, _BANNER = 400, (1260, 540)  # the registry wants a square of up to 400, and 21:9
_NIGHT, _DUSK = (24, 60, 140), (255, 176, 96)
_ROWS = 4


def _picture(size: int) -> Image.Image:
    """A wheel in front of an evening sky, the demo's, in ``_ROWS`` rows whose right edges are still being made."""
    sky = Image.linear_gradient("L").resize((size, size))
    picture = Image.composite(Image.new("RGB", sky.size, _DUSK), Image.new("RGB", sky.size, _NIGHT), sky)
    draw = ImageDraw.Draw(picture)
    middle, radius = size / 2, 0.34 * size
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    for spoke in range(12):
        draw.pieslice(box, 30 * spoke, 30 * spoke + 30, fill=[(235, 60, 50), (245, 235, 215)][spoke % 2])
    done = Image.new("L", picture.size, 0)
    rows = ImageDraw.Draw(done)
    for row in range(_ROWS):
        right = size * (0.99 - 0.09 * (1 + math.sin(2.2 * row)))
        rows.rectangle((0, size * row / _ROWS, right, size * (row + 1) / _ROWS), fill=255)
    return Image.composite(picture, Image.new("RGB", picture.size, (16, 26, 54)), done)


def _rounded(picture: Image.Image, radius: int) -> Image.Image:
    corners = Image.new("L", picture.size, 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, *picture.size), radius, fill=255)
    picture.putalpha(corners)
    return picture


def draw_icon() -> Image.Image:
    """A square with round corners, transparent outside."""
    size = _OVERSAMPLING * _ICON
    return _rounded(_picture(size), size // 6).resize((_ICON, _ICON), Image.Resampling.LANCZOS)


def draw_banner() -> Image.Image:
    """The icon's picture, the pack's name, and what it does."""
    height = _BANNER[1]
    banner = Image.new("RGB", _BANNER, (16, 26, 54))
    side = 360
    icon = draw_icon().resize((side, side), Image.Resampling.LANCZOS)
    banner.paste(icon, (90, (height - side) // 2), icon)
    draw = ImageDraw.Draw(banner)
    left = 90 + side + 70
    for text, size, top, colour in (
        ("Wan VAE Parallel", 84, 155, (245, 235, 215)),
        ("Exact video VAE for Wan and Qwen-Image", 35, 285, _DUSK),
        ("No tiles, no seams. One GPU or all of them.", 35, 340, _DUSK),
    ):
        draw.text((left, top), text, fill=colour, font=ImageFont.load_default(size=size))
    return banner


def main() -> None:
    """Writes both beside this file, in few colours, for small files."""
    draw_icon().quantize(128, method=Image.Quantize.FASTOCTREE).save(_FOLDER / "icon.png", optimize=True)
    draw_banner().quantize(128).save(_FOLDER / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
