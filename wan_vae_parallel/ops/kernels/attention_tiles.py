"""What the kernels of attention share: tiles of a frame's rows, and how a width of channels is cut up.

T frames, N positions of this shard, M positions of the whole frame, C channels
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..limits import powers_of_two
from .products import TensorDescriptor

# A program's.
QUERIES = 128


@triton.jit
def load_tile(
    source, frame, row, channel, rows, frame_stride, row_stride,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TMA: tl.constexpr, CLAMP: tl.constexpr = True,
):  # fmt: skip
    """A tile ``[ROWS, CHANNELS]`` of a frame; past its last row that one again, or zeros."""
    if TMA:
        tile = source.load([frame, row, channel]).reshape(ROWS, CHANNELS)
    else:
        # No mask: it costs as many instructions as the load.
        r = row + tl.arange(0, ROWS)
        if CLAMP:
            r = tl.minimum(r, rows - 1)
        first = source + frame.to(tl.int64) * frame_stride + channel
        tile = tl.load(first + r[:, None] * row_stride + tl.arange(0, CHANNELS)[None, :])
    return tile


def parts_of(channels: int) -> tuple[int, int]:
    """How many equal powers of two, of 128 at most, make up ``channels``, and their size."""
    return powers_of_two(channels, 128)


def keys_at_once(channels: int) -> int:
    """Keys between two looks at the maximum. Part of the result's bits: the same on every machine and rank."""
    return 64 if channels <= 256 else 32


def source_of(x: torch.Tensor, positions: int, channels: int, tma: bool) -> torch.Tensor | TensorDescriptor:
    """What tiles of ``x`` are read from."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, positions, channels]) if tma else x


def scale_of(channels: int) -> float:
    """Of scores, for exp2 in place of exp."""
    return math.log2(math.e) / math.sqrt(channels)
