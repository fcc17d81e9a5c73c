"""Border rows swapped with the neighbours through memory that each device's kernels write to directly, in Triton.

T frames, H rows, W columns, C channels, S slots
Layout  an arena is ``[S, H + 2, W + 2, C]``, contiguous; a row of it, borders included, is one run of values.
Boxes   a device has a box for what comes from above and one for what comes from below, each twice, for swaps with even
        and odd numbers: who sends swap n + 2 has had the neighbour's n + 1, so the neighbour has emptied its box of n.
Signals a program of one device waits for the program of the same number on the other, for a number that only grows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import Call

# Programs a direction: all have to be on the device together, as each waits for its like on another device.
PROGRAMS = 32
# Nanoseconds between the neighbour's word and the look into the box. Tests give it time to overtake there.
PAUSE = 0
# Values a program copies at once.
_BLOCK = 1024


@triton.jit
def _tell(signal, number):
    # A release: who sees the number sees what was written before it.
    tl.inline_asm_elementwise(
        "st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2;",
        "=r,l,r,~{memory}",
        [signal, number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _look(signal):
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l,~{memory}", [signal], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _nanoseconds():
    return tl.extra.cuda.globaltimer()


@triton.jit
def _swap(arena, slots, own, other, own_row, halo_row, mine, theirs, signal, their_signal, number, items, blocks,
          row_values, frame_values, BLOCK: tl.constexpr, PAUSE: tl.constexpr):  # fmt: skip
    """Sends ``own_row`` of the frames to the box ``theirs``, and fills ``halo_row`` from the box ``mine``."""
    first = tl.program_id(0)
    step = tl.num_programs(0)
    wide = row_values.to(tl.int64)
    for item in range(first, items, step):
        frame = item // blocks
        offset = item % blocks * BLOCK + tl.arange(0, BLOCK)
        row = arena + (tl.load(slots + frame).to(tl.int64) * frame_values + own_row * wide)
        values = tl.load(row + offset, mask=offset < row_values)
        tl.store(other + theirs + frame * row_values + offset, values, mask=offset < row_values)
    # All threads' values, before any thread's word.
    tl.debug_barrier()
    _tell(their_signal + first, number)
    seen = _look(signal + first)
    while seen - number < 0:
        seen = _look(signal + first)
    if PAUSE:
        now = _nanoseconds()
        end = now + PAUSE
        while now < end:
            now = _nanoseconds()
    for item in range(first, items, step):
        frame = item // blocks
        offset = item % blocks * BLOCK + tl.arange(0, BLOCK)
        row = arena + (tl.load(slots + frame).to(tl.int64) * frame_values + halo_row * wide)
        values = tl.load(own + mine + frame * row_values + offset, mask=offset < row_values, volatile=True)
        tl.store(row + offset, values, mask=offset < row_values)


@triton.jit(do_not_specialize=["above_number", "below_number"])
def _swap_kernel(arena, slots, boxes, above, below, signals, above_signals, below_signals, above_number, below_number,
                 items, blocks, rows, row_values, frame_values, box_values, ABOVE: tl.constexpr, BELOW: tl.constexpr,
                 BLOCK: tl.constexpr, PAUSE: tl.constexpr):  # fmt: skip
    per_side = tl.num_programs(0)
    # What goes up arrives from below, and the other way round.
    if tl.program_id(1) == 0:
        if ABOVE:
            from_above = (above_number & 1) * 2 * box_values
            _swap(arena, slots, boxes, above, 1, 0, from_above, from_above + box_values, signals,
                  above_signals + per_side, above_number, items, blocks, row_values, frame_values,
                  BLOCK, PAUSE)  # fmt: skip
    else:
        if BELOW:
            from_above = (below_number & 1) * 2 * box_values
            _swap(arena, slots, boxes, below, rows, rows + 1, from_above + box_values, from_above, signals + per_side,
                  below_signals, below_number, items, blocks, row_values, frame_values,
                  BLOCK, PAUSE)  # fmt: skip


def exchange_halo(
    arena: torch.Tensor,
    slots: torch.Tensor,
    boxes: torch.Tensor,
    signals: torch.Tensor,
    *,
    above: tuple[torch.Tensor, torch.Tensor] | None,
    below: tuple[torch.Tensor, torch.Tensor] | None,
    numbers: tuple[int, int],
) -> None:
    """Sends the first and last row inside some frames to the neighbours, and puts theirs around them.

    All neighbours must do the same at some time: the device waits for them.

    Args:
        arena: ``[S, H + 2, W + 2, C]``, contiguous.
        slots: ``[T]`` int32: which frames, the same on all devices.
        boxes: ``[2, 2, N]`` of this device, of ``arena``'s dtype: for even and odd numbers, from above and below.
        signals: int32 of this device, at least PROGRAMS for above and as many for below; zero at first.
        above: the other device's boxes and signals; None at the picture's edge, whose halo is left alone.
        below: likewise.
        numbers: how many swaps there have been with the device above, and below, this one among them; as int32, in
            which the number behind 2^31 - 1 is -2^31.

    Raises:
        ValueError: the frames don't fit in the boxes, or a layout that can't be.
    """
    frames, row_values, box_values = slots.numel(), arena.shape[2] * arena.shape[3], boxes.shape[2]
    if not arena.is_contiguous() or boxes.dtype != arena.dtype or boxes.dim() != 3 or slots.dtype != torch.int32:
        raise ValueError(f"no rows of arena {tuple(arena.shape)} {arena.dtype} for boxes of {boxes.dtype}")
    if frames * row_values > box_values:
        raise ValueError(f"{frames} rows of {row_values} values don't fit in a box of {box_values}")
    ends = above is not None, below is not None
    call, sizes = _plan(tuple(arena.shape), arena.dtype, frames, box_values, *ends, arena.device)
    # At the picture's edge any others stand in.
    other = above or below or (boxes, signals)
    (up, up_signals), (down, down_signals) = above or other, below or other
    call(arena, slots, boxes, up, down, signals, up_signals, down_signals, *numbers, *sizes)


@functools.lru_cache(maxsize=4096)
def _plan(
    arena: tuple[int, ...],
    dtype: torch.dtype,  # noqa: ARG001 (a launch is for one dtype)
    frames: int,
    box_values: int,
    above: bool,
    below: bool,
    device: torch.device,  # noqa: ARG001 (and one device)
) -> tuple[Call, tuple[int, ...]]:
    """The launch, and the kernel's integers behind the numbers."""
    _, rows, columns, channels = arena
    blocks = triton.cdiv(columns * channels, _BLOCK)
    call = Call(_swap_kernel, (PROGRAMS, 2), ABOVE=above, BELOW=below, BLOCK=_BLOCK, PAUSE=PAUSE, num_warps=4)
    row_values = columns * channels
    return call, (frames * blocks, blocks, rows - 2, row_values, rows * row_values, box_values)
