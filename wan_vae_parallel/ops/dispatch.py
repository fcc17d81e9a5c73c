"""Whether the GPU's own kernels run here, and if not, why; said once."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sys
from collections.abc import Iterator

import torch

from .gpu import gpu

logger = logging.getLogger(__name__)

_torch_only = False

# What the kernels are written for: bf16 on tensor cores, asynchronous copies.
_LEAST_CAPABILITY = (8, 0)
# What the convolutions' kernels multiply.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_REPORT_TO = "https://github.com/wan-vae-parallel/wan-vae-parallel/issues"

# What keeps kernels from running on the devices where one was tried; nothing where they run.
_tried: dict[torch.device, str] = {}
# Devices on which a kernel of ours failed, so that PyTorch's does some of the work.
_failed_on: set[torch.device] = set()


class KernelError(Exception):
    """A kernel of ours can't be compiled or launched; the message says which, and why, in one line."""


class FallingBack:
    """Within it a kernel of ours works on a device; what it can't do is left to what follows, and said once.

    Only `KernelError` is: out of memory, or an argument that can't be, stays what it is.

    Args:
        x: what it works on.
        instead: what does its work, if not PyTorch.
    """

    __slots__ = ("_device", "_instead")

    def __init__(self, x: torch.Tensor, instead: str = "") -> None:
        self._device, self._instead = x.device, instead

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, KernelError):
            return False
        if not self._instead:
            _failed_on.add(self._device)
        say_failed(self._device, str(error), self._instead)
        return True


def say_failed(device: torch.device, error: str, instead: str = "") -> None:
    """Says, once, that a kernel of ours can't be compiled or launched on ``device``, and where to report it.

    Args:
        device: a GPU.
        error: which kernel, and why, in one line.
        instead: what does its work; by default PyTorch.
    """
    instead = instead or "PyTorch's own do its work, which is slower and whose last bits depend on chunks and devices"
    say_once(
        f"a kernel of ours does not run on {_described(device)}, so {instead}: {error}. Please report this line at "
        f"{_REPORT_TO}"
    )


def _described(device: torch.device) -> str:
    """A GPU and what its kernels are made with."""
    triton = sys.modules.get("triton")
    model = gpu(device)
    return (
        f"{model.name} (sm_{model.capability[0]}{model.capability[1]}, torch {torch.__version__}, Triton "
        f"{getattr(triton, '__version__', 'missing')})"
    )


def kernels_run(x: torch.Tensor) -> bool:
    """Whether Triton kernels can work on ``x``; a CUDA device that has none is told about once, with the reason."""
    return x.is_cuda and not _torch_only and _kernels_run_on(x.device)


def kernels_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions in ``dtype`` on ``device`` have Triton kernels."""
    return dtype in KERNEL_DTYPES and device.type == "cuda" and not _torch_only and _kernels_run_on(device)


def kernels_expected(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels do all of the work, for plans: without a word, and without a kernel that is tried.

    What a decode found out since counts, here or in a worker.
    """
    if device in _failed_on or dtype not in KERNEL_DTYPES or device.type != "cuda" or _torch_only or _why_not(device):
        return False
    if device in _tried:
        return not _tried[device]
    return _has_compiler()


def kernels_failed(device: torch.device) -> bool:
    """Whether a kernel of ours failed on ``device``, or none runs there, so that PyTorch's do its work."""
    return device in _failed_on or bool(_tried.get(device))


def note_failed(device: torch.device) -> None:
    """Has plans know that another process found `kernels_failed` there."""
    _failed_on.add(device)


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
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton is missing ({error}); pip install {package} brings it"
    except Exception as error:  # noqa: BLE001 (a broken installation fails in many ways)
        return f"Triton can't be loaded ({type(error).__name__}: {error}); install it anew"
    model = gpu(device)
    if model.capability < _LEAST_CAPABILITY:
        return (
            f"{model.name} has compute capability {_version(model.capability)}, and our kernels are written for "
            f"{_version(_LEAST_CAPABILITY)} and newer"
        )
    return ""


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def _has_compiler() -> bool:
    """Whether there is the C compiler that Triton wants on Linux; on Windows it has one of its own."""
    return sys.platform != "linux" or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _why_not_loaded() -> str:
    """What this version of Triton lacks that our kernels' modules name; nothing if they load."""
    try:
        from .kernels import conv, down_conv, frames, head_conv, norm, pixels, shortcut  # noqa: F401
    except Exception as error:  # noqa: BLE001 (whatever a version of Triton has renamed or forbids)
        import triton

        return (
            f"our kernels can't be loaded with Triton {triton.__version__} ({type(error).__name__}: {error}); install "
            f"the one that torch {torch.__version__} asks for"
        )
    return ""


def _kernels_run_on(device: torch.device) -> bool:
    reason = _tried.get(device)
    if reason is None:
        reason = _why_not(device)
        if not reason:
            reason = _why_not_loaded()
        if not reason:
            from .kernels import probe

            reason = probe.why_not(device)
        if reason:
            logger.warning("working on %s with PyTorch's own kernels, which is slower: %s", device, reason)
        _tried[device] = reason
    return not reason


@functools.cache
def say_once(text: str) -> None:
    """Logs ``text`` the first time."""
    logger.warning("%s", text)
