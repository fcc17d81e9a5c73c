"""A checkpoint made by arithmetic that decodes latents to pictures and encodes pictures to such latents.

With it comes an animation in latents: decoded, it can be judged by eye, and so can what is encoded and decoded again.

Trained weights can't be had everywhere, and what random weights decode to can't be judged by eye. Here every layer
of the real architecture does its part to carry a picture:

- Signals travel in pairs (s, -s). silu(s) - silu(-s) = s, so a convolution behind a SiLU gets the signal back.
- A strong constant channel holds the RMS norm steady, so that norms neither dim nor brighten the picture.
- Residual branches sharpen a little, with each pixel's neighbours, and add seeded noise: small, but not zero. A
  missing halo row, a shifted row or a garbled layout anywhere shows.
- Convolutions behind upsamplings blur, which turns nearest upsampling into smooth pictures. Those that halve rows
  and columns average, each row with a little of the one below its own two.
- Time convolutions tell the frames apart: latent channels 0-2 are the colours of the first frame that a latent
  frame makes, 3-5 of the second, up to 9-11. The encoder's lay the signals of two frames side by side. The video's
  first frame passes them by; so the convolution before them writes its signals to both frames' places, of which they
  read the first.
- Wan 2.2's averaging shortcuts carry the same signals as the layers that they go around, to the same channels: all
  becomes twice as strong, constant and signals alike, and the next norm undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from .architecture import Architecture, Family
from .errors import ArgumentError
from .files.whole import replacing
from .model.decoder import WanDecoder
from .model.encoder import WanEncoder

# Base widths that can hold the signals.
SMALLEST_WIDTH: Mapping[Family, int] = {"wan2.1": 8, "wan2.2": 16}
_CONSTANT = 16.0
_SHARPEN = 0.05
_NOISE = 0.002
_FRAMES_PER_LATENT = 4
_COLOURS = 3
_SIGNALS = _FRAMES_PER_LATENT * _COLOURS

# Of rows 2i, 2i + 1 and 2i + 2, with their middle where that of the first two is.
_AVERAGE = torch.tensor([7.0, 10, -1]) / 16
_KERNELS = {
    "blur": torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16,
    "sharpen": torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 4,
    "average": _AVERAGE[:, None] * _AVERAGE,
}

# A map of signals: which two channels carry signal i as (s, -s).
Slots = Mapping[int, tuple[int, int]]


def _pairs(base: int, count: int) -> dict[int, tuple[int, int]]:
    """Signals 0..count-1 in neighbouring channel pairs from ``base`` on."""
    return {signal: (base + 2 * signal, base + 2 * signal + 1) for signal in range(count)}


def save_demo_checkpoint(path: str | Path, architecture: Family = "wan2.1", width: int | None = None) -> Architecture:
    """Writes a complete fp32 checkpoint, encoder included, in Wan's original key layout.

    The decoder shows latent channels 0-11 as colours, and the encoder makes them of colours (see the module's text).

    Args:
        path: where to; replaced if it is there.
        architecture: ``"wan2.1"`` or ``"wan2.2"``.
        width: base width; by default the published one, 96 or 256. At least 8 for Wan 2.1, 16 for Wan 2.2.

    Returns:
        The architecture of the checkpoint.

    Raises:
        ArgumentError: the width is too small to hold the signals.
        OutputError: the file can't be written.
    """
    described = Architecture.published(architecture, width=width)
    smallest = SMALLEST_WIDTH[architecture]
    if described.width < smallest:
        raise ArgumentError(f"width is {described.width}; a {described.name} demo checkpoint needs at least {smallest}")
    tensors = {**_decoder_tensors(described), **_encoder_tensors(described)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return described


def demo_latents(architecture: Architecture, *, frames: int, rows: int, columns: int) -> torch.Tensor:
    """An animation as latents for the demo checkpoint.

    Args:
        architecture: what the checkpoint is.
        frames: latent frames T; they decode to 4 * (T - 1) + 1 frames.
        rows: latent rows h.
        columns: latent columns w.

    Returns:
        ``[1, z, T, h, w]``, float32, de-normalised.
    """
    count = architecture.frame_count(frames)
    pictures = torch.stack([_picture(i, count, rows, columns) for i in range(count)])
    latents = torch.zeros(1, architecture.z_dim, frames, rows, columns)
    for latent_frame in range(frames):
        for step in range(_FRAMES_PER_LATENT):
            shown = 0 if latent_frame == 0 else 1 + _FRAMES_PER_LATENT * (latent_frame - 1) + step
            channel = step * _COLOURS
            latents[0, channel : channel + _COLOURS, latent_frame] = pictures[shown].movedim(-1, 0)
    return latents


def _picture(index: int, count: int, rows: int, columns: int) -> torch.Tensor:
    """One frame of the animation at the latent's resolution, ``[h, w, 3]`` in about [-0.9, 0.9]."""
    oversampling = 8
    width, height = columns * oversampling, rows * oversampling
    phase = index / max(count - 1, 1)
    sky = Image.linear_gradient("L").resize((width, height))
    picture = Image.composite(
        Image.new("RGB", sky.size, (255, 176, 96)), Image.new("RGB", sky.size, (24, 60, 140)), sky
    )
    draw = ImageDraw.Draw(picture)
    unit = min(width, height)
    # A wheel that turns, a ball that bounces, a word that drifts: rotation, motion, fine detail.
    centre, radius = (0.24 * width, 0.4 * height), 0.26 * unit
    for spoke in range(12):
        start = 360 * (spoke / 12 + phase / 2)
        box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
        draw.pieslice(box, start, start + 30, fill=[(235, 60, 50), (245, 235, 215)][spoke % 2])
    bounce = abs(math.sin(2.5 * math.pi * phase))
    x, y, r = (0.45 + 0.45 * phase) * width, (0.78 - 0.55 * bounce) * height, 0.1 * unit
    draw.ellipse([x - r, y - r, x + r, y + r], fill=(60, 200, 90), outline=(10, 60, 30), width=max(1, unit // 80))
    draw.text(
        ((0.30 + 0.2 * phase) * width, 0.84 * height),
        "WAN VAE",
        fill=(255, 255, 255),
        font=ImageFont.load_default(size=0.22 * unit),
        anchor="mm",
    )
    small = picture.resize((columns, rows), Image.Resampling.BOX)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(rows, columns, _COLOURS)
    return (values.float() / 255 * 2 - 1) * 0.9


class _Wiring:
    """The tensors of a checkpoint, filled with weak noise, then wired layer by layer."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {}
        for key, shape in shapes.items():
            fan_in = max(1, math.prod(shape[1:]))
            tensor = torch.randn(shape, generator=generator) * (_NOISE / math.sqrt(fan_in))
            self.tensors[key] = tensor + 1 if key.endswith("gamma") else tensor

    def carry(self, key: str, into: Slots, out: Slots, constants: Iterable[int]) -> None:
        """Wires a convolution's centre (and present) to copy each signal of ``out`` from its place in ``into``."""
        for signal, to in out.items():
            self._tap(key, into[signal], to, "centre")
        weight = self.tensors[key + ".weight"]
        for constant in constants:
            self._centre(weight)[constant, constant] = 1.0

    def blur(self, key: str, into: Slots, out: Slots, constants: Iterable[int]) -> None:
        """The same with a 3x3 blur, which makes nearest upsampling linear."""
        for signal, to in out.items():
            self._tap(key, into[signal], to, "blur")
        for constant in constants:
            self._centre(self.tensors[key + ".weight"])[constant, constant] = 1.0

    def residual_block(
        self, prefix: str, into: Slots, out: Slots, constants: Iterable[int], scale: float = 1.0
    ) -> None:
        """A block that keeps its signals (moving them if channels change) and sharpens them a little.

        Signals and constants are ``scale`` times as strong as they were at first.
        """
        constants = tuple(constants)
        for norm in ("residual.0", "residual.3"):
            gamma = self.tensors[f"{prefix}.{norm}.gamma"]
            # Undoes the norm, whose mean square the constants hold at their own.
            gamma.fill_(_CONSTANT * math.sqrt(len(constants) / gamma.numel()))
        self._behind_silu(f"{prefix}.residual.2", into, out, "centre", 1.0)
        for constant in constants:
            self._centre(self.tensors[f"{prefix}.residual.2.weight"])[constant, constant] = 1.0
        self._behind_silu(f"{prefix}.residual.6", out, out, "sharpen", _SHARPEN * scale)
        if f"{prefix}.shortcut.weight" in self.tensors:
            self.carry(f"{prefix}.shortcut", into, out, constants)

    def head(self, into: Slots, patch: int) -> None:
        """The decoder's end, which makes colours of signals."""
        gamma = self.tensors["decoder.head.0.gamma"]
        gamma.fill_(_CONSTANT / math.sqrt(gamma.numel()))
        centre = self._centre(self.tensors["decoder.head.2.weight"])
        for colour in range(_COLOURS):
            rows = slice(colour * patch**2, (colour + 1) * patch**2)
            centre[rows, into[colour][0]] = 1.0
            centre[rows, into[colour][1]] = -1.0

    def average(self, key: str, into: Slots, out: Slots, gain: float) -> None:
        """Wires a convolution that halves rows and columns to average each signal of ``out``."""
        for signal, to in out.items():
            self._tap(key, into[signal], to, "average", gain)

    def _behind_silu(self, key: str, into: Slots, out: Slots, kernel: str, gain: float) -> None:
        for signal, (plus, minus) in out.items():
            for sign, row in ((1, plus), (-1, minus)):
                self._spread(key, into[signal][0], row, kernel, sign * gain)
                self._spread(key, into[signal][1], row, kernel, -sign * gain)

    def _tap(self, key: str, source: tuple[int, int], to: tuple[int, int], kernel: str, gain: float = 1.0) -> None:
        for channel, into in zip(source, to, strict=True):
            self._spread(key, channel, into, kernel, gain)

    def _spread(self, key: str, source: int, to: int, kernel: str, gain: float) -> None:
        weight = self.tensors[key + ".weight"]
        present = weight if weight.dim() == 4 else weight[:, :, -1]
        if kernel == "centre":
            self._centre(weight)[to, source] = gain
        else:
            present[to, source] = gain * _KERNELS[kernel]

    @staticmethod
    def _centre(weight: torch.Tensor) -> torch.Tensor:
        """``[O, C]`` of the middle tap at the present frame, a view."""
        present = weight if weight.dim() == 4 else weight[:, :, -1]
        return present[:, :, present.shape[2] // 2, present.shape[3] // 2]


def _decoder_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in WanDecoder(architecture).state_dict().items()}
    wiring = _Wiring(shapes)
    residual = architecture.residual
    # Wan 2.2's last shortcut turns two neighbouring channels into two rows of one: the constant lies in both.
    constants = (0, 1) if residual else (0,)
    slots = _pairs(len(constants), _SIGNALS)

    passing = _pairs(0, _SIGNALS // 2)
    wiring.carry("conv2", passing, passing, ())
    entry = wiring._centre(wiring.tensors["decoder.conv1.weight"])
    for signal, (plus, minus) in slots.items():
        entry[plus, signal], entry[minus, signal] = 1.0, -1.0
    for constant in constants:
        wiring.tensors["decoder.conv1.bias"][constant] = _CONSTANT
    for prefix in ("decoder.middle.0", "decoder.middle.2"):
        wiring.residual_block(prefix, slots, slots, constants)

    signals = _SIGNALS
    for index, stage in enumerate(architecture.stages):
        prefix = f"decoder.upsamples.{index}.upsamples" if residual else "decoder.upsamples"
        number = 0 if residual else 4 * index
        inside, within = slots, constants
        if residual and stage.channels != stage.in_channels:
            # Narrower now: everything moves to the front, the constant into one channel.
            inside, within = _pairs(1, signals), (0,)
        for block in range(stage.blocks):
            wiring.residual_block(f"{prefix}.{number + block}", slots if block == 0 else inside, inside, within)
        if not stage.upsample:
            slots = inside
            break
        upsample = f"{prefix}.{number + stage.blocks}"
        kept = signals // 2 if stage.upsample == "3d" else signals
        if stage.upsample == "3d":
            _split_in_time(wiring, f"{upsample}.time_conv", inside, kept, within, stage.channels)
        if residual:
            # The shortcut adds the old signals (and the constant) where they were: the new ones go elsewhere.
            base = _behind(inside) if index < 2 else _behind(slots) // 2 + 1
            slots = _pairs(base, kept)
            wiring.blur(f"{upsample}.resample.1", inside, slots, ())
            constants = (0, 1) if index < 2 else (0,)
        else:
            slots = _pairs(1, kept)
            wiring.blur(f"{upsample}.resample.1", inside, slots, constants)
        signals = kept
    wiring.head(slots, architecture.patch)
    return wiring.tensors


def _split_in_time(wiring: _Wiring, key: str, slots: Slots, kept: int, constants: Iterable[int], channels: int) -> None:
    """Both halves of the output channels hold ``kept`` signals: the first half those of the earlier frame."""
    centre = wiring._centre(wiring.tensors[key + ".weight"])
    for later in (0, 1):
        for signal in range(kept):
            for to, source in zip(slots[signal], slots[later * kept + signal], strict=True):
                centre[later * channels + to, source] = 1.0
        for constant in constants:
            centre[later * channels + constant, constant] = 1.0


def _behind(slots: Slots) -> int:
    """The first channel behind all of ``slots``."""
    return 1 + max(channel for pair in slots.values() for channel in pair)


def _encoder_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in WanEncoder(architecture).state_dict().items()}
    wiring = _Wiring(shapes)
    residual, folded = architecture.residual, architecture.encoder_patch**2
    slots: Slots = _pairs(1, _COLOURS)
    constants: tuple[int, ...] = (0,)
    scale = 1.0

    entry = wiring._centre(wiring.tensors["encoder.conv1.weight"])
    for colour, (plus, minus) in slots.items():
        pixels = slice(colour * folded, (colour + 1) * folded)
        entry[plus, pixels], entry[minus, pixels] = 1 / folded, -1 / folded
    wiring.tensors["encoder.conv1.bias"][0] = _CONSTANT

    number = 0
    for index, stage in enumerate(architecture.down_stages):
        prefix = f"encoder.downsamples.{index}.downsamples" if residual else "encoder.downsamples"
        number = 0 if residual else number
        for _ in range(stage.blocks):
            wiring.residual_block(f"{prefix}.{number}", slots, slots, constants, scale)
            number += 1
        if stage.downsample:
            slots, constants = _halve(wiring, f"{prefix}.{number}", slots, constants, stage.downsample, residual)
            number += 1
        scale *= 2 if residual else 1

    for prefix in ("encoder.middle.0", "encoder.middle.2"):
        wiring.residual_block(prefix, slots, slots, constants, scale)
    gamma = wiring.tensors["encoder.head.0.gamma"]
    gamma.fill_(_CONSTANT * math.sqrt(len(constants) / gamma.numel()))
    leaving = wiring._centre(wiring.tensors["encoder.head.2.weight"])
    for signal, (plus, minus) in slots.items():
        leaving[signal, plus], leaving[signal, minus] = 1.0, -1.0
    passing = _pairs(0, _SIGNALS // 2)
    wiring.carry("conv1", passing, passing, ())
    return wiring.tensors


def _halve(
    wiring: _Wiring, prefix: str, slots: Slots, constants: tuple[int, ...], kind: str, residual: bool
) -> tuple[Slots, tuple[int, ...]]:
    """Wires a downsampling, and where its shortcut takes them; tells where signals and constants are behind it.

    With a shortcut, which adds them once, all leaves twice as strong as it came.
    """
    conv, time_conv = f"{prefix}.resample.1", f"{prefix}.time_conv"
    if kind == "2d":
        # The shortcut's are where they were.
        wiring.average(conv, slots, slots, 1.0)
        for constant in constants:
            wiring._centre(wiring.tensors[conv + ".weight"])[constant, constant] = 1.0
        return slots, constants

    # Places of the first frame's signals and constants, and of the second's.
    if residual:
        # Where the shortcut puts a channel's two frames.
        places: list[Slots] = [
            {signal: (2 * p + later, 2 * m + later) for signal, (p, m) in slots.items()} for later in (0, 1)
        ]
        constant_places = [[2 * constant + later for constant in constants] for later in (0, 1)]
        whole, added = 2.0, 1.0
    else:
        places = [slots, dict(enumerate(_pairs(_behind(slots), len(slots)).values()))]
        constant_places = [list(constants), []]
        whole, added = 1.0, 0.0
    own = whole - added
    # A video's first frame leaves so; the shortcut takes it for the second of two, with a blank one before it.
    wiring.average(conv, slots, places[0], whole)
    wiring.average(conv, slots, places[1], own)
    centre = wiring._centre(wiring.tensors[conv + ".weight"])
    for later, gain in ((0, whole), (1, own)):
        for constant, to in zip(constants, constant_places[later], strict=False):
            centre[to, constant] = gain
    # Of others both frames' first places are read, where they are ``whole`` strong.
    taps = wiring.tensors[time_conv + ".weight"][..., 0, 0]  # of the frame before, the first, the second
    for later in (0, 1):
        for signal in slots:
            for to, source in zip(places[later][signal], places[0][signal], strict=True):
                taps[to, source, 1 + later] = own / whole
        for to, source in zip(constant_places[later], constant_places[0], strict=False):
            taps[to, source, 1 + later] = own / whole
    gathered = {**places[0], **{signal + len(slots): pair for signal, pair in places[1].items()}}
    return gathered, tuple(sorted(constant_places[0] + constant_places[1]))
