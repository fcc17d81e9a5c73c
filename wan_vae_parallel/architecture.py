"""What a Wan VAE is made of, or a relative of it, read off a checkpoint's shapes.

Facts from the model code and configurations published with Wan 2.1 and Wan 2.2
(github.com/Wan-Video/Wan2.1 and Wan2.2) and their diffusers configurations, and from diffusers'
AutoencoderKLQwenImage21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ArgumentError, CheckpointError
from .latent_statistics import PUBLISHED

Family = Literal["wan2.1", "wan2.2", "qwen-image-2.1"]
Resampling = Literal["3d", "2d"] | None

# Residual blocks in front of each upsampling, and in front of each downsampling.
_BLOCKS, _DOWN_BLOCKS = 3, 2
# Of a picture: grey, red with green and blue, and alpha besides.
_COLOURS = (1, 3, 4)
_SCALES: tuple[Resampling, ...] = ("3d", "3d", "2d", None)
# Of each family as published: width multipliers and upsamplings of the decoder's stages, from the latent's resolution
# to the frame's; frames that a convolution sees. The encoder's stages are the same the other way round.
_PUBLISHED_STAGES: dict[Family, tuple[tuple[int, ...], tuple[Resampling, ...], int]] = {
    "wan2.1": ((4, 4, 2, 1), _SCALES, 3),
    "wan2.2": ((4, 4, 2, 1), _SCALES, 3),
    "qwen-image-2.1": ((8, 8, 4, 2, 1), ("3d", *_SCALES), 1),
}
_NAMES: dict[Family, str] = {"wan2.1": "Wan 2.1", "wan2.2": "Wan 2.2", "qwen-image-2.1": "Qwen-Image-2.1"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of the decoder: residual blocks, then an upsampling.

    Attributes:
        in_channels: channels that enter.
        channels: channels of the residual blocks.
        out_channels: channels that leave, after the upsampling if there is one.
        blocks: number of residual blocks.
        upsample: ``"3d"`` doubles frames, rows and columns, ``"2d"`` rows and columns, ``None`` nothing.
        scale: rows (and columns) of the blocks per latent row.
        time_scale: frames of the blocks per latent frame (after the first).
    """

    in_channels: int
    channels: int
    out_channels: int
    blocks: int
    upsample: Resampling
    scale: int
    time_scale: int


@dataclass(frozen=True, kw_only=True)
class DownStage:
    """One resolution of the encoder: residual blocks, then a downsampling.

    Attributes:
        in_channels: channels that enter.
        channels: channels of the residual blocks, and that leave.
        blocks: number of residual blocks.
        downsample: ``"3d"`` halves frames, rows and columns, ``"2d"`` rows and columns, ``None`` nothing.
        scale: rows (and columns) of the blocks per latent row.
        time_scale: frames of the blocks per latent frame (after the first).
    """

    in_channels: int
    channels: int
    blocks: int
    downsample: Resampling
    scale: int
    time_scale: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Wan VAE or a relative, complete enough to build its decoder, and its encoder if it has one.

    Attributes:
        family: ``"wan2.1"`` (8x8 pixels a latent voxel), ``"wan2.2"`` (16x16, residual up blocks, 2x2 patches) or
            ``"qwen-image-2.1"`` (16x16, residual up blocks, images alone).
        z_dim: latent channels; 16, 48 and 64 as published.
        width: channels at full resolution; 96, 256 and 144 as published, less in pruned relatives.
        output_channels: colours of a frame; 3, or 4 with alpha.
        encoder_width: the encoder's channels at full resolution; 96, 160 and 96 as published. None without an encoder.
        input_channels: colours of the frames that the encoder takes; 0 for as many as ``output_channels``.
        upscale: 2 if the decoder makes frames of twice the size that the encoder takes (Wan 2.1 alone), else 1.
        multipliers: of the width in the decoder's stages, coarse to fine; empty for the family's.
        upsamples: of the decoder's stages; empty for the family's.
        mean: of each latent channel, where the file has its own; None for the published one.
        std: their standard deviation, likewise.
    """

    family: Family
    z_dim: int
    width: int
    output_channels: int = 3
    encoder_width: int | None = None
    input_channels: int = 0
    upscale: int = 1
    multipliers: tuple[int, ...] = ()
    upsamples: tuple[Resampling, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.family not in _PUBLISHED_STAGES:
            known = ", ".join(map(repr, _PUBLISHED_STAGES))
            raise ArgumentError(f"architecture is {self.family!r}; it must be one of {known}")
        multipliers, upsamples, _ = _PUBLISHED_STAGES[self.family]
        # What is left to the family is filled in, so that equal architectures are equal.
        for name, default in (
            ("input_channels", self.output_channels),
            ("multipliers", multipliers),
            ("upsamples", upsamples),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        for name in ("z_dim", "width", "output_channels", "input_channels"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.encoder_width is not None and self.encoder_width < 1:
            raise ArgumentError(f"encoder_width is {self.encoder_width}; it must be at least 1, or None")
        if self.upscale not in ((1, 2) if self.family == "wan2.1" else (1,)):
            raise ArgumentError(f"upscale is {self.upscale}; it must be 1, or for Wan 2.1 also 2")
        if len(self.multipliers) != len(self.upsamples) or min(self.multipliers) < 1 or self.upsamples[-1] is not None:
            raise ArgumentError(
                f"multipliers {self.multipliers} and upsamples {self.upsamples} must be as many, the multipliers at "
                f"least 1 and the last upsampling None"
            )
        for statistics in (self.mean, self.std):
            if statistics is not None and len(statistics) != self.z_dim:
                raise ArgumentError(f"{len(statistics)} statistics of latents don't fit {self.z_dim} channels")

    @classmethod
    def published(cls, family: Family, *, width: int | None = None) -> Architecture:
        """The architecture as released, or its relative of another ``width``; the encoder's is in proportion."""
        if family == "wan2.2":
            width = 256 if width is None else width
            return cls(family=family, z_dim=48, width=width, encoder_width=max(1, width * 5 // 8))
        if family == "qwen-image-2.1":
            width = 144 if width is None else width
            return cls(family=family, z_dim=64, width=width, output_channels=4, encoder_width=max(1, width * 2 // 3))
        width = 96 if width is None else width
        return cls(family=family, z_dim=16, width=width, encoder_width=width)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        """Reads the architecture off tensor shapes in Wan's original key layout.

        Convolutions that see one frame may be without that axis, as in diffusers' layout of Qwen-Image-2.1.

        Raises:
            CheckpointError: the keys that tell a Wan VAE are missing or have other shapes.
        """
        telling = ("decoder.conv1.weight", "decoder.head.0.gamma", "decoder.head.2.weight", "encoder.conv1.weight")
        found = {key: _telling_shape(key, shapes[key]) for key in telling if key in shapes}
        for key in telling[:3]:
            if key not in found:
                raise CheckpointError(f"it lacks {key}")
        conv_in, width, head = found[telling[0]], found[telling[1]][0], found[telling[2]]
        frames = {key: shape[2] for key, shape in found.items() if len(shape) == 5}
        if len(set(frames.values())) > 1:
            listed = ", ".join(f"{key} {count}" for key, count in frames.items())
            raise CheckpointError(f"its convolutions see different numbers of frames: {listed}")
        residual = any(key.startswith("decoder.upsamples.0.upsamples.") for key in shapes)
        family: Family = "wan2.1" if not residual else "wan2.2" if conv_in[2] > 1 else "qwen-image-2.1"
        patch = 2 if family == "wan2.2" else 1
        if head[0] % patch**2:
            raise CheckpointError(
                f"decoder.head.2.weight makes {head[0]} channels; a Wan 2.2 VAE's are a multiple of {patch**2}"
            )
        encoder = found.get(telling[3])
        colours, taken = head[0] // patch**2, 0
        if encoder is not None:
            if encoder[1] % patch**2:
                raise CheckpointError(
                    f"encoder.conv1.weight takes {encoder[1]} channels; a Wan 2.2 VAE's are a multiple of {patch**2}"
                )
            taken = encoder[1] // patch**2
        # Four pixels of each colour; no file is known whose pictures have 12 or 16 colours.
        doubled = family == "wan2.1" and (colours == 4 * taken if taken else colours in (12, 16))
        colours = colours // 4 if doubled else colours
        for key, made in ((telling[2], colours), (telling[3], taken or colours)):
            if made not in _COLOURS:
                raise CheckpointError(
                    f"its pictures have {made} colours by {key} {found[key]}; known are 1, 3 and 4, and "
                    f"of an upscale2x VAE's decoder four times as many as its encoder takes"
                )
        return cls(
            family=family,
            z_dim=conv_in[1],
            width=width,
            output_channels=colours,
            encoder_width=None if encoder is None else encoder[0],
            input_channels=taken,
            upscale=2 if doubled else 1,
            **_stages_of(shapes, width) if residual else {},
        )

    @property
    def name(self) -> str:
        """What a person calls it, such as ``"Wan 2.1"``."""
        return _NAMES[self.family] + (" upscale2x" if self.upscale > 1 else "")

    @property
    def kernel_frames(self) -> int:
        """Frames that a convolution sees: the present one, and those before it."""
        return _PUBLISHED_STAGES[self.family][2]

    @property
    def images_only(self) -> bool:
        """Whether it knows no time: each latent frame is a picture."""
        return self.kernel_frames == 1

    @property
    def patch(self) -> int:
        """Frame rows and columns that one position of the decoder's last layer makes."""
        return 2 if self.family == "wan2.2" else self.upscale

    @property
    def encoder_patch(self) -> int:
        """Frame rows and columns that one position of the encoder's first layer reads."""
        return 2 if self.family == "wan2.2" else 1

    @property
    def spatial_ratio(self) -> int:
        """Decoded frames' rows per latent row, and columns per column."""
        return self._doublings * self.patch

    @property
    def encode_ratio(self) -> int:
        """The same of frames that are encoded: half of that with ``upscale``."""
        return self._doublings * self.encoder_patch

    @property
    def _doublings(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame, but for the first, which makes one."""
        return 1 if self.images_only else self._time_doublings

    @property
    def _time_doublings(self) -> int:
        return int(2 ** self.upsamples.count("3d"))

    @property
    def first_channels(self) -> int:
        """Channels at the latent's resolution."""
        return self.width * self.multipliers[0]

    @property
    def residual(self) -> bool:
        """Whether each upsampling stage has a shortcut around it (Wan 2.2, Qwen-Image-2.1)."""
        return self.family != "wan2.1"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages behind the middle block, coarse to fine."""
        stages, entering, scale, time_scale = [], self.first_channels, 1, 1
        for multiplier, upsample in zip(self.multipliers, self.upsamples, strict=True):
            channels = self.width * multiplier
            # Wan 2.1 halves the channels where it doubles the rows, Wan 2.2 keeps them.
            leaving = channels // 2 if upsample and not self.residual else channels
            stages.append(
                Stage(
                    in_channels=entering,
                    channels=channels,
                    out_channels=leaving,
                    blocks=_BLOCKS,
                    upsample=upsample,
                    scale=scale,
                    time_scale=time_scale,
                )
            )
            entering = leaving
            scale *= 2 if upsample else 1
            time_scale *= 2 if upsample == "3d" else 1
        return tuple(stages)

    @property
    def latents_mean(self) -> tuple[float, ...] | None:
        """Mean of each latent channel, the file's own or else published; ``None`` for a z_dim that never was."""
        return self.mean or PUBLISHED.get((self.family, self.z_dim), (None, None))[0]

    @property
    def latents_std(self) -> tuple[float, ...] | None:
        """Standard deviation of each latent channel; ``None`` likewise."""
        return self.std or PUBLISHED.get((self.family, self.z_dim), (None, None))[1]

    def latent_frames(self, frames: int) -> int:
        """The fewest latent frames that decode to at least ``frames`` frames."""
        return -(-(frames - 1) // self.temporal_ratio) + 1

    def frame_count(self, latent_frames: int) -> int:
        """Frames that ``latent_frames`` >= 1 decode to."""
        return self.temporal_ratio * (latent_frames - 1) + 1

    def frame_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of the frames that a latent of ``rows`` x ``columns`` decodes to."""
        return rows * self.spatial_ratio, columns * self.spatial_ratio

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent that frames of whole latent voxels encode to."""
        return height // self.encode_ratio, width // self.encode_ratio

    def encoded_frames(self, frames: int) -> int:
        """Of ``frames`` >= 1 those that an encode uses: one, and then as many as make whole latent frames."""
        return (frames - 1) // self.temporal_ratio * self.temporal_ratio + 1

    @property
    def down_stages(self) -> tuple[DownStage, ...]:
        """The encoder's stages, from the frame's resolution to the latent's.

        Raises:
            ArgumentError: there is no encoder.
        """
        if self.encoder_width is None:
            raise ArgumentError(f"this {self.name} VAE has no encoder")
        stages = []
        entering, scale, time_scale = self.encoder_width, self._doublings, self._time_doublings
        downsamples = (*reversed(self.upsamples[:-1]), None)
        for multiplier, downsample in zip(reversed(self.multipliers), downsamples, strict=True):
            channels = self.encoder_width * multiplier
            stages.append(
                DownStage(
                    in_channels=entering,
                    channels=channels,
                    blocks=_DOWN_BLOCKS,
                    downsample=downsample,
                    scale=scale,
                    time_scale=time_scale,
                )
            )
            entering = channels
            if downsample:
                scale //= 2
            if downsample == "3d":
                time_scale //= 2
        return tuple(stages)


def _telling_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with all its axes: a norm's as its channels, a convolution's ``[O, C, kt, kh, kw]``."""
    if key.endswith("gamma"):
        if shape and shape[0] > 0 and all(extent == 1 for extent in shape[1:]):
            return shape[:1]
        raise CheckpointError(f"its {key} has the shape {shape}, where channels and axes of 1 belong")
    if len(shape) == 4:
        shape = (*shape[:2], 1, *shape[2:])
    if len(shape) != 5 or 0 in shape:
        raise CheckpointError(f"its {key} has the shape {shape}, where 5 axes of 1 or more belong")
    return shape


def _stages_of(shapes: Mapping[str, tuple[int, ...]], width: int) -> dict[str, Any]:
    """Multipliers and upsamplings of residual stages; nothing if they are none that can be."""
    multipliers: list[int] = []
    upsamples: list[Resampling] = []
    while (first := shapes.get(f"decoder.upsamples.{len(multipliers)}.upsamples.0.residual.2.weight")) is not None:
        if not first or first[0] % width:
            return {}
        prefix = f"decoder.upsamples.{len(multipliers)}.upsamples.{_BLOCKS}"
        multipliers.append(first[0] // width)
        upsamples.append(
            "3d"
            if f"{prefix}.time_conv.weight" in shapes
            else "2d"
            if f"{prefix}.resample.1.weight" in shapes
            else None
        )
    if not multipliers or upsamples[-1] is not None or 0 in multipliers or None in upsamples[:-1]:
        return {}
    return {"multipliers": tuple(multipliers), "upsamples": tuple(upsamples)}
