"""What the steps of an encode hand on.

t latent frames of a step, h x w latent rows and columns of this shard, z channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
