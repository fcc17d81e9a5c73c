"""Attention of one head over all positions of a frame.

T frames, N positions of this shard, M positions of the whole frame, C channels
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from .dispatch import KERNEL_DTYPES, kernels_run, say_once

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each position looks at all positions of its own frame.

    Args:
        query: ``[T, N, C]``.
        key: ``[T, M, C]``.
        value: ``[T, M, C]``.

    Returns:
        ``[T, N, C]``, contiguous.

    Raises:
        ValueError: the shapes don't fit.
    """
    if query.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            f"frame_attention takes [T, N, C], [T, M, C] and [T, M, C], not {tuple(query.shape)}, {tuple(key.shape)} "
            f"and {tuple(value.shape)}"
        )
    if kernels_run(query):
        attend = _kernel_for(query, key, value)
        if attend:
            return attend(query, key, value)
    # One frame a call: where torch has no fused kernel for this width it makes all N x M scores, and one frame's
    # are enough to hold.
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0]
            for q, k, v in zip(query, key, value, strict=True)
        ]
    )


@functools.cache
def _kernels() -> tuple[ModuleType | None, ModuleType | None]:
    """Our kernel, and the one that Hopper has of its own; what this Triton lacks something for is missing, and said."""
    try:
        from .kernels import attention
    except ImportError as error:
        say_once(
            f"attention runs on PyTorch's kernels, which is slower and whose last bits depend on chunks and devices: "
            f"{error}"
        )
        return None, None
    try:
        from .kernels import attention_hopper
    except ImportError as error:  # before Triton 3.5, or a new one that renamed Gluon
        say_once(f"attention runs on a slower kernel, whose frames are the same: {error}")
        return attention, None
    return attention, attention_hopper


def _kernel_for(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attend | None:
    """The fastest kernel that takes these; all of them give the same bits, so that one may stand in for another."""
    attention, hopper = _kernels()
    if hopper and hopper.can_attend(query, key, value):
        return hopper.frame_attention
    if not attention:
        return None
    if torch.cuda.get_device_capability(query.device) < (9, 0) or not attention.fits(query):
        name = torch.cuda.get_device_name(query.device)
        reason = f"our kernel for {query.shape[2]} channels needs more than {name} has"
    else:
        reason = attention.why_not(query, key, value) or ""
    if not reason:
        return attention.frame_attention
    if query.dtype in KERNEL_DTYPES:
        say_once(f"attention runs on PyTorch's kernels, whose last bits depend on chunks and devices: {reason}")
    return None
