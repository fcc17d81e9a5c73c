"""fp32 that is fp32, whatever the host program allowed."""

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

    TF32, which a host program may have allowed, rounds fp32 to 10 bits. PyTorch's switches are the whole process's, so
    they come back when the last thread that turned them off is done.
    """
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
    for module, newer in ((matmul, matmul), (cudnn, getattr(cudnn, "conv", None))):
        switch: Any = module
        name: str = "allow_tf32"
        exact: Any = False
        try:
            before = switch.allow_tf32
        except RuntimeError:  # the program uses the switches that replace these, and PyTorch lets nobody use both
            switch, name, exact = newer, "fp32_precision", "ieee"
            before = switch.fp32_precision
        setattr(switch, name, exact)
        found.append(functools.partial(setattr, switch, name, before))
    return found
