"""Attention of one head over all positions of a frame, in Triton, with fp32 scores.

T frames, N positions of this shard, M positions of the whole frame, C channels
Layout  query, key and value in any strides with neighbouring channels (slices of one [T, N, 3C], say), out contiguous.
Tile    C up to 384: one pass over the keys with an online softmax (FlashAttention-2, arXiv:2307.08691), 128 queries
        and all of their channels a program; 128 x 32 at 384 channels, 348 TFLOP/s on H200 (128 x 64 spills registers:
        192; 64 x 32: 265). Wider, the accumulators of 128 queries don't fit: one kernel writes the weights, a second
        multiplies them by the values, 441 TFLOP/s at 1024 channels (torch's: 75).
Bits    a query's depend on its frame's keys and values alone: not on N, T, or where in a tile it lies. Keys come in
        blocks of a size that depends on C. Weights are rounded to the inputs' dtype before they meet the values.
"""

# Kernels know no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..limits import FUSED_CHANNELS, WEIGHTS_AT_ONCE
from .launch import launch
from .tiles import gpu

_DTYPES = (torch.bfloat16, torch.float16)
_QUERIES = 128
# Wider than FUSED_CHANNELS: keys that share a maximum.
_WIDE_KEYS = 128


@triton.jit
def _fused_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    queries,
    keys,
    out_frame,
    scale,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    frame = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    # Channels in equal powers of two: 384 are 3 * 128.
    q = ()
    acc = ()
    for part in tl.static_range(PARTS):
        q = q + (q_desc.load([frame, first, part * PART]).reshape(QUERIES, PART),)
        acc = acc + (tl.zeros([QUERIES, PART], tl.float32),)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in tl.range(0, keys, KEYS, num_stages=2):
        scores = tl.zeros([QUERIES, KEYS], tl.float32)
        for part in tl.static_range(PARTS):
            k = k_desc.load([frame, start, part * PART]).reshape(KEYS, PART)
            scores = tl.dot(q[part], k.T, scores)
        if not WHOLE:
            scores = tl.where((start + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        top = new_top
        weights = weights.to(q_desc.dtype)
        new_acc = ()
        for part in tl.static_range(PARTS):
            v = v_desc.load([frame, start, part * PART]).reshape(KEYS, PART)
            new_acc = new_acc + (tl.dot(weights, v, acc[part] * decay[:, None]),)
        acc = new_acc
    share = 1.0 / total
    rows = first + tl.arange(0, QUERIES)
    offsets = rows[:, None] * (PARTS * PART) + tl.arange(0, PART)[None, :]
    for part in tl.static_range(PARTS):
        out = (acc[part] * share[:, None]).to(q_desc.dtype)
        tl.store(out_ptr + frame.to(tl.int64) * out_frame + offsets + part * PART, out, mask=(rows < queries)[:, None])


@triton.jit
def _weights_kernel(
    q_desc,
    k_desc,
    weights_desc,
    top_ptr,
    total_ptr,
    queries,
    keys,
    blocks,
    scale,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # Eight rows of tiles go together, so that the keys they share are still in L2.
    pid = tl.program_id(0)
    frame = tl.program_id(1)
    band = pid // (8 * blocks) * 8
    height = min(tl.cdiv(queries, QUERIES) - band, 8)
    row = band + pid % (8 * blocks) % height
    block = pid % (8 * blocks) // height
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    for channel in tl.range(0, CHANNELS, STEP, num_stages=3):
        q = q_desc.load([frame, row * QUERIES, channel]).reshape(QUERIES, STEP)
        k = k_desc.load([frame, block * KEYS, channel]).reshape(KEYS, STEP)
        scores = tl.dot(q, k.T, scores)
    if not WHOLE:
        scores = tl.where((block * KEYS + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
    # A whole number, so that the second kernel's change from this maximum to the frame's is by a power of two: exact.
    top = tl.ceil(tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - top[:, None]).to(weights_desc.dtype)
    rows = row * QUERIES + tl.arange(0, QUERIES)
    at = (frame.to(tl.int64) * blocks + block) * queries + rows
    tl.store(top_ptr + at, top, mask=rows < queries)
    # Of the rounded weights: the largest is not 1 here, and a query with one key must get that key's value.
    tl.store(total_ptr + at, tl.sum(weights.to(tl.float32), axis=1), mask=rows < queries)
    weights_desc.store([frame, row * QUERIES, block * KEYS], weights[None])


@triton.jit
def _values_kernel(
    weights_desc,
    v_desc,
    top_ptr,
    total_ptr,
    out_ptr,
    queries,
    blocks,
    out_frame,
    CHANNELS: tl.constexpr,
    PART: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    PARTS: tl.constexpr = CHANNELS // PART
    frame = tl.program_id(1)
    first = tl.program_id(0) // PARTS * QUERIES
    channel = tl.program_id(0) % PARTS * PART
    rows = first + tl.arange(0, QUERIES)
    mask = rows < queries
    at = frame.to(tl.int64) * blocks * queries + rows
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    for block in tl.range(0, blocks):
        top = tl.maximum(top, tl.load(top_ptr + at + block * queries, mask=mask, other=0.0))
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, PART], tl.float32)
    for block in tl.range(0, blocks, num_stages=2):
        share = tl.exp2(tl.load(top_ptr + at + block * queries, mask=mask, other=0.0) - top)
        total += share * tl.load(total_ptr + at + block * queries, mask=mask, other=0.0)
        weights = weights_desc.load([frame, first, block * KEYS]).reshape(QUERIES, KEYS)
        v = v_desc.load([frame, block * KEYS, channel]).reshape(KEYS, PART)
        acc = tl.dot(weights * share.to(weights_desc.dtype)[:, None], v, acc)
    out = (acc * (1.0 / total)[:, None]).to(weights_desc.dtype)
    offsets = rows[:, None] * CHANNELS + channel + tl.arange(0, PART)[None, :]
    tl.store(out_ptr + frame.to(tl.int64) * out_frame + offsets, out, mask=mask[:, None])


def fits(query: torch.Tensor) -> bool:
    """Whether the GPU has the shared memory for a program of `frame_attention`; consumer ones have a third."""
    channels = query.shape[2]
    if channels > FUSED_CHANNELS:
        return True
    # The queries, and two stages of keys and values.
    return (_QUERIES + 4 * keys_at_once(channels)) * channels * query.element_size() <= gpu(query.device)[1]


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
    (_fused if query.shape[-1] <= FUSED_CHANNELS else _wide)(query, key, value, out)
    return out


def parts_of(channels: int) -> tuple[int, int]:
    """How many equal powers of two, of 128 at most, make up ``channels``, and their size."""
    part = min(128, channels & -channels)
    return channels // part, part


def keys_at_once(channels: int) -> int:
    """Keys between two looks at the maximum. Part of the result's bits: the same on every machine and rank."""
    return 64 if channels <= 256 else 32


def why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """What these tensors have that one-pass attention doesn't take, if anything."""
    if query.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2] or 0 in query.shape:
        return (
            f"takes [T, N, C], [T, M, C], [T, M, C], not {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype or 0 in key.shape:
        return f"takes bf16 or fp16 and at least one key, not {query.dtype}, {key.dtype}, {value.dtype}"
    channels = query.shape[-1]
    parts, part = parts_of(channels)
    if (channels <= FUSED_CHANNELS and (part < 16 or parts > 5)) or (channels > FUSED_CHANNELS and part < 128):
        return f"takes up to 5 times a power of two from 16 to 128 or multiples of 128 as channels, not {channels}"
    for tensor in (query, key, value):
        frame, position, channel = tensor.stride()
        if channel != 1 or frame % 8 or position % 8 or min(frame, position) < 1 or tensor.data_ptr() % 16:
            return f"takes neighbouring channels and strides of multiples of 16 bytes, not {tensor.stride()} elements"
    if max(query.shape[1], key.shape[1]) * channels >= 2**31 or query.shape[0] > 65535:
        return f"takes frames under 2^31 values, not {tuple(query.shape)} and {tuple(key.shape)}"
    return None


def _descriptor(x: torch.Tensor, positions: int, channels: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, positions, channels])


def _scale(channels: int) -> float:
    # For exp2 in place of exp.
    return math.log2(math.e) / math.sqrt(channels)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    frames, queries, channels = query.shape
    parts, part = parts_of(channels)
    keys = keys_at_once(channels)
    launch(
        _fused_kernel,
        (triton.cdiv(queries, _QUERIES), frames),
        _descriptor(query, _QUERIES, part),
        _descriptor(key, keys, part),
        _descriptor(value, keys, part),
        out,
        queries,
        key.shape[1],
        out.stride(0),
        _scale(channels),
        PARTS=parts,
        PART=part,
        QUERIES=_QUERIES,
        KEYS=keys,
        WHOLE=key.shape[1] % keys == 0,
        num_warps=8,
    )


def _wide(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    queries, keys = query.shape[1], key.shape[1]
    row = triton.cdiv(keys, _WIDE_KEYS) * _WIDE_KEYS
    queries_at_once = min(queries, max(_QUERIES, WEIGHTS_AT_ONCE // row // _QUERIES * _QUERIES))
    frames_at_once = max(1, WEIGHTS_AT_ONCE // (row * queries_at_once))
    for frames in zip(*(x.split(frames_at_once) for x in (query, key, value, out)), strict=True):
        q, k, v, o = frames
        for q_rows, o_rows in zip(q.split(queries_at_once, dim=1), o.split(queries_at_once, dim=1), strict=True):
            _wide_at_once(q_rows, k, v, o_rows)


def _wide_at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    frames, queries, channels = query.shape
    keys = key.shape[1]
    blocks = triton.cdiv(keys, _WIDE_KEYS)
    weights = torch.empty((frames, queries, blocks * _WIDE_KEYS), dtype=query.dtype, device=query.device)
    top = torch.empty((frames, blocks, queries), dtype=torch.float32, device=query.device)
    total = torch.empty_like(top)
    rows = triton.cdiv(queries, _QUERIES)
    weights_descriptor = _descriptor(weights, _QUERIES, _WIDE_KEYS)
    launch(
        _weights_kernel,
        (rows * blocks, frames),
        _descriptor(query, _QUERIES, 64),
        _descriptor(key, _WIDE_KEYS, 64),
        weights_descriptor,
        top,
        total,
        queries,
        keys,
        blocks,
        _scale(channels),
        CHANNELS=channels,
        STEP=64,
        QUERIES=_QUERIES,
        KEYS=_WIDE_KEYS,
        WHOLE=keys % _WIDE_KEYS == 0,
        num_warps=4,
    )
    launch(
        _values_kernel,
        (rows * (channels // 128), frames),
        weights_descriptor,
        _descriptor(value, _WIDE_KEYS, 128),
        top,
        total,
        out,
        queries,
        blocks,
        out.stride(0),
        CHANNELS=channels,
        PART=128,
        QUERIES=_QUERIES,
        KEYS=_WIDE_KEYS,
        num_warps=4,
    )
