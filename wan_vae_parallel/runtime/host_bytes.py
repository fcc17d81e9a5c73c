"""Copies and comparisons of large tensors on the host, by a few threads of our own.

PyTorch wakes as many threads as there are cores for each of its operations; where these are many, or have other work,
that takes longer than the operation. NumPy and the C library let other threads run while they work.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

# Memory gives no more to more of them.
_THREADS = 4
# Less than this for each thread is done sooner by one.
_LEAST_BYTES = 2**20

# Of so many, such as the three colours of pixels with alpha, each is copied by itself.
_FEW_CHANNELS = 8

_Bits = np.ndarray[Any, Any]
# What holds the same bits, for NumPy knows no bf16.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy(into: torch.Tensor, values: torch.Tensor) -> None:
    """``into.copy_(values)``, of any strides; for tensors of one shape and dtype on the host faster."""
    here = into.device.type == values.device.type == "cpu"
    if here and into.shape == values.shape and into.dtype == values.dtype:
        _in_parts(np.copyto, _bits(into), _bits(values))
    else:
        into.copy_(values)


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype on the host hold the same bits: NaN equals NaN, 0 is not -0."""
    compare = _memcmp()
    if compare and one.is_contiguous() and other.is_contiguous():
        # As rows of values that lie one after the other.
        rows = (_bits(tensor).reshape(-1) for tensor in (one, other))
        found = _in_parts(lambda a, b: compare(a.ctypes.data, b.ctypes.data, a.nbytes) == 0, *rows)
    else:
        found = _in_parts(np.array_equal, _bits(one), _bits(other))
    return bool(np.all(found))


@functools.cache
def _memcmp() -> Callable[[int, int, int], int] | None:
    """The C library's, which reads as fast as memory gives, where NumPy also writes what it found for each value."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function


def _bits(tensor: torch.Tensor) -> _Bits:
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()


def _in_parts(work: Callable[[_Bits, _Bits], Any], one: _Bits, other: _Bits) -> list[Any]:
    """``work`` of all parts of two arrays of one shape."""
    count = min(_THREADS, one.nbytes // _LEAST_BYTES)
    axis = next((axis for axis, size in enumerate(one.shape) if size >= count), None)
    pairs = _long_runs(one, other)
    if count < 2 or axis is None or axis >= pairs[0][0].ndim:
        return [work(*pair) for pair in pairs]
    bounds = [one.shape[axis] * i // count for i in range(count + 1)]
    parts = [(slice(None),) * axis + (slice(*pair),) for pair in itertools.pairwise(bounds)]
    return list(_threads().map(lambda part: [work(a[part], b[part]) for a, b in pairs], parts))


def _long_runs(one: _Bits, other: _Bits) -> list[tuple[_Bits, _Bits]]:
    """Both, or channel by channel where these are some of more, since NumPy would go from one few to the next."""
    if one.ndim < 2 or one.shape[-1] > _FEW_CHANNELS:
        return [(one, other)]
    if all(array.strides[-2] == array.shape[-1] * array.strides[-1] for array in (one, other)):
        return [(one, other)]
    return [(one[..., i], other[..., i]) for i in range(one.shape[-1])]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="wan-vae-parallel bytes")


if hasattr(os, "register_at_fork"):  # threads stay behind
    os.register_at_fork(after_in_child=_threads.cache_clear)
