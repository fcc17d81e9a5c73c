"""RMSNorm over channels, alone or with SiLU and written straight to where the next convolution reads.

T frames, H rows, W columns, C channels, S slots of an arena
Bits    statistics in fp32 (fp64 for fp64), one rounding at the end; on GPUs those of kernels/norm.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .dispatch import FallingBack, kernels_run, say_once

# The wide intermediates live for this many elements at a time: 128 MiB of fp32, whatever the frame's size.
BLOCK_ELEMENTS = 2**25
# Norms below this count as this (torch.nn.functional.normalize's eps, which Wan was trained with).
_MIN_NORM = 1e-12


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Normalises ``x`` over its last axis and scales by ``gamma``.

    Args:
        x: ``[..., C]``.
        gamma: C values, of any shape.

    Returns:
        ``[..., C]`` in ``x``'s dtype, contiguous.
    """
    if kernels_run(x):
        from .kernels import norm as kernels

        if kernels.can_normalize(x, gamma):
            with FallingBack(x):
                return kernels.rms_norm(x, gamma)
        else:
            _say_slower(x)
    return _wide_norm(x, gamma).to(x.dtype).contiguous()


def _wide_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Normalises ``x`` over its last axis and scales by ``gamma``, in at least fp32.

    Args:
        x: ``[..., C]``.
        gamma: C values, of any shape.

    Returns:
        ``[..., C]`` in fp32, or fp64 for an fp64 ``x``; the caller rounds.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_min_(_MIN_NORM)
    return (x * (math.sqrt(channels) / norm)).mul_(gamma.to(wide).reshape(channels))


def norm_silu(x: torch.Tensor, gamma: torch.Tensor, *, arena: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes ``silu(rms_norm(x, gamma))`` inside the borders of an arena's slots.

    Args:
        x: ``[T, H, W, C]``.
        gamma: C values, of any shape.
        arena: ``[S, H + 2b, W + 2b, C]``, b of 0 or more; its borders and other slots stay as they are.
        slots: ``[T]`` int32: the slot of each frame, all different.

    Raises:
        ValueError: the arena has no room for such frames, or ``gamma`` another number of values than C.
    """
    frames, rows, columns, channels = x.shape
    border = (arena.shape[1] - rows) // 2
    if border < 0 or arena.shape[1:] != (rows + 2 * border, columns + 2 * border, channels) or len(slots) != frames:
        raise ValueError(f"norm_silu takes x {tuple(x.shape)} to no arena {tuple(arena.shape)}, {len(slots)} slots")
    if gamma.numel() != channels:
        raise ValueError(f"norm_silu takes x {tuple(x.shape)} and not gamma {tuple(gamma.shape)}")
    if kernels_run(x):
        from .kernels import norm as kernels

        if kernels.can_norm_silu(x, gamma, arena, slots):
            with FallingBack(x):
                kernels.norm_silu(x, gamma, arena, slots)
                return
        else:
            _say_slower(x)
    interior = arena[:, border : arena.shape[1] - border, border : arena.shape[2] - border]
    indices = slots.long()
    rows_at_once = max(1, BLOCK_ELEMENTS // (columns * channels))
    frames_at_once = max(1, rows_at_once // rows)
    for first in range(0, frames, frames_at_once):
        chosen = indices[first : first + frames_at_once]
        for top in range(0, rows, rows_at_once):
            block = x[first : first + frames_at_once, top : top + rows_at_once]
            normed = F.silu(_wide_norm(block, gamma), inplace=True).to(arena.dtype)
            interior[:, top : top + rows_at_once].index_copy_(0, chosen, normed)


def _say_slower(x: torch.Tensor) -> None:
    dtype = str(x.dtype).removeprefix("torch.")
    say_once(
        f"norms over {x.shape[-1]} channels in {dtype} run on PyTorch's kernels, which is slower and "
        f"whose last bits may depend on chunks and devices"
    )
