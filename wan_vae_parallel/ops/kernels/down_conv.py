"""3x3 convolutions of every other row and column as one implicit matrix product.

T frames, H rows, W columns of the output, C channels in, O channels out, S slots of an arena

Layout  The input is an arena ``[S, 2H + 2, 2W + 2, C]``, contiguous, whose top and left borders are not read; output
        (h, w) sees its rows 2h + 1 to 2h + 3 and columns 2w + 1 to 2w + 3. As there is an even number of columns, it
        is read as ``[2, rows, W + 1, C]``: the columns of even number, then those of odd number. What a tap reads of
        neighbouring outputs then lies side by side, as a TMA descriptor wants it: nothing is computed that is not
        wanted, but for the ends of rows.
Tile    Consecutive positions of one row x all O, or a part of O, in two accumulators as in conv.py. A tile of several
        rows would waste less at their ends, but Triton 3.6 brings such a one to the tensor cores through registers.
Bits    fp32 accumulation that starts at the bias, then taps in the picture's order and channels ascending within a
        tap; one rounding. No tile, position, T, H, W or split axis changes a bit. Channels are an axis of their own,
        so that a step past the last one reads zeros, not what lies beside it, which might not be finite.
"""

# Kernels have more arguments than lines have room for one each.
# ruff: noqa: E741

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..dispatch import KERNEL_DTYPES
from ..layer_kinds import LayerKind
from . import tiles
from .launch import Call
from .products import (
    TensorDescriptor,
    check_tensors,
    describe_weights,
    dot,
    frame_of,
    load_weights,
    may_assemble,
    rows_at_once,
    spaced,
    start,
    store,
    use_descriptors,
)
from .tiles import Tile

# fmt: off


@triton.jit
def _load_columns(
    source, row, left, right, c, W,
    C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, AT_ONCE: tl.constexpr, TMA: tl.constexpr,
):
    """A tile ``[BM, BK]``: what the ``right``-th tap of a row reads for the outputs from column ``left`` on."""
    if TMA:
        tile = source.load([(right + 1) % 2, row, left + (right + 1) // 2, c]).reshape(BM, BK)
    else:
        w = tl.arange(0, BM)
        k = tl.arange(0, BK)
        mask = (left + w < W)[:, None]
        if C % BK != 0:
            mask = mask & (c + k < C)[None, :]
        # What changes from step to step is one number for all threads.
        first = source + ((row * (2 * W + 2) + 2 * left + 1 + right).to(tl.int64) * C + c)
        tile = tl.load(first + (spaced(BM, 2 * C, AT_ONCE)[:, None] + k[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["H", "W"])
def _down_kernel(
    source, weight0, weight1, slots, bias, out, out_slots, H, W,
    C: tl.constexpr, O: tl.constexpr, OUT_PAGED: tl.constexpr, OUT_BORDER: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
    AT_ONCE: tl.constexpr, TMA: tl.constexpr, HIDE: tl.constexpr,
):
    PARTS: tl.constexpr = (O + N0 + N1 - 1) // (N0 + N1)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    FULL: tl.constexpr = O % (N0 + N1) == 0

    # What shares a tile of the input runs side by side, then what lies beside it in that row, then the next row.
    pid = tl.program_id(0)
    n = pid % PARTS * (N0 + N1)
    pid = pid // PARTS
    across = tl.cdiv(W, BM)
    left = pid % across * BM
    h = pid // across % H
    t = pid // (across * H)
    row = tl.load(slots + t) * (2 * H + 2) + 2 * h + 1

    w = left + tl.arange(0, BM)
    stored = w < W
    n0 = n + tl.arange(0, N0)
    acc0 = tl.zeros((N0, BM) if SWAP else (BM, N0), tl.float32)
    acc0 = start(acc0, n0, 0, bias, bias, w, stored, O, False, SWAP, HIDE and not TMA)
    if N1 > 0:
        n1 = n + N0 + tl.arange(0, N1)
        acc1 = tl.zeros((N1, BM) if SWAP else (BM, N1), tl.float32)
        acc1 = start(acc1, n1, 0, bias, bias, w, stored, O, False, SWAP, HIDE and not TMA)

    for k in range(9 * STEPS):
        tap = k // STEPS
        c = k % STEPS * BK
        # In the picture's own order, also where its columns are the arena's rows: the same sums.
        down = tap % 3 if TRANSPOSED else tap // 3
        right = tap // 3 if TRANSPOSED else tap % 3
        x = _load_columns(source, row + down, left, right, c, W, C, BM, BK, AT_ONCE, TMA)
        w0 = load_weights(weight0, tap, n, c, C, 9 * C, C, O, N0, BK, AT_ONCE, FULL, TMA)
        acc0 = dot(x, w0, acc0, SWAP)
        if N1 > 0:
            w1 = load_weights(weight1, tap, n + N0, c, C, 9 * C, C, O, N1, BK, AT_ONCE, FULL, TMA)
            acc1 = dot(x, w1, acc1, SWAP)

    out = frame_of(out, out_slots, t, H, W, O, OUT_PAGED, OUT_BORDER)
    place = (h + OUT_BORDER // 2) * (W + OUT_BORDER) + w + OUT_BORDER // 2
    store(acc0, n0, out, place, stored, O, SWAP)
    if N1 > 0:
        store(acc1, n1, out, place, stored, O, SWAP)
# fmt: on


def takes(arena: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `down_conv` takes this input, given a GPU that runs kernels: bf16 or fp16 and a 3x3 kernel.

    The weight's strides are not looked at.
    """
    return (
        arena.dtype in KERNEL_DTYPES
        and weight.dtype == arena.dtype
        and tuple(weight.shape[2:]) == (3, 3)
        and arena.shape[:3].numel() < 2**31
        # Of an output frame, with a border.
        and (arena.shape[1] // 2 + 1) * (arena.shape[2] // 2 + 1) * weight.shape[0] < 2**31
    )


def down_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    transposed: bool,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> None:
    """`ops.conv.down_conv` on the GPU.

    Args:
        arena: as there, in bf16 or fp16.
        slots: int32 on the arena's device.
        weight: ``[O, C, 3, 3]`` in channels_last.
        bias: as there.
        out: as there.
        out_slots: int32, if ``out`` is an arena.
        transposed: as there.
        tile: overrides `tiles.choose_tile`, for benchmarks.
        descriptors: overrides whether tiles are read through TMA descriptors, for tests.

    Raises:
        ValueError: a shape, dtype or layout that the kernel can't take.
    """
    as_matrix = weight.permute(0, 2, 3, 1)
    if not as_matrix.is_contiguous() or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"weight must be [O, C, 3, 3] in channels_last, not {tuple(weight.shape)} with strides {weight.stride()}"
        )
    check_tensors(arena, slots, as_matrix, bias, out=out, out_slots=out_slots)
    out_channels, channels = weight.shape[:2]
    tma = use_descriptors(arena) if descriptors is None else descriptors
    geometry = _Geometry(
        tuple(arena.shape), slots.numel(), out_channels, bias.numel(), tuple(out.shape),
        None if out_slots is None else out_slots.numel(), transposed, tile, tma, arena.dtype, arena.device,
        tiles.changes(),
    )  # fmt: skip
    tile, call, numbers, tma = _plan(geometry)
    source: Any = arena
    weights: list[Any] = [as_matrix, as_matrix]
    if tma:
        count, rows, columns, _ = arena.shape
        split = [2, count * rows, columns // 2, channels]
        strides = [channels, columns * channels, 2 * channels, 1]
        source = TensorDescriptor(arena, split, strides, [1, 1, tile.positions, tile.step])
        weights = describe_weights(as_matrix, (9, out_channels, channels), (channels, 9 * channels), tile)
    call(source, weights[0], weights[-1], slots, bias, out, out_slots, *numbers)


class _Geometry(NamedTuple):
    """All of a convolution but its tensors."""

    arena: tuple[int, ...]
    slots: int
    out_channels: int
    biases: int
    out: tuple[int, ...]
    out_slots: int | None
    transposed: bool
    tile: Tile | None
    tma: bool
    dtype: torch.dtype
    device: torch.device
    # What `choose_tile` goes by may become better known.
    changes: int


@functools.lru_cache(maxsize=4096)
def _plan(geometry: _Geometry) -> tuple[Tile, Call, tuple[int, int], bool]:
    """The tile, the launch, the kernel's integers, and whether it reads through descriptors.

    Raises `ValueError` as `down_conv` does.
    """
    count, *sides, channels = geometry.arena
    rows, columns = (side // 2 - 1 for side in sides)
    frames, out_channels = geometry.slots, geometry.out_channels
    if min(rows, columns, frames) < 1 or any(side % 2 for side in sides) or geometry.biases != out_channels:
        raise ValueError(
            f"no output of {out_channels} channels from {frames} slots of an arena {geometry.arena}, whose rows and "
            f"columns must be even and 4 or more, with {geometry.biases} biases"
        )
    paged = geometry.out_slots is not None
    out_border = geometry.out[1] - rows if paged else 0
    if paged and (geometry.out_slots != frames or out_border not in (0, 2)):
        raise ValueError(f"out_slots must be {frames} of an arena with borders of 0 or 1, not {geometry.out_slots}")
    wanted = (geometry.out[0] if paged else frames, rows + out_border, columns + out_border, out_channels)
    if geometry.out != wanted:
        raise ValueError(f"out must be {wanted}, not {geometry.out}")
    if count * sides[0] * sides[1] >= 2**31 or (rows + 2) * (columns + 2) * out_channels >= 2**31:
        raise ValueError(f"a frame of {wanted[1:]} or an arena {geometry.arena} overflows the kernel's int32")

    kind = LayerKind("down_conv", channels, out_channels, (1, 3, 3))
    # No tile goes across rows: each is a frame to it.
    tile = geometry.tile or tiles.choose_tile(
        kind, columns, frames * rows, dtype=geometry.dtype, device=geometry.device
    )
    tma = geometry.tma and tile.descriptors
    parts = -(-out_channels // (tile.first + tile.second))
    call = Call(
        _down_kernel,
        (-(-columns // tile.positions) * rows * frames * parts,),
        C=channels, O=out_channels, OUT_PAGED=paged, OUT_BORDER=out_border, TRANSPOSED=geometry.transposed,
        BM=tile.positions, N0=tile.first, N1=tile.second, BK=tile.step, SWAP=tile.swapped,
        AT_ONCE=rows_at_once(tile), TMA=tma,
        HIDE=may_assemble(_down_kernel),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return tile, call, (rows, columns), tma
