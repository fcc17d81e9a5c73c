"""Attention of one head over all positions of a frame.

T frames, N positions of this shard, M positions of the whole frame, C channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each position looks at all positions of its own frame.

    Args:
        query: ``[T, N, C]``.
        key: ``[T, M, C]``.
        value: ``[T, M, C]``.

    Returns:
        ``[T, N, C]``, contiguous.
    """
    # One frame a call: where torch has no fused kernel for this width it makes all N x M scores, and one frame's
    # are enough to hold.
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0]
            for q, k, v in zip(query, key, value, strict=True)
        ]
    )
