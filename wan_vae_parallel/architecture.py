"""What a Wan VAE is made of, read off a checkpoint's shapes.

Facts from the model code and configurations published with Wan 2.1 and Wan 2.2
(github.com/Wan-Video/Wan2.1 and Wan2.2) and their diffusers configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import ArgumentError, CheckpointError

Family = Literal["wan2.1", "wan2.2"]

# Width multipliers of the decoder's stages, from the latent's resolution to the frame's.
_MULTIPLIERS = (4, 4, 2, 1)
# Residual blocks in front of each upsampling.
_BLOCKS = 3
_UPSAMPLES: tuple[Literal["3d", "2d"] | None, ...] = ("3d", "3d", "2d", None)

# The same of the encoder, from the frame's resolution on, and the blocks in front of each downsampling.
_DOWNSAMPLES: tuple[Literal["3d", "2d"] | None, ...] = ("2d", "3d", "3d", None)
_DOWN_BLOCKS = 2

_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


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
    upsample: Literal["3d", "2d"] | None
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
    downsample: Literal["3d", "2d"] | None
    scale: int
    time_scale: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Wan VAE, complete enough to build its decoder, and its encoder if it has one.

    Attributes:
        family: ``"wan2.1"`` (8x8 pixels a latent voxel) or ``"wan2.2"`` (16x16, residual up blocks, 2x2 patches).
        z_dim: latent channels; 16 and 48 as published.
        width: channels at full resolution; 96 and 256 as published, less in pruned relatives.
        output_channels: colours of a frame; 3, or 4 with alpha.
        encoder_width: the encoder's channels at full resolution; 96 and 160 as published. None without an encoder.
    """

    family: Family
    z_dim: int
    width: int
    output_channels: int = 3
    encoder_width: int | None = None

    def __post_init__(self) -> None:
        if self.family not in ("wan2.1", "wan2.2"):
            raise ArgumentError(f"architecture is {self.family!r}; it must be 'wan2.1' or 'wan2.2'")
        for name in ("z_dim", "width", "output_channels"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.encoder_width is not None and self.encoder_width < 1:
            raise ArgumentError(f"encoder_width is {self.encoder_width}; it must be at least 1, or None")

    @classmethod
    def published(cls, family: Family, *, width: int | None = None) -> Architecture:
        """The architecture as released, or its relative of another ``width``; the encoder's is in proportion."""
        if family == "wan2.2":
            width = 256 if width is None else width
            return cls(family=family, z_dim=48, width=width, encoder_width=max(1, width * 5 // 8))
        width = 96 if width is None else width
        return cls(family=family, z_dim=16, width=width, encoder_width=width)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        """Reads the architecture off tensor shapes in Wan's original key layout.

        Raises:
            CheckpointError: the keys that tell a Wan VAE are missing or have other shapes.
        """
        telling = {"decoder.conv1.weight": 5, "decoder.head.0.gamma": 4, "decoder.head.2.weight": 5}
        for key, axes in telling.items():
            if key not in shapes:
                raise CheckpointError(f"it lacks {key}")
            if len(shapes[key]) != axes or 0 in shapes[key]:
                raise CheckpointError(f"its {key} has the shape {shapes[key]}, where {axes} axes of 1 or more belong")
        conv_in, head_norm, head = (shapes[key] for key in telling)
        width, z_dim = head_norm[0], conv_in[1]
        family: Family = "wan2.2" if any(k.startswith("decoder.upsamples.0.upsamples.") for k in shapes) else "wan2.1"
        patch = 2 if family == "wan2.2" else 1
        if head[0] % patch**2:
            raise CheckpointError(
                f"decoder.head.2.weight makes {head[0]} channels; a Wan 2.2 VAE's are a multiple of {patch**2}"
            )
        encoder = shapes.get("encoder.conv1.weight")
        if encoder is not None and (len(encoder) != 5 or 0 in encoder):
            raise CheckpointError(f"its encoder.conv1.weight has the shape {encoder}, where 5 axes of 1 or more belong")
        return cls(
            family=family,
            z_dim=z_dim,
            width=width,
            output_channels=head[0] // patch**2,
            encoder_width=None if encoder is None else encoder[0],
        )

    @property
    def name(self) -> str:
        """What a person calls it, such as ``"Wan 2.1"``."""
        return "Wan " + self.family.removeprefix("wan")

    @property
    def patch(self) -> int:
        """Frame rows and columns that one position of the last layer makes."""
        return 2 if self.family == "wan2.2" else 1

    @property
    def spatial_ratio(self) -> int:
        """Frame rows per latent row, and columns per column."""
        return 8 * self.patch

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame, but for the first, which makes one."""
        return 4

    @property
    def first_channels(self) -> int:
        """Channels at the latent's resolution."""
        return self.width * _MULTIPLIERS[0]

    @property
    def residual(self) -> bool:
        """Whether each upsampling stage has a shortcut around it (Wan 2.2)."""
        return self.family == "wan2.2"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages behind the middle block, coarse to fine."""
        stages, entering, scale, time_scale = [], self.first_channels, 1, 1
        for multiplier, upsample in zip(_MULTIPLIERS, _UPSAMPLES, strict=True):
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
        """Published mean of each latent channel; ``None`` for a z_dim that was never published."""
        return {("wan2.1", 16): _WAN21_MEAN, ("wan2.2", 48): _WAN22_MEAN}.get((self.family, self.z_dim))

    @property
    def latents_std(self) -> tuple[float, ...] | None:
        """Published standard deviation of each latent channel; ``None`` likewise."""
        return {("wan2.1", 16): _WAN21_STD, ("wan2.2", 48): _WAN22_STD}.get((self.family, self.z_dim))

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
        return height // self.spatial_ratio, width // self.spatial_ratio

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
        entering, scale, time_scale = self.encoder_width, 2 ** (len(_MULTIPLIERS) - 1), self.temporal_ratio
        for multiplier, downsample in zip(reversed(_MULTIPLIERS), _DOWNSAMPLES, strict=True):
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
