"""Arithmetic in the dtype that was asked for, whatever the host program has allowed PyTorch to do with less.

PyTorch's switches for that are the whole process's. Those that lower a result are turned off while a step computes,
and come back when the last thread that turned them off is done:

| switch | what it would do |
| --- | --- |
| autocast | changes dtypes between operations |
| TF32 in cuBLAS and cuDNN | rounds fp32 to 10 bits |
| TF32 and bf16 in oneDNN, on CPUs that have them | rounds fp32 to 10 or 7 bits |
| fp16 accumulation, fp16 and bf16 reductions in cuBLAS and attention | rounds sums of products |
| NNPACK | takes Winograd's convolution where oneDNN is off |
| deterministic algorithms only | refuses cuBLAS, which lacks a setting of the environment |

`torch.set_flush_denormal`, cuDNN's ``benchmark`` and ``enabled`` and oneDNN's ``enabled`` choose between results that
are equally good, and stay.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ops.dispatch import KERNEL_DTYPES

# Brings one switch back.
Restore = Callable[[], None]
# Turns switches off and passes on what brings each back.
TurnOff = Callable[[Callable[[Restore], None]], None]

_LOWERED = ("tf32", "bf16")

_lock = threading.Lock()
_users = 0
_off: set[TurnOff] = set()
_restore: list[Restore] = []


@contextlib.contextmanager
def exact_arithmetic(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it ``device`` is the current one, and products in ``dtype`` are what it says."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            with turned_off(onednn_precision, nnpack):
                yield
            return
        # oneDNN's before CUDA's: PyTorch has a switch for both, which must not be seen half turned.
        groups = (reduced_sums,) if dtype in KERNEL_DTYPES else (onednn_precision, tf32)
        with torch.cuda.device(device), turned_off(*groups, deterministic_only):
            yield


@contextlib.contextmanager
def turned_off(*groups: TurnOff) -> Iterator[None]:
    """Within it, and as long as any other thread is within it, ``groups`` of switches are off."""
    global _users
    with _lock:
        _users += 1
    try:
        with _lock:
            for group in groups:
                if group not in _off:
                    _off.add(group)
                    group(_restore.append)
        yield
    finally:
        with _lock:
            _users -= 1
            # In one go: one group's older switch may be part of another one's.
            if not _users:
                while _restore:
                    _restore.pop()()
                _off.clear()


def onednn_precision(restore: Callable[[Restore], None]) -> None:
    """Turns off fewer bits for fp32 on the CPU."""
    onednn: Any = torch.backends.mkldnn
    if not hasattr(onednn, "matmul"):  # before PyTorch 2.9
        if torch.get_float32_matmul_precision() != "highest":
            restore(_turn_off_older(torch.backends.cuda.matmul))
        return
    for switch in (onednn.matmul, onednn.conv):
        if switch.fp32_precision in _LOWERED:
            restore(_turn_off_newer(switch, onednn))


def nnpack(restore: Callable[[Restore], None]) -> None:
    """Turns off NNPACK."""
    (before,) = torch.backends.nnpack.set_flags(False)
    restore(functools.partial(torch.backends.nnpack.set_flags, before))


def tf32(restore: Callable[[Restore], None]) -> None:
    """Turns off TF32 on GPUs."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, Any]] = [(matmul, matmul), (cudnn, getattr(cudnn, "conv", None))]
    for older, newer in switches:
        if not hasattr(newer, "fp32_precision"):  # before PyTorch 2.9
            restore(_turn_off_older(older))
        elif newer.fp32_precision in _LOWERED:
            restore(_turn_off_either(older, newer))


def reduced_sums(restore: Callable[[Restore], None]) -> None:
    """Turns off sums of fp16 and bf16 products in less than fp32, on GPUs."""
    matmul: Any = torch.backends.cuda.matmul
    for name in (
        "allow_fp16_accumulation",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ):
        if getattr(matmul, name, False):  # the first one is new
            setattr(matmul, name, False)
            restore(functools.partial(setattr, matmul, name, True))
    if torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        restore(functools.partial(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True))


def deterministic_only(restore: Callable[[Restore], None]) -> None:
    """Turns off errors for want of determinism; cuDNN, which has algorithms of both kinds, keeps to it."""
    cudnn: Any = torch.backends.cudnn
    if not torch.are_deterministic_algorithms_enabled():
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    restore(functools.partial(setattr, cudnn, "deterministic", cudnn.deterministic))
    cudnn.deterministic = True
    restore(functools.partial(torch.use_deterministic_algorithms, True, warn_only=warn_only))
    torch.use_deterministic_algorithms(False)


def _turn_off_older(switch: Any) -> Restore:
    """With the switches that allow TF32 or not."""
    before = switch.allow_tf32
    if before and switch is torch.backends.cuda.matmul and torch.get_float32_matmul_precision() == "medium":
        switch.allow_tf32 = False
        return functools.partial(torch.set_float32_matmul_precision, "medium")
    switch.allow_tf32 = False
    return functools.partial(setattr, switch, "allow_tf32", before)


def _turn_off_either(older: Any, newer: Any) -> Restore:
    """With the older switch if that is what was set, else with the newer one."""
    if _is_own(newer, torch.backends.cudnn):
        # The older ones still work as long as the program used no others, and it must be able to read them meanwhile.
        with contextlib.suppress(RuntimeError):
            back = _turn_off_older(older)
            if newer.fp32_precision not in _LOWERED:
                return back
            back()
    return _turn_off_newer(newer, torch.backends.cudnn)


def _turn_off_newer(switch: Any, backend: Any) -> Restore:
    """With the switches that replace those: they may be set for an operation, for a backend, or for everything."""
    before = switch.fp32_precision if _is_own(switch, backend) else "none"
    switch.fp32_precision = "ieee"
    return functools.partial(setattr, switch, "fp32_precision", before)


def _is_own(switch: Any, backend: Any) -> bool:
    """Whether an operation's precision is its own switch's, and not what its backend's or everything's is set to."""
    everything: Any = torch.backends
    shown = switch.fp32_precision
    if backend.fp32_precision != shown:
        return True
    # A switch that has no value of its own shows the next one's: for a moment, those ask for more precision.
    before = everything.fp32_precision
    everything.fp32_precision = "ieee"
    backends_own = backend.fp32_precision
    _set_backend(backend, "ieee")
    own: bool = switch.fp32_precision == shown
    _set_backend(backend, shown if backends_own == shown else "none")
    everything.fp32_precision = before
    return own


def _set_backend(backend: Any, precision: str) -> None:
    if backend is torch.backends.mkldnn:
        backend.set_flags(_fp32_precision=precision)  # setting its attribute sets everything's
    else:
        backend.fp32_precision = precision
