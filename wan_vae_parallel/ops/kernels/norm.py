"""RMSNorm over channels, alone or with SiLU and written straight into the frame slots of an arena, in Triton.

T frames, H rows, W columns, C channels, S slots, b border
Layout  in contiguous [T, H, W, C], out contiguous [S, H + 2b, W + 2b, C]; one read, one write.
Tile    C = G * B, B the largest power of two in it: a program holds G blocks of [positions, B], so that no lane
        is spent on padding (at 96 channels, 3 * 32 instead of 128). 2048 to 5120 values a program: 4.1 TB/s on
        H200 at 96, 192 and 384 channels, where a copy has 4.2; programs that stay and walk over rows had 3.0 to 3.7.
Bits    statistics in fp32, one rounding at the end. A position's sum is G fused multiply-adds a lane and then a tree
        over B that depends on C and the dtype alone: not on T, H, W, the slot, or how many positions a program holds.
"""

# Kernels know no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import launch

# Norms below this count as this, as in norm_silu.py.
_MIN_NORM = 1e-12
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_GROUPS, _MIN_LANES = 5, 16
# With 512 lanes or more, other numbers of warps share a position's channels out differently: other sums, other bits.
_WARPS = 4
# Values a program loads at once: at least 16 bytes a thread in half precision, so that the tile's size does not
# change who holds which channels.
_MIN_BLOCK, _TILE_VALUES = 1024, 2048


@triton.jit
def _norm_kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    slots_ptr,
    columns,
    x_frame,
    x_row,
    out_frame,
    out_row,
    out_start,
    ROOT: tl.constexpr,
    MIN_NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    POSITIONS: tl.constexpr,
    SILU: tl.constexpr,
    PAGED: tl.constexpr,
):
    CHANNELS: tl.constexpr = GROUPS * LANES
    row = tl.program_id(1)
    frame = tl.program_id(2)
    slot = frame.to(tl.int64)
    if PAGED:
        slot = tl.load(slots_ptr + frame).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    lane = tl.arange(0, LANES)
    mask = (position < columns)[:, None]
    # Within a row int32 is enough; what comes before it is one scalar.
    offsets = position[:, None] * CHANNELS + lane[None, :]
    x_row_ptr = x_ptr + (frame.to(tl.int64) * x_frame + row.to(tl.int64) * x_row)
    out_row_ptr = out_ptr + (slot * out_frame + row.to(tl.int64) * out_row + out_start)

    blocks = ()
    squares = tl.zeros([POSITIONS, LANES], tl.float32)
    for group in tl.static_range(GROUPS):
        block = tl.load(x_row_ptr + offsets + group * LANES, mask=mask, other=0.0).to(tl.float32)
        squares += block * block
        blocks = blocks + (block,)
    norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), MIN_NORM)
    scale = (ROOT / norm)[:, None]
    for group in tl.static_range(GROUPS):
        gamma = tl.load(gamma_ptr + group * LANES + lane).to(tl.float32)
        y = blocks[group] * scale * gamma[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_row_ptr + offsets + group * LANES, y.to(out_ptr.dtype.element_ty), mask=mask)


def can_normalize(x: torch.Tensor, gamma: torch.Tensor) -> bool:
    """Whether `rms_norm` takes these: see its ValueErrors."""
    return _why_not(x, gamma) is None


def can_norm_silu(x: torch.Tensor, gamma: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor) -> bool:
    """Whether `norm_silu` takes these: see its ValueErrors."""
    return (_why_not(x, gamma) or _why_not_into(x, arena, slots)) is None


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Normalises ``x`` over its channels and scales by ``gamma``.

    Args:
        x: ``[T, H, W, C]``, contiguous, bf16, fp16 or fp32. C is 1, 3 or 5 times a power of two of 16 or more.
        gamma: C values, of any shape, of ``x``'s dtype.

    Returns:
        ``[T, H, W, C]``, contiguous, of ``x``'s dtype.

    Raises:
        ValueError: the tensors are none of the above.
    """
    if reason := _why_not(x, gamma):
        raise ValueError(f"rms_norm {reason}")
    out = torch.empty_like(x)
    # No slots: any tensor stands in for them.
    _launch(x, gamma, out, out, border=0, silu=False, paged=False)
    return out


def norm_silu(x: torch.Tensor, gamma: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes ``silu(rms_norm(x, gamma))`` inside the borders of an arena's slots.

    Args:
        x: as `rms_norm` takes it.
        gamma: as `rms_norm` takes it.
        arena: ``[S, H + 2b, W + 2b, C]``, contiguous, of ``x``'s dtype, b of 0 or more; its borders and other slots
            stay as they are.
        slots: ``[T]``, int32: the slot of each frame, all different. Not checked: they lie on the GPU.

    Raises:
        ValueError: the tensors don't fit.
    """
    if reason := _why_not(x, gamma) or _why_not_into(x, arena, slots):
        raise ValueError(f"norm_silu {reason}")
    _launch(x, gamma, arena, slots, border=(arena.shape[1] - x.shape[1]) // 2, silu=True, paged=True)


def _launch(
    x: torch.Tensor,
    gamma: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
    *,
    border: int,
    silu: bool,
    paged: bool,
) -> None:
    frames, rows, columns, channels = x.shape
    lanes = channels & -channels
    groups = channels // lanes
    positions = max(_MIN_BLOCK, _TILE_VALUES // triton.next_power_of_2(groups)) // lanes
    launch(
        _norm_kernel,
        (triton.cdiv(columns, positions), rows, frames),
        x,
        gamma,
        out,
        slots,
        columns,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        border * (out.stride(1) + out.stride(2)),
        ROOT=math.sqrt(channels),
        MIN_NORM=_MIN_NORM,
        GROUPS=groups,
        LANES=lanes,
        POSITIONS=positions,
        SILU=silu,
        PAGED=paged,
        num_warps=_WARPS,
    )


def _why_not(x: torch.Tensor, gamma: torch.Tensor) -> str | None:
    if x.dim() != 4 or 0 in x.shape or x.dtype not in _DTYPES or not x.is_contiguous():
        return (
            f"takes a contiguous [T, H, W, C] in bf16, fp16 or fp32, not {tuple(x.shape)} in {x.dtype} "
            f"with strides {x.stride()}; norm_silu.py takes any"
        )
    channels = x.shape[-1]
    lanes = channels & -channels
    if lanes < _MIN_LANES or lanes > 1024 or channels // lanes > _MAX_GROUPS:
        return (
            f"takes channels of 1, 3 or 5 times a power of two from 16 to 1024, not {channels}; norm_silu.py takes any"
        )
    if gamma.numel() != channels or gamma.dtype != x.dtype or not gamma.is_contiguous():
        return f"takes {channels} values of gamma in {x.dtype}, not {tuple(gamma.shape)} in {gamma.dtype}"
    if x.data_ptr() % 16 or gamma.data_ptr() % 16:
        return "takes tensors that start at a multiple of 16 bytes: other loads would sum in another order; clone them"
    if max(x.shape[:2]) > 65535 or x.shape[2] * channels >= 2**31:
        return f"takes up to 65535 frames and rows, and rows under 2^31 values, not {tuple(x.shape)}"
    return None


def _why_not_into(x: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor) -> str | None:
    frames, rows, columns, channels = x.shape
    if arena.dim() != 4 or arena.dtype != x.dtype or not arena.is_contiguous():
        return f"takes a contiguous [S, H, W, C] arena in {x.dtype}, not {tuple(arena.shape)} in {arena.dtype}"
    border = (arena.shape[1] - rows) // 2
    if border < 0 or arena.shape[1:] != (rows + 2 * border, columns + 2 * border, channels):
        return f"takes x {tuple(x.shape)} and an arena of that size and a border, not {tuple(arena.shape)}"
    if slots.dtype != torch.int32 or slots.shape != (frames,) or not slots.is_contiguous():
        return f"takes {frames} contiguous int32 slots, not {tuple(slots.shape)} in {slots.dtype}"
    return None
