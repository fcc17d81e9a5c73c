"""Attention of one head over all positions of a frame, warp-specialised for Hopper, in Gluon (Triton 3.6 to 3.9).

T frames, N positions of this shard, M positions of the whole frame, C channels
Layout  as in attention.py.
Tile    128 queries a program: two warp groups of 64 compute, one warp loads. While one group takes the maximum and the
        exponentials, the other's products keep the tensor cores busy: 485-496 TFLOP/s at 384 channels on H200, where
        attention.py reaches 348. 64 keys a step instead of 32 spill registers: 360.
Bits    attention.py's up to 384 channels: the same blocks of keys, sums and roundings.
"""

# Kernels know no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dispatch import KernelError
from ..gpu import gpu
from .attention import frame_attention as frame_attention_of_all
from .attention import why_not
from .attention_tiles import keys_at_once, parts_of, scale_of
from .launch import at_once, launch
from .triton_version import VERSION

# Gluon is experimental, and what it calls things changes between versions. With 3.6 this was tried on GPUs; with others
# it compiles, and is tried where it is to run.
_TRIED = (3, 6)
_COMPILES = ((3, 6), (3, 7), (3, 8), (3, 9))
# As versions from 3.7 on and 3.6 call it.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# As 3.9 and those before call it.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_MAX_CHANNELS = 384
_GROUP_QUERIES = 64
# Blocks of keys, and of values, in flight.
_STAGES = 2
# Registers: a third of the file for each of the three warp groups at first; then the one that loads gives back.
_REGISTERS, _COMPUTING, _LOADING = 168, 240, 24
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _load(
    q_desc,
    k_desc,
    v_desc,
    buffers,
    frame,
    first,
    keys,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_buffers, k_buffers, v_buffers, q_full, k_full, k_free, v_full, v_free = buffers
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), PARTS * q_desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            at = [frame, first + group * QUERIES, part * PART]
            _copy(q_desc, at, q_full.index(group), q_buffers.index(group * PARTS + part))
    # A barrier that nothing has passed yet lets through who waits for phase 1: at first every buffer is free.
    phase = 1
    stage = 0
    for start in range(0, keys, KEYS):
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), PARTS * k_desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            at = [frame, start, part * PART]
            _copy(k_desc, at, k_full.index(stage), k_buffers.index(stage * PARTS + part))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), PARTS * v_desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            at = [frame, start, part * PART]
            _copy(v_desc, at, v_full.index(stage), v_buffers.index(stage * PARTS + part))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _attend(
    buffers,
    work,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    WHOLE: gl.constexpr,
):
    q_buffers, k_buffers, v_buffers, q_full, k_full, k_free, v_full, v_free = buffers
    out_ptr, frame, first, queries, keys, out_frame, scale = work
    dtype: gl.constexpr = q_buffers.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, PART, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    acc = ()
    for _part in gl.static_range(PARTS):
        acc = acc + (gl.zeros([QUERIES, PART], gl.float32, acc_layout),)
    top = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    total = gl.zeros([QUERIES], gl.float32, gl.SliceLayout(1, scores_layout))
    mbarrier.wait(q_full.index(GROUP), 0)
    phase = 0
    stage = 0
    for start in range(0, keys, KEYS):
        mbarrier.wait(k_full.index(stage), phase)
        scores = gl.zeros([QUERIES, KEYS], gl.float32, scores_layout)
        for part in gl.static_range(PARTS):
            q = q_buffers.index(GROUP * PARTS + part).reshape([QUERIES, PART])
            k = k_buffers.index(stage * PARTS + part).reshape([KEYS, PART])
            scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=part > 0, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        # One thread arrives for its group: only once all four warps are through.
        _barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        if not WHOLE:
            key = start + gl.arange(0, KEYS, gl.SliceLayout(0, scores_layout))
            scores = gl.where((key < keys)[None, :], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
        weights = gl.exp2(scores * scale - new_top[:, None])
        decay = gl.exp2(top - new_top)
        total = total * decay + gl.sum(weights, axis=1)
        top = new_top
        weights = gl.convert_layout(weights.to(dtype), weights_layout)
        decay = gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))
        scaled = ()
        for part in gl.static_range(PARTS):
            scaled = scaled + (acc[part] * decay[:, None],)
        mbarrier.wait(v_full.index(stage), phase)
        running = ()
        for part in gl.static_range(PARTS):
            v = v_buffers.index(stage * PARTS + part).reshape([KEYS, PART])
            running = running + (warpgroup_mma(weights, v, scaled[part], is_async=True),)
        acc = warpgroup_mma_wait(0, deps=running)
        if PARTS == 1:
            acc = (acc,)
        _barrier()
        mbarrier.arrive(v_free.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))
    rows = first + GROUP * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(1, acc_layout))
    columns = gl.arange(0, PART, gl.SliceLayout(0, acc_layout))
    offsets = rows[:, None] * (PARTS * PART) + columns[None, :]
    for part in gl.static_range(PARTS):
        out = (acc[part] * share[:, None]).to(dtype)
        gl.store(out_ptr + frame.to(gl.int64) * out_frame + offsets + part * PART, out, mask=(rows < queries)[:, None])


@gluon.jit
def _kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    queries,
    keys,
    out_frame,
    scale,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    WHOLE: gl.constexpr,
    COMPUTING: gl.constexpr,
    LOADING: gl.constexpr,
):
    frame = gl.program_id(1)
    first = gl.program_id(0) * (2 * QUERIES)
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS] + q_desc.block_shape, q_desc.layout)
    k_buffers = gl.allocate_shared_memory(k_desc.dtype, [STAGES * PARTS] + k_desc.block_shape, k_desc.layout)
    v_buffers = gl.allocate_shared_memory(v_desc.dtype, [STAGES * PARTS] + v_desc.block_shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Both groups must be through with a buffer.
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    buffers = (q_buffers, k_buffers, v_buffers, q_full, k_full, k_free, v_full, v_free)
    work = (out_ptr, frame, first, queries, keys, out_frame, scale)
    gl.warp_specialize(
        [
            (_attend, (buffers, work, 0, PARTS, PART, QUERIES, KEYS, STAGES, WHOLE)),
            (_attend, (buffers, work, 1, PARTS, PART, QUERIES, KEYS, STAGES, WHOLE)),
            (_load, (q_desc, k_desc, v_desc, buffers, frame, first, keys, PARTS, PART, QUERIES, KEYS, STAGES)),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `frame_attention` takes these, if it runs at all: see its ValueErrors, and `why_not_on`."""
    return _why_not(query, key, value) is None


@functools.cache
def why_not_on(device: torch.device) -> str:
    """What keeps this kernel from running on a Hopper GPU, if anything; a version that was not tried is tried now."""
    if VERSION not in _COMPILES:
        known = ", ".join(".".join(map(str, version)) for version in _COMPILES)
        return f"Hopper's own is written for Triton {known}, not {triton.__version__}"
    if VERSION == _TRIED:
        return ""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 200, 3 * _MAX_CHANNELS)
    inputs = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator).chunk(3, dim=2)
    try:
        with at_once():
            same = torch.equal(_attend_on_hopper(*inputs), frame_attention_of_all(*inputs))
    except KernelError as error:
        return f"Hopper's own does not run ({error})"
    return "" if same else f"Hopper's own gives other bits with Triton {triton.__version__}"


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each position looks at all positions of its own frame.

    Args:
        query: ``[T, N, C]`` on a Hopper GPU, C up to 384, and else as `attention.frame_attention` takes it.
        key: ``[T, M, C]``, likewise.
        value: ``[T, M, C]``, likewise.

    Returns:
        ``[T, N, C]``, contiguous.

    Raises:
        ValueError: the tensors are none of the above.
    """
    if reason := _why_not(query, key, value):
        raise ValueError(f"frame_attention {reason}; attention.frame_attention may take it")
    return _attend_on_hopper(query, key, value)


def _attend_on_hopper(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    frames, queries, channels = query.shape
    parts, part = parts_of(channels)
    keys = keys_at_once(channels)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch(
        _kernel,
        (triton.cdiv(queries, 2 * _GROUP_QUERIES), frames),
        _descriptor(query, _GROUP_QUERIES, part),
        _descriptor(key, keys, part),
        _descriptor(value, keys, part),
        out,
        queries,
        key.shape[1],
        out.stride(0),
        scale_of(channels),
        PARTS=parts,
        PART=part,
        QUERIES=_GROUP_QUERIES,
        KEYS=keys,
        STAGES=_STAGES,
        WHOLE=key.shape[1] % keys == 0,
        COMPUTING=_COMPUTING,
        LOADING=_LOADING,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return out


def _descriptor(x: torch.Tensor, positions: int, channels: int) -> TensorDescriptor:
    block = [1, positions, channels]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def _why_not(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    if reason := why_not(query, key, value):
        return reason
    if query.shape[-1] > _MAX_CHANNELS:
        return f"takes up to {_MAX_CHANNELS} channels, not {query.shape[-1]}"
    if not query.is_cuda or gpu(query.device).capability != (9, 0):
        return f"takes tensors on a Hopper GPU (compute capability 9.0), not on {query.device}"
    return None
