"""Arithmetic in the dtype that was asked for: neither autocast nor TF32 that the host program allowed."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ops.dispatch import KERNEL_DTYPES

_lock = threading.Lock()
_users = 0
_restore: list[Callable[[], None]] = []


@contextlib.contextmanager
def exact_arithmetic(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it ``device`` is the current one, and products in ``dtype`` are what it says.

    Autocast, which a host program may be in, would change dtypes between operations. TF32, which it may have allowed,
    rounds fp32 to 10 bits; PyTorch's switches for that are the whole process's, so they come back when the last thread
    that turned them off is done.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), contextlib.nullcontext() if dtype in KERNEL_DTYPES else _without_tf32():
            yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    global _users
    with _lock:
        if not _users:
            _restore.extend(_turn_off())
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            while not _users and _restore:
                _restore.pop()()


def _turn_off() -> list[Callable[[], None]]:
    """Forbids TF32; returns what brings the program's choice back."""
    found: list[Callable[[], None]] = []
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, Any]] = [(matmul, matmul), (cudnn, getattr(cudnn, "conv", None))]
    for older, newer in switches:
        if not hasattr(newer, "fp32_precision"):  # before PyTorch 2.9
            found.append(_turn_off_older(older))
        elif newer.fp32_precision == "tf32":
            found.append(_turn_off_newer(older, newer))
    return found


def _turn_off_older(switch: Any) -> Callable[[], None]:
    """With the switches that allow TF32 or not."""
    before = switch.allow_tf32
    if before and switch is torch.backends.cuda.matmul and torch.get_float32_matmul_precision() == "medium":
        switch.allow_tf32 = False
        return functools.partial(torch.set_float32_matmul_precision, "medium")
    switch.allow_tf32 = False
    return functools.partial(setattr, switch, "allow_tf32", before)


def _turn_off_newer(older: Any, newer: Any) -> Callable[[], None]:
    """With the switches that replace those: they may be set for an operation, for CUDA, or for everything."""
    own = _is_own(newer)
    if own:
        # The older ones still work as long as the program used no others, and it must be able to read them meanwhile.
        with contextlib.suppress(RuntimeError):
            back = _turn_off_older(older)
            if newer.fp32_precision != "tf32":
                return back
            back()
    newer.fp32_precision = "ieee"
    return functools.partial(setattr, newer, "fp32_precision", "tf32" if own else "none")


def _is_own(switch: Any) -> bool:
    """Whether an operation's TF32 is its own switch's, and not what CUDA's or everything's is set to."""
    cuda: Any = torch.backends.cudnn
    everything: Any = torch.backends
    if cuda.fp32_precision != "tf32":
        return True
    # A switch that has no value of its own shows the next one's: for a moment, those ask for more precision.
    before = everything.fp32_precision
    everything.fp32_precision = "ieee"
    cudas_own = cuda.fp32_precision
    cuda.fp32_precision = "ieee"
    own: bool = switch.fp32_precision == "tf32"
    cuda.fp32_precision = "tf32" if cudas_own == "tf32" else "none"
    everything.fp32_precision = before
    return own
