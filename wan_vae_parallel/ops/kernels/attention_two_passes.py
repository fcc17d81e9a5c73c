"""Attention of one head over all positions of a frame in three kernels, for what one pass has no room for, in Triton.

T frames, N positions of this shard, M positions of the whole frame, C channels
Layout  as in attention.py; weights, each 128 queries x 128 keys in one piece, lie in the GPU's memory in between, some
        queries' at a time.
Tile    128 queries x 128 keys, and x 128 channels. Where products take their sides from registers, half a block of keys
        at a time, or a quarter if tiles come through descriptors: more spills.
Bits    as in attention.py; of each query the frame's maximum is known before the values are added up, and blocks change
        to it by powers of two.
"""

# Kernels know no starred expressions.
# ruff: noqa: RUF005

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
# Queries whose maxima and totals a program looks at.
_LANES = 32


@triton.jit
def _first_row(tile, rows, ROWS: tl.constexpr, FEW: tl.constexpr, TMA: tl.constexpr):
    """Where a frame's tile of so many rows begins: the last within the one before, so that loads need no look at rows.

    What both compute is the same bits.
    """
    return tile * ROWS if FEW or TMA else tl.minimum(tile * ROWS, rows - ROWS)


@triton.jit(do_not_specialize=["start", "tiles", "rows"])
def _weights_kernel(
    q_source,
    k_source,
    weights_target,
    top_ptr,
    total_ptr,
    start,
    tiles,
    rows,
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
    # Eight tiles' queries go together, so that the keys they share are still in L2.
    pid = tl.program_id(0)
    band = pid // (8 * blocks) * 8
    height = min(tiles - band, 8)
    tile = band + pid % (8 * blocks) % height
    block = pid % (8 * blocks) // height
    frame = (start + tile) // rows
    first = _first_row((start + tile) % rows, queries, QUERIES, FEW, TMA)
    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    for channel in tl.range(0, CHANNELS, STEP, num_stages=3):
        q = load_tile(q_source, frame, first, channel, queries, q_frame, q_row, QUERIES, STEP, TMA, FEW)
        k = load_tile(k_source, frame, block * KEYS, channel, keys, k_frame, k_row, KEYS, STEP, TMA, not WHOLE)
        scores = tl.dot(q, k.T, scores)
    if not WHOLE:
        scores = tl.where((block * KEYS + tl.arange(0, KEYS) < keys)[None, :], scores, float("-inf"))
    # A whole number, so that the change from this maximum to the frame's is by a power of two: exact.
    top = tl.ceil(tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - top[:, None]).to(DTYPE)
    place = tile * blocks + block
    tl.store(top_ptr + place * QUERIES + tl.arange(0, QUERIES), top)
    # Of the rounded weights: the largest is not 1 here, and a query with one key must get that key's value.
    tl.store(total_ptr + place * QUERIES + tl.arange(0, QUERIES), tl.sum(weights.to(tl.float32), axis=1))
    if TMA:
        weights_target.store([place, 0, 0], weights[None])
    else:
        places = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
        tl.store(weights_target + place.to(tl.int64) * (QUERIES * KEYS) + places, weights)


@triton.jit
def _shares_kernel(top_ptr, total_ptr, blocks, QUERIES: tl.constexpr, LANES: tl.constexpr, AT_ONCE: tl.constexpr):
    """Each block's maximum becomes its share in the frame's, and the first block's total the inverse of the frame's."""
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    at = tl.program_id(0) * blocks * QUERIES + lane
    top = tl.full([LANES], float("-inf"), tl.float32)
    for first in tl.range(0, blocks, AT_ONCE):
        for block in tl.static_range(AT_ONCE):
            top = tl.maximum(top, tl.load(top_ptr + at + min(first + block, blocks - 1) * QUERIES))
    total = tl.zeros([LANES], tl.float32)
    for first in tl.range(0, blocks, AT_ONCE):
        # All are asked for before the first is waited for.
        tops = ()
        totals = ()
        for block in tl.static_range(AT_ONCE):
            there = first + block < blocks
            tops = tops + (tl.load(top_ptr + at + (first + block) * QUERIES, mask=there, other=float("-inf")),)
            totals = totals + (tl.load(total_ptr + at + (first + block) * QUERIES, mask=there, other=0.0),)
        for block in tl.static_range(AT_ONCE):
            share = tl.exp2(tops[block] - top)
            total += share * totals[block]
            tl.store(top_ptr + at + (first + block) * QUERIES, share, mask=first + block < blocks)
    tl.store(total_ptr + at, 1.0 / total)


@triton.jit(do_not_specialize=["start", "rows"])
def _values_kernel(
    weights_source,
    v_source,
    share_ptr,
    total_ptr,
    out_ptr,
    start,
    rows,
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
    tile = tl.program_id(0) // PARTS
    channel = tl.program_id(0) % PARTS * PART
    frame = (start + tile) // rows
    first = _first_row((start + tile) % rows, queries, QUERIES, FEW, TMA)
    at = tile * blocks * QUERIES + tl.arange(0, QUERIES)
    acc = tl.zeros([QUERIES, PART], tl.float32)
    for step in tl.range(0, blocks * STEPS, num_stages=STAGES):
        share = tl.load(share_ptr + at + step // STEPS * QUERIES)
        weights = load_tile(
            weights_source, tile * blocks + step // STEPS, 0, step % STEPS * STEP, QUERIES, QUERIES * KEYS, KEYS,
            QUERIES, STEP, TMA, False,
        )  # fmt: skip
        v = load_tile(v_source, frame, step * STEP, channel, keys, v_frame, v_row, STEP, PART, TMA, not WHOLE)
        acc = tl.dot(weights * share.to(weights.dtype)[:, None], v, acc)
    out = (acc * tl.load(total_ptr + at)[:, None]).to(out_ptr.dtype.element_ty)
    row = first + tl.arange(0, QUERIES)
    offsets = row[:, None] * CHANNELS + channel + tl.arange(0, PART)[None, :]
    tl.store(out_ptr + frame.to(tl.int64) * out_frame + offsets, out, mask=(row < queries)[:, None])


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """`attention.frame_attention` into ``out``, for what that takes."""
    tiles = query.shape[0] * triton.cdiv(query.shape[1], QUERIES)
    blocks = triton.cdiv(key.shape[1], _KEYS)
    goes = triton.cdiv(tiles, max(1, WEIGHTS_AT_ONCE // (blocks * _KEYS * QUERIES)))
    at_once = triton.cdiv(tiles, goes)
    weights = torch.empty((at_once * blocks, QUERIES, _KEYS), dtype=query.dtype, device=query.device)
    tops = torch.empty((at_once, blocks, QUERIES), dtype=torch.float32, device=query.device)
    totals = torch.empty_like(tops)
    for start in range(0, tiles, at_once):
        _attend_at_once(query, key, value, out, weights, tops, totals, start, min(at_once, tiles - start))


def _attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    weights: torch.Tensor,
    tops: torch.Tensor,
    totals: torch.Tensor,
    start: int,
    tiles: int,
) -> None:
    """So many tiles of queries from ``start`` on, counted through all frames."""
    _, queries, channels = query.shape
    _, part = parts_of(channels)
    step = min(64, part)
    keys, blocks = key.shape[1], tops.shape[1]
    rows = triton.cdiv(queries, QUERIES)
    tma = use_descriptors(query)
    steps, stages = (1, 2) if wide_products(query.device) else (4, 4) if tma else (2, 3)
    launch(
        _weights_kernel,
        (tiles * blocks,),
        source_of(query, QUERIES, step, tma),
        source_of(key, _KEYS, step, tma),
        source_of(weights, QUERIES, _KEYS, tma),
        tops,
        totals,
        start,
        tiles,
        rows,
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
        _shares_kernel,
        (tiles, QUERIES // _LANES),
        tops,
        totals,
        blocks,
        QUERIES=QUERIES,
        LANES=_LANES,
        AT_ONCE=8,
        num_warps=1,
    )
    launch(
        _values_kernel,
        (tiles * (channels // part),),
        source_of(weights, QUERIES, _KEYS // steps, tma),
        source_of(value, _KEYS // steps, part, tma),
        tops,
        totals,
        out,
        start,
        rows,
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
