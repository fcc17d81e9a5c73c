"""Pictures of the workflows for ComfyUI's template browser: what goes in, what comes out, as the demo's VAE decodes it.

    python -m tools.thumbnails

writes ``workflows/NAME.jpg`` beside each ``workflows/NAME.json``; the browser looks for that ending.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import wan_vae_parallel as wvp

_ROOT = Path(__file__).resolve().parents[1]
# Square, as the browser shows them, which lays a badge over the top left corner.
_SIZE = (480, 480)
_PANEL = (208, 130)
_BEFORE, _AFTER, _MIDDLE = 72, 268, 240
_BACKGROUND, _LINE, _TEXT = (23, 25, 32), (90, 98, 120), (235, 238, 245)
_LATENT_FRAMES = 5

Picture = Image.Image


class Demo:
    """Latents of the demo, and their frames."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo_vae.safetensors"
            described = wvp.save_demo_checkpoint(path, "wan2.1", 8)
            latents = wvp.demo_latents(described, frames=_LATENT_FRAMES, rows=30, columns=48)
            with wvp.load_vae(path, devices="cpu", dtype="float32") as vae:
                frames = vae.decode(latents)[0]
        self.frames = [_image(frame) for frame in frames]
        # Three channels as colours, which are not the picture's, each voxel a square: what a latent looks like.
        shown = latents[0, [11, 9, 10]].movedim(0, -1) / 2 + 0.5
        self.latents = [_image(latent) for latent in shown]


def _image(pixels: torch.Tensor) -> Picture:
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def _panel(picture: Picture, *, squares: bool = False) -> Picture:
    panel = picture.resize(_PANEL, Image.Resampling.NEAREST if squares else Image.Resampling.LANCZOS)
    ImageDraw.Draw(panel).rectangle([0, 0, _PANEL[0] - 1, _PANEL[1] - 1], outline=_LINE, width=2)
    return panel


def _stack(pictures: list[Picture], *, squares: bool = False) -> Callable[[Picture, int], None]:
    """Pictures that lie on one another, the first on top: a video."""

    def draw(canvas: Picture, top: int) -> None:
        left = (_SIZE[0] - _PANEL[0] - 22 * (len(pictures) - 1)) // 2
        for depth, picture in reversed(list(enumerate(pictures))):
            canvas.paste(_panel(picture, squares=squares), (left + 22 * depth, top + 8 * (2 - depth)))

    return draw


def _pair(one: Picture, other: Picture) -> Callable[[Picture, int], None]:
    def draw(canvas: Picture, top: int) -> None:
        for picture, left in ((one, 24), (other, _SIZE[0] - 24 - _PANEL[0])):
            canvas.paste(_panel(picture), (left, top + 8))

    return draw


def _prompt(canvas: Picture, top: int) -> None:
    """Lines of text that nobody needs to read."""
    draw = ImageDraw.Draw(canvas)
    left = (_SIZE[0] - _PANEL[0]) // 2
    draw.rounded_rectangle([left, top + 8, left + _PANEL[0], top + 8 + _PANEL[1]], 12, outline=_LINE, width=2)
    for row, length in enumerate((150, 170, 120, 160, 70)):
        line = top + 26 + 21 * row
        draw.rounded_rectangle([left + 18, line, left + 18 + length, line + 9], 4, fill=(130, 140, 165))


def _edges(picture: Picture) -> Picture:
    return picture.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda value: min(255, 12 * value)).convert("RGB")


def _thumbnail(before: Callable[[Picture, int], None], after: Callable[[Picture, int], None], caption: str) -> Picture:
    canvas = Image.new("RGB", _SIZE, _BACKGROUND)
    before(canvas, _BEFORE)
    after(canvas, _AFTER)
    draw = ImageDraw.Draw(canvas)
    middle = _SIZE[0] // 2
    draw.line([middle, _MIDDLE - 16, middle, _MIDDLE + 4], fill=_TEXT, width=5)
    draw.polygon([(middle - 13, _MIDDLE + 2), (middle + 13, _MIDDLE + 2), (middle, _MIDDLE + 18)], fill=_TEXT)
    draw.text((middle, 446), caption, fill=_TEXT, font=ImageFont.load_default(size=30), anchor="mm")
    return canvas


def main() -> None:
    """Writes all of them."""
    demo = Demo()
    first, *_, last = demo.frames
    video = _stack(demo.frames[:9:4])
    latent = _stack(demo.latents[:3], squares=True)
    picture = _stack([first])
    pictures = {
        "Decode a Saved Latent": (latent, video, "latent to frames"),
        "Decode a Saved Latent to Video": (latent, video, "latent to a file"),
        "Encode a Video": (video, latent, "frames to latent"),
        "Encode a Video File to Latent": (video, latent, "a file to latent"),
        "Qwen-Image Text to Image": (_prompt, picture, "Qwen-Image"),
        "Wan 2.1 1.3B Text to Video": (_prompt, video, "Wan 2.1  1.3B"),
        "Wan 2.1 VACE 14B Video to Video": (_pair(_edges(first), first), video, "VACE 14B"),
        "Wan 2.2 14B First-Last Frame": (_pair(first, last), video, "Wan 2.2  14B"),
        "Wan 2.2 14B Image to Video": (picture, video, "Wan 2.2  14B"),
        "Wan 2.2 14B Text to Video": (_prompt, video, "Wan 2.2  14B"),
        "Wan 2.2 5B Text or Image to Video": (_prompt, video, "Wan 2.2  5B"),
    }
    for name, (before, after, caption) in pictures.items():
        _thumbnail(before, after, caption).save(_ROOT / "workflows" / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
