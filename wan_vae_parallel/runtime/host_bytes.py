"""Copies and comparisons of large tensors on the host, by a few threads of our own.

PyTorch wakes as many threads as there are cores for each of its operations; where these are many, or have other work,
that takes longer than the operation. NumPy lets other threads run while it works.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

# Memory gives no more to more of them.
_THREADS = 4
# Less than this for each thread is done sooner by one.
_LEAST_BYTES = 2**20

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
    return all(_in_parts(np.array_equal, _bits(one), _bits(other)))


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()


def _in_parts(
    work: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], Any],
    one: np.ndarray[Any, Any],
    other: np.ndarray[Any, Any],
) -> list[Any]:
    """``work`` of all parts of two arrays of one shape."""
    count = min(_THREADS, one.nbytes // _LEAST_BYTES)
    axis = next((axis for axis, size in enumerate(one.shape) if size >= count), None)
    if count < 2 or axis is None:
        return [work(one, other)]
    bounds = [one.shape[axis] * i // count for i in range(count + 1)]
    parts = [(slice(None),) * axis + (slice(*pair),) for pair in itertools.pairwise(bounds)]
    return list(_threads().map(lambda part: work(one[part], other[part]), parts))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="wan-vae-parallel bytes")


if hasattr(os, "register_at_fork"):  # threads stay behind
    os.register_at_fork(after_in_child=_threads.cache_clear)
