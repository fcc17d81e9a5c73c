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

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..limits import norm_takes, powers_of_two
from .launch import Call

# Norms below this count as this, as in norm_silu.py.
_MIN_NORM = 1e-12
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
    return isinstance(_plan(x, gamma), _Plan)


def can_norm_silu(x: torch.Tensor, gamma: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor) -> bool:
    """Whether `norm_silu` takes these: see its ValueErrors."""
    return isinstance(_plan(x, gamma, arena, slots), _Plan)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Normalises ``x`` over its channels and scales by ``gamma``.

    Args:
        x: ``[T, H, W, C]``, contiguous, bf16, fp16 or fp32. C is up to 9 times a power of two from 8 to 1024.
        gamma: C values, of any shape, of ``x``'s dtype.

    Returns:
        ``[T, H, W, C]``, contiguous, of ``x``'s dtype.

    Raises:
        ValueError: the tensors are none of the above.
    """
    plan = _plan(x, gamma)
    if isinstance(plan, str):
        raise ValueError(f"rms_norm {plan}")
    out = torch.empty_like(x)
    # No slots: any tensor stands in for them.
    plan.call(x, gamma, out, out, *plan.numbers)
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
    plan = _plan(x, gamma, arena, slots)
    if isinstance(plan, str):
        raise ValueError(f"norm_silu {plan}")
    plan.call(x, gamma, arena, slots, *plan.numbers)


class _Kind(NamedTuple):
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Kind:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())


class _Plan(NamedTuple):
    """A launch, and the kernel's integers."""

    call: Call
    numbers: tuple[int, ...]


def _plan(
    x: torch.Tensor, gamma: torch.Tensor, arena: torch.Tensor | None = None, slots: torch.Tensor | None = None
) -> _Plan | str:
    """How to norm ``x``, into an arena with SiLU or else without; or why that can't be."""
    if x.data_ptr() % 16 or gamma.data_ptr() % 16:
        return "takes tensors that start at a multiple of 16 bytes: other loads would sum in another order; clone them"
    into = None if arena is None or slots is None else (_Kind.of(arena), _Kind.of(slots))
    return _plan_of(_Kind.of(x), _Kind.of(gamma), into, x.device)


@functools.lru_cache(maxsize=4096)
def _plan_of(x: _Kind, gamma: _Kind, into: tuple[_Kind, _Kind] | None, device: torch.device) -> _Plan | str:  # noqa: ARG001 (a launch is for one device)
    if reason := _why_not(x, gamma) or (_why_not_into(x, *into) if into else None):
        return reason
    frames, rows, columns, channels = x.shape
    out_rows, out_columns = into[0].shape[1:3] if into else (rows, columns)
    border = (out_rows - rows) // 2
    groups, lanes = powers_of_two(channels, channels)
    positions = max(_MIN_BLOCK, _TILE_VALUES // triton.next_power_of_2(groups)) // lanes
    call = Call(
        _norm_kernel,
        (triton.cdiv(columns, positions), rows, frames),
        ROOT=math.sqrt(channels),
        MIN_NORM=_MIN_NORM,
        GROUPS=groups,
        LANES=lanes,
        POSITIONS=positions,
        SILU=into is not None,
        PAGED=into is not None,
        num_warps=_WARPS,
    )
    row, out_row = columns * channels, out_columns * channels
    return _Plan(call, (columns, rows * row, row, out_rows * out_row, out_row, border * (out_row + channels)))


def _why_not(x: _Kind, gamma: _Kind) -> str | None:
    if len(x.shape) != 4 or 0 in x.shape or x.dtype not in _DTYPES or not x.contiguous:
        return (
            f"takes a contiguous [T, H, W, C] in bf16, fp16 or fp32, not {x.shape} in {x.dtype} "
            f"({'' if x.contiguous else 'not '}contiguous); norm_silu.py takes any"
        )
    channels = x.shape[-1]
    if not norm_takes(channels):
        return f"takes channels of up to 9 times a power of two from 8 to 1024, not {channels}; norm_silu.py takes any"
    if math.prod(gamma.shape) != channels or gamma.dtype != x.dtype or not gamma.contiguous:
        return f"takes {channels} values of gamma in {x.dtype}, not {gamma.shape} in {gamma.dtype}"
    if max(x.shape[:2]) > 65535 or x.shape[2] * channels >= 2**31:
        return f"takes up to 65535 frames and rows, and rows under 2^31 values, not {x.shape}"
    return None


def _why_not_into(x: _Kind, arena: _Kind, slots: _Kind) -> str | None:
    frames, rows, columns, channels = x.shape
    if len(arena.shape) != 4 or arena.dtype != x.dtype or not arena.contiguous:
        return f"takes a contiguous [S, H, W, C] arena in {x.dtype}, not {arena.shape} in {arena.dtype}"
    border = (arena.shape[1] - rows) // 2
    if border < 0 or arena.shape[1:] != (rows + 2 * border, columns + 2 * border, channels):
        return f"takes x {x.shape} and an arena of that size and a border, not {arena.shape}"
    if slots.dtype != torch.int32 or slots.shape != (frames,) or not slots.contiguous:
        return f"takes {frames} contiguous int32 slots, not {slots.shape} in {slots.dtype}"
    return None
