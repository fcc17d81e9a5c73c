"""What the steps of decodes and encodes hand on.

B videos, t (latent) frames of a step, H x W pixels, C colours; h x w latent rows and columns of this shard, z channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.pixel_format import PixelFormat


@dataclass(frozen=True)
class Frames:
    """What a step of a decode makes.

    Attributes:
        values: contiguous, on the device.
        finite: whether the frames are free of NaN; one value on the device.
        light: whether they are little work, so that many such steps may be on their way.
    """

    values: torch.Tensor
    finite: torch.Tensor
    light: bool = False

    @classmethod
    def of(cls, frames: torch.Tensor, pixels: PixelFormat | None = None) -> Frames:
        """Frames ``[B, t, H, W, C]`` in [0, 1] as they are, or as bytes ``[B, t, n]`` in a pixel format."""
        # One pass without a mask: a sum of values in [0, 1] is NaN only where one of them is.
        return cls(frames if pixels is None else pixels.convert(frames), frames.sum().isfinite())


@dataclass(frozen=True)
class Latents:
    """What a step of an encode makes.

    Attributes:
        means: ``[z, t, h, w]``, contiguous, at least fp32, on the device; None if more frames are needed for any.
        pixel_range: the least and the largest value of pixels that were read since the step before, NaN if one is;
            None if none were read.
    """

    means: torch.Tensor | None
    pixel_range: torch.Tensor | None
