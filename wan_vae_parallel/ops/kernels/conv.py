"""Convolutions over paged frames as one implicit matrix product.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena, kt x kh x kw the kernel

Layout  The input is an arena ``[S, H + 2, W + 2, C]`` (``[S, H, W, C]`` for kernels of one position), contiguous, with
        zero borders; ``slots[T + kt - 1]`` says where each input frame lies, past ones first. Seen as a matrix
        ``[rows, C]`` a tap is a shift by a constant number of rows within a frame, so the convolution is kt*kh*kw
        accumulated matrix products over TMA tiles. Outputs on a border are computed and not stored (under 2% at 720p).
Tile    Consecutive positions of one frame x all O, or a part of O. No power of two is no obstacle: 96 is 64 + 32, 192
        is 128 + 64, 384 is 256 + 128, as two accumulators that share a tile of the input (see tiles.py).
Bits    fp32 accumulation that starts at bias and residual, then taps in the picture's order and channels ascending
        within a tap; one rounding. No tile, position, T, H, W or split axis changes a bit.
"""

# Kernels have more arguments than lines have room for one each.
# ruff: noqa: E741

from __future__ import annotations

import functools
import math
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

_KERNELS = ((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1))
_STRIDED_KERNELS = ((3, 1, 1),)

# fmt: off


@triton.jit
def _load_positions(
    source, row, c, inside,
    C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, AT_ONCE: tl.constexpr, FILLED: tl.constexpr, TMA: tl.constexpr,
):
    """A tile ``[BM, BK]`` of the arena as a matrix; through pointers, zeros for positions that are not ``inside``."""
    if TMA:
        tile = source.load([row, c])
    else:
        # What changes from step to step is one number for all threads.
        first = source + (row.to(tl.int64) * C + c)
        k = tl.arange(0, BK)
        places = first + (spaced(BM, C, AT_ONCE)[:, None] + k[None, :])
        if FILLED and C % BK == 0:
            tile = tl.load(places)
        elif C % BK == 0:
            tile = tl.load(places, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(places, mask=inside[:, None] & (c + k < C)[None, :], other=0.0)
    return tile


@triton.jit
def _begin(own, positions, BM: tl.constexpr, FILLED: tl.constexpr):
    """Where a tile begins whose own positions begin at ``own``.

    The last tile of a frame begins within the one before it, where there is one: so loads through pointers need no
    masks, which cost an eighth of the loop.
    """
    return tl.minimum(own, positions - BM) if FILLED else own


@triton.jit
def _where(own, positions, pitch, py, px, H, W, BM: tl.constexpr, SCALE: tl.constexpr, FILLED: tl.constexpr):
    """Row and column in the output of each position of a tile, and whether it is one, and none of another tile's."""
    m = _begin(own, positions, BM, FILLED) + tl.arange(0, BM)
    h = m // pitch
    w = m % pitch
    stored = (h < H) & (w < W)
    if FILLED:
        stored = stored & (m >= own)
    return h * SCALE + py, w * SCALE + px, stored


@triton.jit(do_not_specialize=["H", "W"])
def _conv_kernel(
    source, weight0, weight1, slots, bias, residual, out, out_slots,
    H, W,
    C: tl.constexpr, O: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BORDER: tl.constexpr, TAP_STRIDE: tl.constexpr, O_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, HALVES: tl.constexpr, TIME_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OUT_PAGED: tl.constexpr, OUT_BORDER: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
    AT_ONCE: tl.constexpr, FILLED: tl.constexpr, TMA: tl.constexpr, HIDE: tl.constexpr,
):
    CO: tl.constexpr = O // HALVES
    PHASES: tl.constexpr = SCALE * SCALE
    PARTS: tl.constexpr = (CO + N0 + N1 - 1) // (N0 + N1)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    TAPS: tl.constexpr = KT * KH * KW
    FULL: tl.constexpr = CO % (N0 + N1) == 0

    # What shares a tile of the input runs side by side, then the next positions of that frame: their rows are in L2.
    pid = tl.program_id(0)
    part = pid % PARTS
    half = pid // PARTS % HALVES
    phase = pid // (PARTS * HALVES) % PHASES
    pid = pid // (PARTS * HALVES * PHASES)
    pitch = W + BORDER
    positions = (H - 1) * pitch + W
    tiles = tl.cdiv(positions, BM)
    own = pid % tiles * BM
    p = _begin(own, positions, BM, FILLED)
    t = pid // tiles
    frame = t * HALVES + half
    n = part * (N0 + N1)
    first_channel = half * CO
    # Phases and taps go in the picture's own order, also where its columns are the arena's rows: the same sums.
    py = phase % SCALE if TRANSPOSED else phase // SCALE
    px = phase // SCALE if TRANSPOSED else phase % SCALE

    # Read before the loop: in it each would stall the load that waits for it.
    size = (H + BORDER) * pitch
    begin = p + py * pitch + px
    # The last tile's other positions are of the next frame, or past the arena.
    inside = p + tl.arange(0, BM) < positions
    first = t * TIME_STRIDE
    row0 = tl.load(slots + first) * size + begin
    row1 = row0
    row2 = row0
    if KT == 3:
        row1 = tl.load(slots + first + 1) * size + begin
        row2 = tl.load(slots + first + 2) * size + begin

    h, w, stored = _where(own, positions, pitch, py, px, H, W, BM, SCALE, FILLED)
    place = h * (W * SCALE) + w
    if WIDE:  # frames of 2^31 values and more
        place = place.to(tl.int64)
    if HAS_RESIDUAL:
        residual = frame_of(residual, slots, frame, H * SCALE, W * SCALE, CO, False, 0)
    n0 = n + tl.arange(0, N0)
    acc0 = tl.zeros((N0, BM) if SWAP else (BM, N0), tl.float32)
    acc0 = start(acc0, n0, first_channel, bias, residual, place, stored, CO, HAS_RESIDUAL, SWAP, HIDE and not TMA)
    if N1 > 0:
        n1 = n + N0 + tl.arange(0, N1)
        acc1 = tl.zeros((N1, BM) if SWAP else (BM, N1), tl.float32)
        acc1 = start(acc1, n1, first_channel, bias, residual, place, stored, CO, HAS_RESIDUAL, SWAP, HIDE and not TMA)

    for k in range(TAPS * STEPS):
        tap = k // STEPS
        c = k % STEPS * BK
        dt = tap // (KH * KW)
        down = tap % KW if TRANSPOSED else tap // KW % KH
        right = tap // KW % KH if TRANSPOSED else tap % KW
        row = tl.where(dt == 0, row0, tl.where(dt == 1, row1, row2)) + down * pitch + right
        tap += phase * TAPS
        x = _load_positions(source, row, c, inside, C, BM, BK, AT_ONCE, FILLED, TMA)
        w0 = load_weights(weight0, tap, first_channel + n, c, TAP_STRIDE, O_STRIDE, C, O, N0, BK, AT_ONCE, FULL, TMA)
        acc0 = dot(x, w0, acc0, SWAP)
        if N1 > 0:
            w1 = load_weights(
                weight1, tap, first_channel + n + N0, c, TAP_STRIDE, O_STRIDE, C, O, N1, BK, AT_ONCE, FULL, TMA
            )
            acc1 = dot(x, w1, acc1, SWAP)

    if HIDE:
        # Hides that these are the numbers from before the loop, which the compiler would keep, in registers that
        # the accumulators need.
        own = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [own], dtype=tl.int32, is_pure=False, pack=1)
    h, w, stored = _where(own, positions, pitch, py, px, H, W, BM, SCALE, FILLED)
    H *= SCALE
    W *= SCALE
    out = frame_of(out, out_slots, frame, H, W, CO, OUT_PAGED, OUT_BORDER)
    place = (h + OUT_BORDER // 2) * (W + OUT_BORDER) + w + OUT_BORDER // 2
    if WIDE:
        place = place.to(tl.int64)
    store(acc0, n0, out, place, stored, CO, SWAP)
    if N1 > 0:
        store(acc1, n1, out, place, stored, CO, SWAP)
# fmt: on


def takes(arena: torch.Tensor, weight: torch.Tensor, *, scale: int = 1, time_stride: int = 1) -> bool:
    """Whether `conv` takes this input, given a GPU that runs kernels: bf16 or fp16 and four kinds of kernel.

    With a ``scale`` of 2, whether `upsample_conv` does. With a ``time_stride`` of more than 1 only 3x1x1 kernels.
    """
    return (
        arena.dtype in KERNEL_DTYPES
        and weight.dtype == arena.dtype
        and tuple(weight.shape[2:]) in (_KERNELS if time_stride == 1 else _STRIDED_KERNELS)
        and arena.shape[:3].numel() < 2**31
        # Positions of an output frame, with a border.
        and (arena.shape[1] * scale + 2) * (arena.shape[2] * scale + 2) < 2**31
    )


def conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    halves: int,
    time_stride: int = 1,
    transposed: bool,
    tile: Tile | None = None,
    descriptors: bool | None = None,
    wide: bool | None = None,
) -> None:
    """`ops.conv.conv` on the GPU.

    Args:
        arena: as there, in bf16 or fp16.
        slots: int32 on the arena's device.
        weight: ``[O, C, kt, kh, kw]`` in channels_last_3d; 3x3x3, 3x1x1, 1x3x3 or 1x1x1.
        bias: as there.
        residual: ``[T * halves, H, W, O / halves]``, contiguous.
        out: contiguous; it may be `residual`'s memory, as each element is read before it is written.
        out_slots: int32, if ``out`` is an arena.
        halves: as there.
        time_stride: as there; more than 1 with 3x1x1 kernels alone.
        transposed: as there.
        tile: overrides `tiles.choose_tile`, for benchmarks.
        descriptors: overrides whether tiles are read through TMA descriptors, for tests.
        wide: overrides whether places in a frame have 64 bits, for tests.

    Raises:
        ValueError: a shape, dtype or layout that the kernel can't take.
    """
    out_channels, channels, *kernel = weight.shape
    as_matrix = weight.permute(0, 2, 3, 4, 1)
    if not as_matrix.is_contiguous():
        raise ValueError(f"weight must be channels_last_3d, not with strides {weight.stride()}")
    kind = LayerKind("conv", channels, out_channels, (kernel[0], kernel[1], kernel[2]), halves, time_stride)
    if time_stride != 1 and (kind.kernel not in _STRIDED_KERNELS or time_stride < 1):
        raise ValueError(
            f"a {'x'.join(map(str, kernel))} kernel takes a stride of 1 frame, not {time_stride}; 3x1x1 kernels take "
            f"any from 1 on, ops.conv.conv with cudnn=True takes the rest"
        )
    _launch(
        arena, slots, as_matrix, bias, kind=kind, kernel=kind.kernel,
        strides=(channels, math.prod(kernel) * channels), border=kernel[1] - 1, residual=residual, out=out,
        out_slots=out_slots, transposed=transposed, tile=tile, descriptors=descriptors, wide=wide,
    )  # fmt: skip


def upsample_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    folded: torch.Tensor,
    bias: torch.Tensor,
    *,
    out: torch.Tensor,
    transposed: bool,
    tile: Tile | None = None,
    descriptors: bool | None = None,
    wide: bool | None = None,
) -> None:
    """`ops.conv.upsample_conv` on the GPU, as four 2x2 convolutions of the small frame: 4/9 of the work.

    Args:
        arena: as there, in bf16 or fp16.
        slots: int32 on the arena's device.
        folded: what `ops.conv.fold_upsample_weight` makes of the weight, ``[2, 2, 2, 2, O, C]``.
        bias: as there.
        out: ``[T, 2H, 2W, O]``, contiguous.
        transposed: as there.
        tile: overrides `tiles.choose_tile`, for benchmarks.
        descriptors: overrides whether tiles are read through TMA descriptors, for tests.
        wide: as `conv`'s.

    Raises:
        ValueError: a shape, dtype or layout that the kernel can't take.
    """
    out_channels, channels = folded.shape[4:]
    _launch(
        arena, slots, folded, bias, kind=LayerKind("upsample_conv", channels, out_channels, (1, 3, 3)),
        kernel=(1, 2, 2), strides=(out_channels * channels, channels), border=2, residual=None, out=out,
        out_slots=None, transposed=transposed, tile=tile, descriptors=descriptors, wide=wide,
    )  # fmt: skip


def _launch(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    kind: LayerKind,
    kernel: tuple[int, int, int],
    strides: tuple[int, int],
    border: int,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    transposed: bool,
    tile: Tile | None,
    descriptors: bool | None,
    wide: bool | None,
) -> None:
    channels, out_channels, scale = arena.shape[3], kind.out_channels, kind.scale
    check_tensors(arena, slots, weight, bias, residual=residual, out=out, out_slots=out_slots)
    tma = use_descriptors(arena) if descriptors is None else descriptors
    geometry = _Geometry(
        kind, tuple(arena.shape), slots.numel(), bias.numel(), kernel, strides, border,
        None if residual is None else tuple(residual.shape), tuple(out.shape),
        None if out_slots is None else out_slots.numel(), transposed, tile, tma, arena.dtype, arena.device,
        tiles.changes(), wide,
    )  # fmt: skip
    tile, call, numbers, tma = _plan(geometry)
    source: Any = arena
    weights: list[Any] = [weight, weight]
    if tma:
        taps = math.prod(kernel) * scale**2
        source = TensorDescriptor(
            arena, [math.prod(arena.shape[:3]), channels], [channels, 1], [tile.positions, tile.step]
        )
        weights = describe_weights(weight, (taps, out_channels, channels), strides, tile)
    call(source, weights[0], weights[-1], slots, bias, residual, out, out_slots, *numbers)


class _Geometry(NamedTuple):
    """All of a convolution but its tensors."""

    kind: LayerKind
    arena: tuple[int, ...]
    slots: int
    biases: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int]
    border: int
    residual: tuple[int, ...] | None
    out: tuple[int, ...]
    out_slots: int | None
    transposed: bool
    tile: Tile | None
    tma: bool
    dtype: torch.dtype
    device: torch.device
    # What `choose_tile` goes by may become better known.
    changes: int
    wide: bool | None = None


@functools.lru_cache(maxsize=4096)
def _plan(geometry: _Geometry) -> tuple[Tile, Call, tuple[int, ...], bool]:
    """The tile, the launch, the kernel's integers, and whether it reads through descriptors.

    Raises `ValueError` as `conv` does.
    """
    kind, kernel, scale, halves = geometry.kind, geometry.kernel, geometry.kind.scale, geometry.kind.halves
    rows, columns = geometry.arena[1] - geometry.border, geometry.arena[2] - geometry.border
    frames = (geometry.slots - kernel[0]) // kind.time_stride + 1
    own = kind.out_channels // halves
    shape = (frames * halves, rows * scale, columns * scale, own)
    paged = geometry.out_slots is not None
    out_border = geometry.out[1] - shape[1] if paged else 0
    if paged and geometry.out_slots != shape[0]:
        raise ValueError(f"out_slots must be {shape[0]}, not {geometry.out_slots}")
    if min(rows, columns, frames) < 1 or geometry.biases != kind.out_channels or out_border not in (0, 2):
        raise ValueError(f"no output of {kind.out_channels} channels in arena {geometry.arena}, {geometry.slots} slots")
    if (geometry.slots - kernel[0]) % kind.time_stride:
        raise ValueError(
            f"{geometry.slots} slots end between two output frames, which see {kernel[0]} frames each and are "
            f"{kind.time_stride} apart; leave out the last or add more"
        )
    wanted = (geometry.out[0] if paged else shape[0], shape[1] + out_border, shape[2] + out_border, own)
    if geometry.out != wanted or geometry.residual not in (None, shape):
        raise ValueError(f"out must be {wanted} and a residual {shape}, not {geometry.out} and {geometry.residual}")
    positions = math.prod(geometry.arena[:3])
    in_bordered = (shape[1] + 2) * (shape[2] + 2)
    if positions >= 2**31 or in_bordered >= 2**31:
        raise ValueError(f"a frame of {shape[1:]} or an arena {geometry.arena} overflows the kernel's int32")

    pitch = columns + geometry.border
    in_frame = (rows - 1) * pitch + columns
    tile = geometry.tile or tiles.choose_tile(
        kind, in_frame, frames * halves * scale**2, dtype=geometry.dtype, device=geometry.device
    )
    tma = geometry.tma and tile.descriptors
    parts = -(-own // (tile.first + tile.second)) * halves * scale**2
    call = Call(
        _conv_kernel,
        (-(-in_frame // tile.positions) * frames * parts,),
        C=kind.channels, O=kind.out_channels, KT=kernel[0], KH=kernel[1], KW=kernel[2], BORDER=geometry.border,
        TAP_STRIDE=geometry.strides[0], O_STRIDE=geometry.strides[1],
        SCALE=scale, HALVES=halves, TIME_STRIDE=kind.time_stride, HAS_RESIDUAL=geometry.residual is not None,
        OUT_PAGED=paged, OUT_BORDER=out_border, TRANSPOSED=geometry.transposed,
        WIDE=in_bordered * own >= 2**31 if geometry.wide is None else geometry.wide,
        BM=tile.positions, N0=tile.first, N1=tile.second, BK=tile.step, SWAP=tile.swapped,
        AT_ONCE=rows_at_once(tile), FILLED=not tma and in_frame >= tile.positions, TMA=tma,
        HIDE=may_assemble(_conv_kernel),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return tile, call, (rows, columns), tma
