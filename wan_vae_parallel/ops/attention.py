"""Attention of one head over all positions of a frame.

T frames, N positions of this shard, M positions of the whole frame, C channels
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from .dispatch import KERNEL_DTYPES, FallingBack, kernels_run, say_once
from .gpu import gpu

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
        ours, hopper = _kernels_for(query, key, value)
        if hopper:
            with FallingBack(query, instead="a slower one of ours does its work, to the same bits"):
                return hopper(query, key, value)
        if ours:
            with FallingBack(query):
                return ours(query, key, value)
    # One frame a call: where torch has no fused kernel for this width it makes all N x M scores, and one frame's
    # are enough to hold.
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0]
            for q, k, v in zip(query, key, value, strict=True)
        ]
    )


@functools.cache
def _kernels(device: torch.device) -> tuple[ModuleType | None, ModuleType | None]:
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
    except (ImportError, AttributeError) as error:  # before Triton 3.5, or a new one that renamed Gluon
        if gpu(device).capability == (9, 0):
            _say_slower(str(error))
        return attention, None
    return attention, attention_hopper


def _say_slower(reason: str) -> None:
    say_once(f"attention runs on a slower kernel, whose frames are the same: {reason}")


def _kernels_for(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Attend | None, Attend | None]:
    """What takes these of our kernel and Hopper's own; both give the same bits, so that one may stand in for another.

    Why none does is said.
    """
    attention, hopper = _kernels(query.device)
    if not attention:
        return None, None
    reason = attention.why_not(query, key, value)
    if not reason:
        if not hopper or not hopper.can_attend(query, key, value):
            return attention.frame_attention, None
        if lacking := hopper.why_not_on(query.device):
            _say_slower(lacking)
            return attention.frame_attention, None
        return attention.frame_attention, hopper.frame_attention
    if query.dtype in KERNEL_DTYPES:
        say_once(f"attention runs on PyTorch's kernels, whose last bits depend on chunks and devices: ours {reason}")
    return None, None
