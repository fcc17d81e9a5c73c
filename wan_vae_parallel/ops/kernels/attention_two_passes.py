"""Attention of one head over all positions of a frame in two kernels, for what one pass has no room for, in Triton.

T frames, N positions of this shard, M positions of the whole frame, C channels
Layout  as in attention.py; the weights ``[T, N, M]``, rounded up to whole blocks of keys, lie in the GPU's memory in
        between, some queries' at a time.
Tile    128 queries x 128 keys, and x 128 channels: 441 TFLOP/s at 1024 channels on H200 (torch's: 75). Where products
        take their sides from registers, a quarter of a block of keys at a time: whole and half blocks spill.
Bits    as in attention.py; the frame's maximum of each query is found first, and blocks change to it by powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..limits import WEIGHTS_AT_ONCE
from .attention_tiles import QUERIES, load_tile, parts_of, scale_of, source_of
from .launch import launch
from .products import use_descriptors
from .tiles import wide_products

# Keys that share a maximum.
_KEYS = 128


@triton.jit
def _first_row(tile, rows, ROWS: tl.constexpr, FEW: tl.constexpr, TMA: tl.constexpr):
    """Where a tile of so many rows begins: the last within the one before, so that loads need no look at each row.

    What both compute is the same bits.
    """
    return tile * ROWS if FEW or TMA else tl.minimum(tile * ROWS, rows - ROWS)


@triton.jit
def _weights_kernel(
    q_source,
    k_source,
    weights_target,
    top_ptr,
    total_ptr,
    queries,
    keys,
    blocks,
    q_frame,
    q_row: tl.constexpr,
    k_frame,
    k_row: tl.constexpr,
    scale,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    FEW: tl.constexpr,
    TMA: tl.constexpr,
):
    DTYPE: tl.constexpr = weights_target.dtype if TMA else weights_target.dtype.element_ty
    # Eight rows of tiles go together, so that the keys they share are still in L2.
    pid = tl.program_id(0)
    frame = tl.program_id(1)
    band = pid // (8 * blocks) * 8
    height = min(tl.cdiv(queries, QUERIES) - band, 8)
    row = band + pid % (8 * blocks) % height
    block = pid % (8 * blocks) // height
    first = _first_row(row, queries, QUERIES, FEW, TMA)
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    for channel in tl.range(0, CHANNELS, STEP, num_stages=3):
        q = load_tile(q_source, frame, first, channel, queries, q_frame, q_row, QUERIES, STEP, TMA, FEW)
        k = load_tile(k_source, frame, block * KEYS, channel, keys, k_frame, k_row, KEYS, STEP, TMA, not WHOLE)
        scores = tl.dot(q, k.T, scores)
    if not WHOLE:
        scores = tl.where((block * KEYS + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
    # A whole number, so that the second kernel's change from this maximum to the frame's is by a power of two: exact.
    top = tl.ceil(tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - top[:, None]).to(DTYPE)
    rows = first + tl.arange(0, QUERIES)
    at = (frame.to(tl.int64) * blocks + block) * queries + rows
    tl.store(top_ptr + at, top, mask=rows < queries)
    # Of the rounded weights: the largest is not 1 here, and a query with one key must get that key's value.
    tl.store(total_ptr + at, tl.sum(weights.to(tl.float32), axis=1), mask=rows < queries)
    if TMA:
        weights_target.store([frame, first, block * KEYS], weights[None])
    else:
        # Rows are whole blocks, up to the last.
        target = weights_target + frame.to(tl.int64) * queries * (blocks * KEYS) + block * KEYS
        places = rows[:, None] * (blocks * KEYS) + tl.arange(0, KEYS)[None, :]
        tl.store(target + places, weights, mask=(rows < queries)[:, None])


@triton.jit
def _values_kernel(
    weights_source,
    v_source,
    top_ptr,
    total_ptr,
    out_ptr,
    queries,
    keys,
    blocks,
    v_frame,
    v_row: tl.constexpr,
    out_frame,
    CHANNELS: tl.constexpr,
    PART: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    FEW: tl.constexpr,
    TMA: tl.constexpr,
):
    STEP: tl.constexpr = KEYS // STEPS
    PARTS: tl.constexpr = CHANNELS // PART
    frame = tl.program_id(1)
    first = _first_row(tl.program_id(0) // PARTS, queries, QUERIES, FEW, TMA)
    channel = tl.program_id(0) % PARTS * PART
    rows = first + tl.arange(0, QUERIES)
    mask = rows < queries
    at = frame.to(tl.int64) * blocks * queries + rows
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    for block in tl.range(0, blocks):
        top = tl.maximum(top, tl.load(top_ptr + at + block * queries, mask=mask, other=0.0))
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, PART], tl.float32)
    for step in tl.range(0, blocks * STEPS, num_stages=STAGES):
        block = step // STEPS
        share = tl.exp2(tl.load(top_ptr + at + block * queries, mask=mask, other=0.0) - top)
        if step % STEPS == 0:
            total += share * tl.load(total_ptr + at + block * queries, mask=mask, other=0.0)
        row_values = blocks * KEYS
        weights = load_tile(
            weights_source, frame, first, step * STEP, queries, queries.to(tl.int64) * row_values, row_values,
            QUERIES, STEP, TMA, FEW,
        )  # fmt: skip
        v = load_tile(v_source, frame, step * STEP, channel, keys, v_frame, v_row, STEP, PART, TMA, not WHOLE)
        acc = tl.dot(weights * share.to(weights.dtype)[:, None], v, acc)
    out = (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)
    offsets = rows[:, None] * CHANNELS + channel + tl.arange(0, PART)[None, :]
    tl.store(out_ptr + frame.to(tl.int64) * out_frame + offsets, out, mask=mask[:, None])


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """`attention.frame_attention` into ``out``, for what that takes."""
    queries, keys = query.shape[1], key.shape[1]
    row = triton.cdiv(keys, _KEYS) * _KEYS
    queries_at_once = min(queries, max(QUERIES, WEIGHTS_AT_ONCE // row // QUERIES * QUERIES))
    frames_at_once = max(1, WEIGHTS_AT_ONCE // (row * queries_at_once))
    for frames in zip(*(x.split(frames_at_once) for x in (query, key, value, out)), strict=True):
        q, k, v, o = frames
        for q_rows, o_rows in zip(q.split(queries_at_once, dim=1), o.split(queries_at_once, dim=1), strict=True):
            _attend_at_once(q_rows, k, v, o_rows)


def _attend_at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    frames, queries, channels = query.shape
    _, part = parts_of(channels)
    step = min(64, part)
    keys = key.shape[1]
    blocks = triton.cdiv(keys, _KEYS)
    weights = torch.empty((frames, queries, blocks * _KEYS), dtype=query.dtype, device=query.device)
    top = torch.empty((frames, blocks, queries), dtype=torch.float32, device=query.device)
    total = torch.empty_like(top)
    rows = triton.cdiv(queries, QUERIES)
    tma = use_descriptors(query)
    steps, stages = (1, 2) if wide_products(query.device) else (4, 4)
    weights_block = source_of(weights, QUERIES, _KEYS, tma)
    launch(
        _weights_kernel,
        (rows * blocks, frames),
        source_of(query, QUERIES, step, tma),
        source_of(key, _KEYS, step, tma),
        weights_block,
        top,
        total,
        queries,
        keys,
        blocks,
        *query.stride()[:2],
        *key.stride()[:2],
        scale_of(channels),
        CHANNELS=channels,
        STEP=step,
        QUERIES=QUERIES,
        KEYS=_KEYS,
        WHOLE=keys % _KEYS == 0,
        FEW=queries < QUERIES,
        TMA=tma,
        num_warps=4,
    )
    launch(
        _values_kernel,
        (rows * (channels // part), frames),
        source_of(weights, QUERIES, _KEYS // steps, tma),
        source_of(value, _KEYS // steps, part, tma),
        top,
        total,
        out,
        queries,
        keys,
        blocks,
        *value.stride()[:2],
        out.stride(0),
        CHANNELS=channels,
        PART=part,
        QUERIES=QUERIES,
        KEYS=_KEYS,
        STEPS=steps,
        STAGES=stages,
        WHOLE=keys % _KEYS == 0,
        FEW=queries < QUERIES,
        TMA=tma,
        num_warps=4,
    )
