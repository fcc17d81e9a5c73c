"""The decoder's last convolution, to a few channels, bound by how often it reads its input.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena
Layout  The input is an arena ``[S, H + 2, W + 2, C]`` with zero borders; ``slots[T + 2]`` say where its frames lie, or
        ``slots[T]`` for images, of whose weights only those of the present frame are used (kt is 1 then, else 3).
Tile    256 positions of a row x (output frames x output rows x O), so that what is read once serves several frames
        and rows: 0.68 ms for four frames of 720p on an H200, where a plain implicit product takes 2.6.
Bits    fp32 accumulation that starts at the bias, taps in the picture's order; the same for every T, H, W, split axis
        and spread.
"""

# Kernels have more arguments than lines have room for one each.
# ruff: noqa: E741

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import launch
from .products import TensorDescriptor, use_descriptors
from .tiles import Tile, head_tile

# Wider ones gained nothing.
MAX_COLUMNS = 64

# fmt: off


@triton.jit(do_not_specialize=["T", "H", "W"])
def _head_kernel(
    source, weight, slots, bias, out, T, H, W,
    C: tl.constexpr, O: tl.constexpr, KT: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):
    STEPS: tl.constexpr = (C + BK - 1) // BK
    READ_ROWS: tl.constexpr = ROWS + 2
    pid = tl.program_id(0)
    across = tl.cdiv(W, BM)
    down = tl.cdiv(H, ROWS)
    w = pid % across * BM
    h = pid // across % down * ROWS
    t = pid // (across * down) * FRAMES
    # Frames past the last serve no output that is stored; they are read from a slot that has finite numbers.
    last = T + (KT - 2)
    slot0 = tl.load(slots + t)
    slot1 = tl.load(slots + tl.minimum(t + 1, last))
    slot2 = tl.load(slots + tl.minimum(t + 2, last))
    slot3 = tl.load(slots + tl.minimum(t + 3, last))
    slot4 = tl.load(slots + tl.minimum(t + 4, last))
    slot5 = tl.load(slots + tl.minimum(t + 5, last))

    n = tl.arange(0, N)
    o = n % O
    acc = tl.zeros((BM, N), tl.float32)
    acc += tl.load(bias + o).to(tl.float32)[None, :]
    for k in range((FRAMES + KT - 1) * READ_ROWS * 3 * STEPS):
        c = k % STEPS * BK
        tap = k // STEPS
        f = tap // (READ_ROWS * 3)
        early = tl.where(f == 0, slot0, tl.where(f == 1, slot1, slot2))
        late = tl.where(f == 3, slot3, tl.where(f == 4, slot4, slot5))
        slot = tl.where(f < 3, early, late)
        # In the picture's own order, also where its columns are the arena's rows: the same sums.
        if TRANSPOSED:
            row = h + tap % READ_ROWS
            column = w + tap // READ_ROWS % 3
        else:
            row = h + tap // 3 % READ_ROWS
            column = w + tap % 3
        if TMA:
            # Four axes, so that rows below the border read as zeros: what lies there might not be finite.
            x = source.load([slot, row, column, c]).reshape(BM, BK)
            b = weight.load([tap, 0, c]).reshape(N, BK)
        else:
            m = column + tl.arange(0, BM)
            ck = c + tl.arange(0, BK)
            inside = ((m < W + 2) & (row < H + 2))[:, None] & (ck < C)[None, :]
            first = (slot.to(tl.int64) * (H + 2) + row) * (W + 2)
            x = tl.load(source + (first + m)[:, None] * C + ck[None, :], mask=inside, other=0.0)
            b = tl.load(weight + (tap * N + n)[:, None] * C + ck[None, :], mask=(ck < C)[None, :], other=0.0)
        acc = tl.dot(x, b.T, acc)

    t += n // (O * ROWS)
    h += n // O % ROWS
    w += tl.arange(0, BM)
    stored = (w < W)[:, None] & ((n < FRAMES * ROWS * O) & (t < T) & (h < H))[None, :]
    place = ((t.to(tl.int64) * H + h) * W)[None, :] + w[:, None]
    tl.store(out + place * O + o[None, :], acc.to(out.dtype.element_ty), mask=stored)
# fmt: on


def tiling(frames: int, out_channels: int) -> tuple[int, int]:
    """Frames and rows that `spread_weight` should spread over, for calls of that many frames."""
    together = min(4, triton.next_power_of_2(frames))
    while together > 1 and together * out_channels > MAX_COLUMNS:
        together //= 2
    return together, min(16, MAX_COLUMNS // (together * out_channels))


def spread_weight(weight: torch.Tensor, frames: int, rows: int, *, transposed: bool) -> torch.Tensor:
    """Lays a few-channel weight out so that one tile of the input serves several output frames and rows.

    Args:
        weight: ``[O, C, kt, 3, 3]``.
        frames: output frames a program makes, 1 to 4.
        rows: output rows of the arena a program makes.
        transposed: the arena's rows are the picture's columns.

    Returns:
        ``[(frames + kt - 1) * (rows + 2) * 3, N, C]``: for each input frame, row and column tap the weights of every
        (output frame, output row, O), zero where a tap doesn't reach it. N is ``frames * rows * O``, rounded up to a
        power of two of at least 16.

    Raises:
        ValueError: more columns than `MAX_COLUMNS`, more than 4 frames, or no 3x3x3 or 1x3x3 weight.
    """
    out_channels, channels, *kernel = weight.shape
    used = frames * rows * out_channels
    if kernel not in ([3, 3, 3], [1, 3, 3]) or used > MAX_COLUMNS or not 1 <= frames <= 4:
        raise ValueError(
            f"spread_weight takes a 3x3x3 or 1x3x3 weight, up to 4 frames and frames x rows x channels up to "
            f"{MAX_COLUMNS}, not {tuple(weight.shape)} with {frames} frames and {rows} rows"
        )
    columns = max(16, triton.next_power_of_2(used))
    # Frame, row and column taps of the arena, then N and C.
    taps = weight.detach().permute(2, 3, 4, 0, 1)
    if transposed:
        taps = taps.transpose(1, 2)
    seen = kernel[0]
    spread = weight.new_zeros(frames + seen - 1, rows + 2, 3, columns, channels)
    for frame in range(frames):
        for row in range(rows):
            first = (frame * rows + row) * out_channels
            spread[frame : frame + seen, row : row + 3, :, first : first + out_channels] = taps
    if transposed:
        spread = spread.transpose(1, 2)
    return spread.flatten(0, 2).contiguous()


def head_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    spread: torch.Tensor,
    bias: torch.Tensor,
    *,
    frames: int,
    rows: int,
    out: torch.Tensor,
    transposed: bool,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> None:
    """A 3x3x3 or 1x3x3 convolution to a few channels, which is bound by how often it reads its input.

    A plain implicit matrix product reads each input 27 times from L2 for 3 columns of a matrix. Here the columns are
    (output frame, output row, channel): with 4 frames and 4 rows an input is read 6.75 times. Products with the
    zeros in ``spread`` change no bit of a sum; but an input that is no finite number spoils the outputs that share
    its tile, not its neighbours alone.

    Args:
        arena: ``[S, H + 2, W + 2, C]``, contiguous, bf16 or fp16, borders zero, finite in every slot named.
        slots: ``[T + kt - 1]`` int32.
        spread: what `spread_weight` made for these ``frames`` and ``rows`` (see `tiling`); the result is the same
            whichever was chosen.
        bias: ``[O]``.
        frames: output frames a program makes; T need be no multiple.
        rows: output rows a program makes; H need be no multiple.
        out: ``[T, H, W, O]``, contiguous.
        transposed: the arena's rows are the picture's columns; ``spread`` was made so too.
        tile: overrides the setting, for benchmarks.
        descriptors: overrides whether tiles are read through TMA descriptors, for tests.

    Raises:
        ValueError: a shape, dtype or layout that the kernel can't take.
    """
    out_channels = out.shape[-1]
    taps, columns, channels = spread.shape
    seen = taps // ((rows + 2) * 3) - frames + 1
    count, height, width = slots.numel() - seen + 1, arena.shape[1] - 2, arena.shape[2] - 2
    used = frames * rows * out_channels
    if (
        seen not in (1, 3)
        or taps != (frames + seen - 1) * (rows + 2) * 3
        or columns != max(16, triton.next_power_of_2(used))
    ):
        raise ValueError(
            f"weights {tuple(spread.shape)} were not spread over {frames} frames and {rows} rows of {out_channels}"
        )
    if slots.dtype != torch.int32 or not slots.is_contiguous():
        raise ValueError(f"slots must be a contiguous row of int32, not {slots.dtype} {slots.stride()}")
    if min(count, height, width) < 1 or arena.shape[3] != channels:
        raise ValueError(f"no output frame of {channels} channels in an arena {tuple(arena.shape)}, slots {slots}")
    if tuple(out.shape) != (count, height, width, out_channels) or bias.numel() != out_channels:
        raise ValueError(f"out must be {(count, height, width, out_channels)}, not {tuple(out.shape)}")
    for name, tensor in (("arena", arena), ("spread", spread), ("out", out), ("bias", bias)):
        if not tensor.is_contiguous() or tensor.dtype != arena.dtype:
            raise ValueError(f"{name} must be contiguous {arena.dtype}, not {tensor.dtype} {tensor.stride()}")
    if tile is None:
        tile = head_tile(columns, width, channels, device=arena.device)
    tma = use_descriptors(arena) if descriptors is None else descriptors
    source: Any = arena
    weight: Any = spread
    if tma:
        source = TensorDescriptor.from_tensor(arena, [1, 1, tile.positions, tile.step])
        weight = TensorDescriptor.from_tensor(spread, [1, columns, tile.step])
    grid = (-(-width // tile.positions) * -(-height // rows) * -(-count // frames),)
    launch(
        _head_kernel,
        grid,
        source, weight, slots, bias, out, count, height, width,
        C=channels, O=out_channels, KT=seen, FRAMES=frames, ROWS=rows, TRANSPOSED=transposed,
        BM=tile.positions, N=columns, BK=tile.step, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
