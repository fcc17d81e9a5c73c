"""Wan 2.2's shortcuts around blocks that double the resolution, or halve it, each in one pass, in Triton.

T frames, H rows, W columns, C channels, O channels out
Layout  in [T, H, W, C], out [t, 2H, 2W, O]; or in [T, 2H, 2W, C], out [t, H, W, O]; contiguous; one read, one read and
        write.
Tile    2048 values of one row of the output, or of the input where that is doubled: 3.8 to 4.1 TB/s on
        H200; what averages 1.4 to 3.1, most where as many channels leave as come in.
Bits    each sum is rounded once, as eager PyTorch's is. Averages are summed up in fp32 in the picture's order
        (channel, frame, row, column), scaled and added in one step, then rounded once: on either axis, at every size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..limits import powers_of_two
from .launch import launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILE_VALUES = 2048
# Channels that a program takes at least, if there are so many.
_LEAST_LANES = 32
# Values of an average: the loop over them is unrolled. Wan 2.2 has 4.
_MAX_GROUP = 64


@triton.jit
def _add_duplicated_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TIME_FACTOR: tl.constexpr,
    FIRST: tl.constexpr,
    STOP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUP: tl.constexpr = CHANNELS // OUT_CHANNELS
    REPEATS: tl.constexpr = 4 * TIME_FACTOR // GROUP
    BLOCKS: tl.constexpr = (OUT_CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) // BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    mask = (column < columns)[:, None] & (channel < OUT_CHANNELS)[None, :]
    x_ptrs = x_ptr + (frame * rows + row) * columns * CHANNELS + column[:, None] * CHANNELS + channel[None, :] * GROUP
    for offset in tl.static_range(4 * TIME_FACTOR):
        if offset % REPEATS == 0:
            x = tl.load(x_ptrs + offset // REPEATS, mask=mask).to(tl.float32)
        if offset // 4 >= FIRST and offset // 4 < STOP:
            i = offset % 2 if TRANSPOSED else offset // 2 % 2
            j = offset // 2 % 2 if TRANSPOSED else offset % 2
            out_frame = frame * (STOP - FIRST) + (offset // 4 - FIRST)
            out_row = (out_frame * 2 * rows + 2 * row + i) * 2 * columns * OUT_CHANNELS
            out_ptrs = out_ptr + out_row + (2 * column + j)[:, None] * OUT_CHANNELS + channel[None, :]
            total = tl.load(out_ptrs, mask=mask).to(tl.float32) + x
            tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_averaged_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TIME_FACTOR: tl.constexpr,
    BLANKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    FACTOR: tl.constexpr = 4 * TIME_FACTOR
    GROUP: tl.constexpr = CHANNELS * FACTOR // OUT_CHANNELS
    BLOCKS: tl.constexpr = (OUT_CHANNELS + BLOCK - 1) // BLOCK
    out_channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) // BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    out_frame = tl.program_id(2).to(tl.int64)
    mask = (column < columns)[:, None] & (out_channel < OUT_CHANNELS)[None, :]
    # The first frame of those that become one; blank ones come before all frames.
    x_ptr += (out_frame * TIME_FACTOR - BLANKS) * rows * columns * (4 * CHANNELS)
    out_ptrs = out_ptr + (out_frame * rows + row) * columns * OUT_CHANNELS
    out_ptrs += column[:, None] * OUT_CHANNELS + out_channel[None, :]
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for i in tl.static_range(GROUP):
        if GROUP == FACTOR:
            # The same, such that the compiler sees that channels lie side by side.
            channel, offset = out_channel, tl.full(out_channel.shape, i, tl.int32)
        else:
            place = out_channel * GROUP + i
            channel, offset = place // FACTOR, place % FACTOR
        frame, down, right = offset // 4, offset // 2 % 2, offset % 2
        if TRANSPOSED:
            down, right = right, down
        # 64 bits wide, as the row is.
        at = (frame * 2 * rows + 2 * row + down)[None, :] * (2 * columns * CHANNELS)
        at += (2 * column)[:, None] * CHANNELS + (right * CHANNELS + channel)[None, :]
        total += tl.load(x_ptr + at, mask=mask & (frame >= BLANKS)[None, :], other=0.0).to(tl.float32)
    added = tl.fma(total, tl.full(total.shape, 1.0 / GROUP, tl.float32), tl.load(out_ptrs, mask=mask).to(tl.float32))
    tl.store(out_ptrs, added.to(out_ptr.dtype.element_ty), mask=mask)


def takes(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `add_duplicated` takes these, whose shapes fit."""
    return (
        x.dtype in _DTYPES
        and out.dtype == x.dtype
        and x.is_contiguous()
        and out.is_contiguous()
        and x.numel() > 0
        and 2 * x.shape[2] * x.shape[3] < 2**31
        and max(x.shape[:2]) <= 65535
    )


def takes_average(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `add_averaged` takes these, whose shapes fit."""
    return (
        x.dtype in _DTYPES
        and out.dtype == x.dtype
        and x.is_contiguous()
        and out.is_contiguous()
        and x.numel() > 0
        and 2 * x.shape[2] * x.shape[3] < 2**31
        # Twice the frames: the most values of an average.
        and 8 * x.shape[3] // out.shape[3] <= _MAX_GROUP
        and max(out.shape[:2]) <= 65535
    )


def add_duplicated(
    x: torch.Tensor, *, time_factor: int, phases: tuple[int, int], transposed: bool, out: torch.Tensor
) -> None:
    """`ops.shortcut.add_duplicated` on the GPU, for what `takes` says and shapes that fit."""
    frames, rows, columns, channels = x.shape
    out_channels = out.shape[-1]
    block = min(triton.next_power_of_2(out_channels), 512)
    tile_columns = max(1, _TILE_VALUES // block)
    grid = (triton.cdiv(columns, tile_columns) * triton.cdiv(out_channels, block), rows, frames)
    launch(
        _add_duplicated_kernel,
        grid,
        x,
        out,
        rows,
        columns,
        CHANNELS=channels,
        OUT_CHANNELS=out_channels,
        TIME_FACTOR=time_factor,
        FIRST=phases[0],
        STOP=phases[1],
        TRANSPOSED=transposed,
        COLUMNS=tile_columns,
        BLOCK=block,
        num_warps=4,
    )


def add_averaged(x: torch.Tensor, *, time_factor: int, transposed: bool, out: torch.Tensor) -> None:
    """`ops.shortcut.add_averaged` on the GPU, for what `takes_average` says and shapes that fit."""
    frames, rows, columns, out_channels = out.shape
    block = min(triton.next_power_of_2(out_channels), 512)
    if x.shape[3] == out_channels:
        # Channels as they lie: of 160 rather 32 than 256 of which 96 are none.
        block = max(powers_of_two(out_channels, 512)[1], min(block, _LEAST_LANES))
    tile_columns = max(1, _TILE_VALUES // block)
    grid = (triton.cdiv(columns, tile_columns) * triton.cdiv(out_channels, block), rows, frames)
    launch(
        _add_averaged_kernel,
        grid,
        x,
        out,
        rows,
        columns,
        CHANNELS=x.shape[3],
        OUT_CHANNELS=out_channels,
        TIME_FACTOR=time_factor,
        BLANKS=frames * time_factor - x.shape[0],
        TRANSPOSED=transposed,
        COLUMNS=tile_columns,
        BLOCK=block,
        num_warps=4,
    )
