"""RMSNorm over channels and SiLU, written straight into the buffer that the next convolution reads.

T frames, H rows, W columns, C channels
Bits    statistics in fp32 (fp64 for fp64), one rounding at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# The wide intermediates live for this many elements at a time: 128 MiB of fp32, whatever the frame's size.
BLOCK_ELEMENTS = 2**25
# Norms below this count as this (torch.nn.functional.normalize's eps, which Wan was trained with).
_MIN_NORM = 1e-12


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
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


def norm_silu(x: torch.Tensor, gamma: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes ``silu(rms_norm(x, gamma))`` to ``out``.

    Args:
        x: ``[T, H, W, C]``.
        gamma: C values, of any shape.
        out: ``[T, H, W, C]``, of any strides, such as the interior of a bordered buffer; every element is written.

    Raises:
        ValueError: ``out`` has another shape than ``x``, or ``gamma`` another number of values than C.
    """
    if out.shape != x.shape or gamma.numel() != x.shape[-1]:
        raise ValueError(f"norm_silu takes x {tuple(x.shape)}, out {tuple(out.shape)} and gamma {tuple(gamma.shape)}")
    _, rows, columns, channels = x.shape
    rows_at_once = max(1, BLOCK_ELEMENTS // (columns * channels))
    frames_at_once = max(1, rows_at_once // rows)
    for x_frames, out_frames in zip(x.split(frames_at_once), out.split(frames_at_once), strict=True):
        x_blocks, out_blocks = x_frames.split(rows_at_once, dim=1), out_frames.split(rows_at_once, dim=1)
        for x_block, out_block in zip(x_blocks, out_blocks, strict=True):
            out_block.copy_(F.silu(rms_norm(x_block, gamma), inplace=True))
