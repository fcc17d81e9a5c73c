"""Pixels as the encoder's first convolution reads them, in one pass in Triton.

T frames, H rows, W columns of positions, p x p pixels each (p the patch), C colours, K values of a neighbourhood
Layout  in [T, (top + H + bottom) * p, (left + W + right) * p, C], out the slots of an arena [S, H, W, K] ([S, W, H, K]
        transposed), both contiguous; each pixel is read nine times, from caches but for the first, and K values a
        position are written side by side. A neighbourhood is 3p rows of 3p pixels: where its values lie beside its
        first is the same for all positions, so that it takes one addition a value, and inside a picture no mask.
Tile    2048 values, K rounded up to a power of two: of one row of the arena, or transposed 1024 of as many rows as
        columns or twice as many, so that more is used of each line that is read. On H200 3.4 TB/s at p 1, 2.5 at p 2.
Bits    those of pixels.py: 2x is exact in fp32, so that 2x - 1 is rounded once, fused or not; then once to the arena's
        dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pixels import Margins
from .launch import launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILE_VALUES, _TRANSPOSED_TILE_VALUES = 2048, 1024


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "top", "left"])
def _gather_taps_kernel(
    pixels_ptr,
    arena_ptr,
    slots_ptr,
    height,
    width,
    rows,
    columns,
    top,
    left,
    COLOURS: tl.constexpr,
    PATCH: tl.constexpr,
    VALUES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIDE: tl.constexpr = 3 * PATCH
    frame = tl.program_id(2).to(tl.int64)
    # Row and column in the arena, and what lies there of the picture.
    position = tl.arange(0, ROWS * COLUMNS)
    first_row = tl.program_id(1) * ROWS
    first_column = tl.program_id(0) * COLUMNS
    row = first_row + position // COLUMNS
    column = first_column + position % COLUMNS
    # The neighbourhood's first pixel, and beside it a value's.
    y = ((column if TRANSPOSED else row) + (top - 1)) * PATCH
    x = ((row if TRANSPOSED else column) + (left - 1)) * PATCH
    value = tl.arange(0, BLOCK)
    down, right = value // (SIDE * COLOURS), value % (SIDE * COLOURS) // COLOURS
    at = ((y * width + x) * COLOURS)[:, None] + (down * width * COLOURS + value % (SIDE * COLOURS))[None, :]
    known = (value < SIDE * SIDE * COLOURS)[None, :]
    written = ((row < rows) & (column < columns))[:, None] & (value < VALUES)[None, :]
    pixels_ptr += frame * height * width * COLOURS
    y0 = ((first_column if TRANSPOSED else first_row) + (top - 1)) * PATCH
    x0 = ((first_row if TRANSPOSED else first_column) + (left - 1)) * PATCH
    y1 = y0 + ((COLUMNS if TRANSPOSED else ROWS) + 2) * PATCH
    x1 = x0 + ((ROWS if TRANSPOSED else COLUMNS) + 2) * PATCH
    # A half becomes zero, as all is that lies around the picture.
    if (y0 >= 0) & (y1 <= height) & (x0 >= 0) & (x1 <= width):
        pixels = tl.load(pixels_ptr + at, mask=known, other=0.5).to(tl.float32)
    else:
        y_of = y[:, None] + down[None, :]
        x_of = x[:, None] + right[None, :]
        seen = written & known & (y_of >= 0) & (y_of < height) & (x_of >= 0) & (x_of < width)
        pixels = tl.load(pixels_ptr + at, mask=seen, other=0.5).to(tl.float32)
    arena_ptr += tl.load(slots_ptr + frame).to(tl.int64) * rows * columns * VALUES
    out_at = (row * columns + column)[:, None] * VALUES + value[None, :]
    tl.store(arena_ptr + out_at, (pixels * 2.0 - 1.0).to(arena_ptr.dtype.element_ty), mask=written)


def why_not(pixels: torch.Tensor, arena: torch.Tensor) -> str:
    """Why `gather_taps` does not take these, whose shapes fit; empty if it does."""
    if pixels.dtype not in _DTYPES or arena.dtype not in _DTYPES:
        return f"takes bf16, fp16 and fp32, not pixels in {pixels.dtype} and an arena in {arena.dtype}"
    if pixels.device != arena.device:
        return f"takes pixels that lie where the arena does, on {arena.device}, not on {pixels.device}"
    if not pixels.is_contiguous() or not arena.is_contiguous():
        return f"takes contiguous tensors, not strides {pixels.stride()} and {arena.stride()}"
    # Within a frame addresses are 32 bits wide, also those of a tile that ends outside.
    if max(pixels.shape[1:].numel(), arena.shape[1:].numel()) >= 2**30:
        return f"takes frames under 2^30 values, not {tuple(pixels.shape)} and {tuple(arena.shape)}"
    if max(pixels.shape[0], *arena.shape[1:3]) > 65535:
        return f"takes up to 65535 frames, rows and columns, not {tuple(pixels.shape)}"
    return ""


def gather_taps(
    pixels: torch.Tensor, *, patch: int, margins: Margins, transposed: bool, arena: torch.Tensor, slots: torch.Tensor
) -> None:
    """`ops.pixels.gather_taps` on the GPU, for shapes that fit.

    Args:
        pixels: as there, in bf16, fp16 or fp32.
        patch: as there.
        margins: as there.
        transposed: as there.
        arena: as there, in bf16, fp16 or fp32.
        slots: as there.

    Raises:
        ValueError: a dtype, layout or size that the kernel can't take.
    """
    if reason := why_not(pixels, arena):
        raise ValueError(f"gather_taps {reason}; pixels.gather_taps takes it")
    if slots.dtype != torch.int32 or not slots.is_contiguous() or slots.shape != pixels.shape[:1]:
        raise ValueError(
            f"slots must be a contiguous row of {len(pixels)} int32, not {slots.dtype} {tuple(slots.shape)}"
        )
    frames, height, width, colours = pixels.shape
    _, rows, columns, values = arena.shape
    block = triton.next_power_of_2(values)
    positions = max(1, (_TRANSPOSED_TILE_VALUES if transposed else _TILE_VALUES) // block)
    tile_rows = 1 << positions.bit_length() // 2 if transposed else 1
    tile_columns = positions // tile_rows
    launch(
        _gather_taps_kernel,
        (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows), frames),
        pixels,
        arena,
        slots,
        height,
        width,
        rows,
        columns,
        int(margins.top),  # a bool would be one bit
        int(margins.left),
        COLOURS=colours,
        PATCH=patch,
        VALUES=values,
        TRANSPOSED=transposed,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        BLOCK=block,
        num_warps=4,
    )
