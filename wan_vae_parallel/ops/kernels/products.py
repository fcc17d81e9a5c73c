"""What the convolutions' kernels share: tiles of weights, accumulators that start at the bias, and how they are stored.

C channels in, O channels out, CO of them a frame; two accumulators of N0 and N1 channels share a tile of the input
"""

# Kernels have more arguments than lines have room for one each.
# ruff: noqa: E741

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import KERNEL_DTYPES
from ..gpu import gpu
from .tiles import Tile

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4; the kernels then read through pointers
    TensorDescriptor = None

# fmt: off


@triton.jit
def spaced(COUNT: tl.constexpr, STRIDE: tl.constexpr, AT_ONCE: tl.constexpr):
    """``arange(0, COUNT) * STRIDE``, such that a thread's differ by constants, which are part of a copy's instruction.

    As a product of sums the compiler would keep each in a register. ``AT_ONCE`` of them are a program's threads' own;
    every further one is the same thread's.
    """
    if COUNT <= AT_ONCE:
        places = tl.arange(0, COUNT) * STRIDE
    else:
        steps = tl.arange(0, COUNT // AT_ONCE) * (AT_ONCE * STRIDE)
        places = (steps[:, None] + (tl.arange(0, AT_ONCE) * STRIDE)[None, :]).reshape(COUNT)
        # Lost on the way, and without it copies are of single values.
        places = tl.multiple_of(places, [STRIDE & -STRIDE])
    return places


@triton.jit
def load_weights(
    source, tap, n, c,
    TAP_STRIDE: tl.constexpr, O_STRIDE: tl.constexpr,
    C: tl.constexpr, O: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AT_ONCE: tl.constexpr, FULL: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile ``[BN, BK]`` of one tap; past the last channel zeros, so that a short tail meets no other tap.

    The strides are constants so that the compiler sees that 16 bytes lie side by side: otherwise it copies two at a
    time, and waits for them. ``FULL`` says that no tile reaches past the last of O.
    """
    if TMA:
        tile = source.load([tap, n, c]).reshape(BN, BK)
    else:
        o = tl.arange(0, BN)
        k = tl.arange(0, BK)
        places = source + (tap * TAP_STRIDE + n * O_STRIDE + c)
        places += spaced(BN, O_STRIDE, AT_ONCE)[:, None] + k[None, :]
        if FULL and C % BK == 0:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=(n + o < O)[:, None] & (c + k < C)[None, :], other=0.0)
    return tile


@triton.jit
def dot(x, w, acc, SWAP: tl.constexpr):
    """Positions times weights ``[BN, BK]``, added up; swapped the weights are the left side."""
    return tl.dot(w, x.T, acc) if SWAP else tl.dot(x, w.T, acc)


@triton.jit
def spread(positions, channels, SWAP: tl.constexpr):
    """Both as two axes, in the order of the accumulator's."""
    if SWAP:
        positions = positions[None, :]
        channels = channels[:, None]
    else:
        positions = positions[:, None]
        channels = channels[None, :]
    return positions, channels


@triton.jit
def start(
    acc, n, first, bias, residual, place, stored,
    CO: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SWAP: tl.constexpr, HIDE: tl.constexpr,
):
    """What the products are added to. Adding it after them instead took 250 registers more than there are.

    ``HIDE`` hides that all positions begin with the same numbers: where accumulators take almost all registers, the
    assembler otherwise finds none for any of them.
    """
    place, n = spread(place, n, SWAP)
    acc += tl.load(bias + first + n, mask=n < CO, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stored, _ = spread(stored, stored, SWAP)
        acc += tl.load(residual + (place * CO + n), mask=stored & (n < CO), other=0.0).to(tl.float32)
    elif HIDE:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def store(values, n, target, place, stored, CO: tl.constexpr, SWAP: tl.constexpr):
    """Rounds, and writes what lies in the picture."""
    place, n = spread(place, n, SWAP)
    stored, _ = spread(stored, stored, SWAP)
    tl.store(target + (place * CO + n), values.to(target.dtype.element_ty), mask=stored & (n < CO))


@triton.jit
def frame_of(target, slots, frame, rows, columns, CO: tl.constexpr, PAGED: tl.constexpr, BORDER: tl.constexpr):
    """The target's frame: offsets in most fit int32, which halves the registers that addresses take."""
    if PAGED:
        frame = tl.load(slots + frame)
    return target + frame.to(tl.int64) * (rows + BORDER) * (columns + BORDER) * CO
# fmt: on


def may_assemble(kernel: Any) -> bool:
    """Whether a kernel may have assembly in it, which Triton's interpreter knows none of."""
    return isinstance(kernel, triton.JITFunction)


def rows_at_once(tile: Tile) -> int:
    """Rows of a tile of the input or of the weights that a program's threads copy at once, 16 bytes each."""
    return 32 * tile.warps * 8 // tile.step


def use_descriptors(arena: torch.Tensor) -> bool:
    """Whether tiles of ``arena`` are read through TMA, which wants Hopper and strides of 16 bytes."""
    if TensorDescriptor is None or arena.shape[-1] % 8 or arena.data_ptr() % 16:
        return False
    return gpu(arena.device).has_tma


def describe_weights(
    weight: torch.Tensor, shape: tuple[int, int, int], strides: tuple[int, int], tile: Tile
) -> list[Any]:
    """Descriptors of each accumulator's tiles of the weights, one if they are alike.

    Args:
        weight: the weights as they lie in memory.
        shape: taps, O, C.
        strides: of taps and O.
        tile: says how many channels each accumulator has, and how many channels a step.
    """
    return [
        TensorDescriptor(weight, list(shape), [*strides, 1], [1, n, tile.step])
        for n in dict.fromkeys((tile.first, tile.second or tile.first))
    ]


def check_tensors(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
) -> None:
    """Raises ValueError for layouts and dtypes that no convolution's kernel takes; C is the weight's last axis."""
    for name, tensor in (("arena", arena), ("residual", residual), ("out", out), ("weight", weight), ("bias", bias)):
        if tensor is not None and (not tensor.is_contiguous() or tensor.dtype != arena.dtype):
            raise ValueError(f"{name} must be contiguous {arena.dtype}, not {tensor.dtype} {tensor.stride()}")
    for name, indices in (("slots", slots), ("out_slots", out_slots)):
        if indices is not None and (indices.dtype != torch.int32 or indices.dim() != 1 or not indices.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous row of int32, not {indices.dtype} {tuple(indices.shape)}")
    if arena.dtype not in KERNEL_DTYPES or weight.shape[-1] != arena.shape[3]:
        raise ValueError(f"the kernel takes bfloat16 or float16 of {weight.shape[-1]} channels, not {arena.dtype}")
