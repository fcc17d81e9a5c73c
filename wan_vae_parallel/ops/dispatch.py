"""Whether the GPU's own kernels run here, and if not, why; said once."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)

_torch_only = False

# What the kernels are written for: bf16 on tensor cores, asynchronous copies.
_LEAST_CAPABILITY = (8, 0)
# What the convolutions' kernels multiply.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def kernels_run(x: torch.Tensor) -> bool:
    """Whether Triton kernels can work on ``x``; a CUDA device that has none is told about once, with the reason."""
    return x.is_cuda and not _torch_only and _kernels_run_on(x.device)


def kernels_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions in ``dtype`` on ``device`` have Triton kernels."""
    return dtype in KERNEL_DTYPES and device.type == "cuda" and not _torch_only and _kernels_run_on(device)


def kernels_expected(device: torch.device, dtype: torch.dtype) -> bool:
    """`kernels_multiply` for plans: without a word, and without a kernel that is tried on the device."""
    return dtype in KERNEL_DTYPES and device.type == "cuda" and not _torch_only and not _why_not(device)


@contextlib.contextmanager
def torch_kernels_only() -> Iterator[None]:
    """Within it PyTorch's own kernels do all the work: what ours are compared with."""
    global _torch_only
    _torch_only = True
    try:
        yield
    finally:
        _torch_only = False


@functools.cache
def _why_not(device: torch.device) -> str:
    """What is known to keep kernels from running on ``device``."""
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"Triton is missing ({error})"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than the kernels are written for"
    return ""


@functools.cache
def _kernels_run_on(device: torch.device) -> bool:
    reason = _why_not(device)
    if not reason:
        from .kernels import probe

        reason = probe.why_not(device)
    if reason:
        logger.warning("working on %s with PyTorch's own kernels, which is slower: %s", device, reason)
    return not reason


@functools.cache
def say_once(text: str) -> None:
    """Logs ``text`` the first time."""
    logger.warning("%s", text)
