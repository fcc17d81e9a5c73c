"""Attention of one head over all positions of a frame, in Triton, with fp32 scores.

T frames, N positions of this shard, M positions of the whole frame, C channels
Layout  query, key and value in any strides with neighbouring channels (slices of one [T, N, 3C], say), out contiguous.
        Tiles are read through TMA, or pointers on GPUs that have none.
Tile    C up to 384: one pass over the keys with an online softmax (FlashAttention-2, arXiv:2307.08691), 128 queries
        and all of their channels a program; 128 x 32 at 384 channels, 348 TFLOP/s on H200 (128 x 64 spills registers:
        192; 64 x 32: 265). Wider, the accumulators of 128 queries don't fit, nor do 384 channels in 99 KiB of shared
        memory: attention_two_passes.py.
Bits    a query's depend on its frame's keys and values, and the GPU model, alone: not on N, T, or where in a tile it
        lies. Keys come in blocks of a size that depends on C. Weights are rounded to the inputs' dtype before they meet
        the values.
"""

# Kernels know no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu import gpu
from ..limits import FUSED_CHANNELS, attention_takes
from . import attention_two_passes
from .attention_tiles import QUERIES, keys_at_once, load_tile, parts_of, scale_of, source_of
from .launch import launch
from .products import use_descriptors
from .tiles import wide_products

_DTYPES = (torch.bfloat16, torch.float16)
# Shared memory for weights that change hands between warps, at most.
_SCRATCH_BYTES = 16 * 1024


@triton.jit
def _fused_kernel(
    q_source,
    k_source,
    v_source,
    out_ptr,
    queries,
    keys,
    q_frame,
    q_row,
    k_frame,
    k_row,
    v_frame,
    v_row,
    out_frame,
    scale,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):
    frame = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    # Channels in equal powers of two: 384 are 3 * 128.
    q = ()
    acc = ()
    for part in tl.static_range(PARTS):
        q_part = load_tile(q_source, frame, first, part * PART, queries, q_frame, q_row, QUERIES, PART, TMA)
        q = q + (q_part,)
        acc = acc + (tl.zeros([QUERIES, PART], tl.float32),)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in tl.range(0, keys, KEYS, num_stages=2):
        scores = tl.zeros([QUERIES, KEYS], tl.float32)
        for part in tl.static_range(PARTS):
            k = load_tile(k_source, frame, start, part * PART, keys, k_frame, k_row, KEYS, PART, TMA)
            scores = tl.dot(q[part], k.T, scores)
        if not WHOLE:
            scores = tl.where((start + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        top = new_top
        weights = weights.to(out_ptr.dtype.element_ty)
        new_acc = ()
        for part in tl.static_range(PARTS):
            v = load_tile(v_source, frame, start, part * PART, keys, v_frame, v_row, KEYS, PART, TMA)
            new_acc = new_acc + (tl.dot(weights, v, acc[part] * decay[:, None]),)
        acc = new_acc
    share = 1.0 / total
    rows = first + tl.arange(0, QUERIES)
    offsets = rows[:, None] * (PARTS * PART) + tl.arange(0, PART)[None, :]
    for part in tl.static_range(PARTS):
        out = (acc[part] * share[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + frame.to(tl.int64) * out_frame + offsets + part * PART, out, mask=(rows < queries)[:, None])


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each position looks at all positions of its own frame.

    Args:
        query: ``[T, N, C]``, bf16 or fp16, of any strides with neighbouring channels and multiples of 16 bytes. C is up
            to 5 times a power of two from 16 to 128, or a multiple of 128.
        key: ``[T, M, C]``, likewise.
        value: ``[T, M, C]``, likewise.

    Returns:
        ``[T, N, C]``, contiguous.

    Raises:
        ValueError: the tensors are none of the above.
    """
    if reason := why_not(query, key, value):
        raise ValueError(f"frame_attention {reason}; attention.frame_attention takes it")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    one_pass = _fits(query.shape[-1], query.device)
    (_fused if one_pass else attention_two_passes.attend)(query, key, value, out)
    return out


def why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """What these tensors have that one-pass attention doesn't take, if anything."""
    if query.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2] or 0 in query.shape:
        return (
            f"takes [T, N, C], [T, M, C], [T, M, C], not {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype or 0 in key.shape:
        return f"takes bf16 or fp16 and at least one key, not {query.dtype}, {key.dtype}, {value.dtype}"
    channels = query.shape[-1]
    if not attention_takes(channels):
        return f"takes up to 5 times a power of two from 16 to 128 or multiples of 128 as channels, not {channels}"
    for tensor in (query, key, value):
        frame, position, channel = tensor.stride()
        if channel != 1 or frame % 8 or position % 8 or min(frame, position) < 1 or tensor.data_ptr() % 16:
            return f"takes neighbouring channels and strides of multiples of 16 bytes, not {tensor.stride()} elements"
    # Within a frame addresses are 32 bits wide.
    if max(x.shape[1] * x.stride(1) for x in (query, key, value)) >= 2**31 or query.shape[0] > 65535:
        return f"takes frames under 2^31 values, not {tuple(query.shape)} and {tuple(key.shape)}"
    return None


def _fits(channels: int, device: torch.device) -> bool:
    """Whether the GPU has the shared memory for one pass; consumer ones have a third of Hopper's."""
    # The queries, and two or one stages of keys and values, in two bytes each.
    rows = QUERIES + (4 if wide_products(device) else 2) * keys_at_once(channels)
    return channels <= FUSED_CHANNELS and rows * channels * 2 + _SCRATCH_BYTES <= gpu(device).shared


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    frames, queries, channels = query.shape
    parts, part = parts_of(channels)
    keys = keys_at_once(channels)
    tma = use_descriptors(query)
    launch(
        _fused_kernel,
        (triton.cdiv(queries, QUERIES), frames),
        source_of(query, QUERIES, part, tma),
        source_of(key, keys, part, tma),
        source_of(value, keys, part, tma),
        out,
        queries,
        key.shape[1],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        out.stride(0),
        scale_of(channels),
        PARTS=parts,
        PART=part,
        QUERIES=QUERIES,
        KEYS=keys,
        WHOLE=key.shape[1] % keys == 0,
        TMA=tma,
        num_warps=8,
    )
