"""Launching kernels; and compiling all that a decode will launch at once, before it begins.

Compiling one takes seconds of one core, and a decode needs some thirty: one after the other they would take minutes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import torch

from ...cancel import LOOK_SECONDS, check_cancelled
from .progress import WORD_SECONDS, Progress

try:
    import triton
except ImportError:  # where no kernel runs either
    triton = None

logger = logging.getLogger(__name__)

_MOST_THREADS = 16

# Since Triton 3.4 compiled kernels take all arguments, constants too.
_COMPILED_TAKE_ALL = triton is None or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)

_collected: contextvars.ContextVar[dict[Hashable, Callable[[], Any]] | None] = contextvars.ContextVar(
    "collected", default=None
)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a kernel; within `compile_all` it is only noted which."""
    collected = _collected.get()
    if collected is None:
        kernel[grid](*arguments, **options)
        return
    key = (kernel.fn.__qualname__, kernel.fn.__module__, tuple(map(_kind, arguments)), tuple(sorted(options.items())))
    if key not in collected:
        # Not the tensors themselves, which would all stay in memory.
        collected[key] = functools.partial(kernel.warmup, *map(_stand_in, arguments), grid=grid, **options)


class Call:
    """A kernel's launches on one device that differ in their tensors alone, and in numbers it is not specialised for.

    From the second on they go straight to the compiled kernel: looking it up again takes longer than launching it.

    Args:
        kernel: what to launch.
        grid: of how many programs.
        options: its constants by name, and the compiler's options; its other arguments come with each launch, before
            these.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **options: Any) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._options = options
        self._constants: tuple[Any, ...] = ()
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> None:
        """Launches it; within `compile_all` it is only noted."""
        # The compiler takes 16 bytes' alignment, which all tensors have that are not views, for granted.
        aligned = all(a.data_ptr() % 16 == 0 for a in arguments if isinstance(a, torch.Tensor))
        if not aligned or not _COMPILED_TAKE_ALL or _collected.get() is not None:
            launch(self._kernel, self._grid, *arguments, **self._options)
        elif self._compiled:
            self._compiled(*arguments, *self._constants)
        else:
            compiled = self._kernel[self._grid](*arguments, **self._options)
            if compiled is not None:  # as it is in the interpreter
                self._constants = tuple(self._options[name] for name in self._kernel.arg_names[len(arguments) :])
                self._compiled = compiled[self._grid]


def compile_all(run: Callable[[], None], device: torch.device, *, forgiving: bool = False) -> None:
    """Compiles what ``run()`` would launch, in parallel; kernels that are compiled already take no time.

    Args:
        run: does everything but launch; what its tensors hold is never written.
        device: where it would be launched.
        forgiving: what can't be compiled is left for its launch to fail.

    Where the decode is cancelled meanwhile, what is being compiled just then goes on, but is not waited for.
    """
    collected: dict[Hashable, Callable[[], Any]] = {}
    token = _collected.set(collected)
    try:
        run()
    finally:
        _collected.reset(token)
    started = time.monotonic()
    progress = Progress(f"compiling kernels for {device}, which is done once", len(collected))

    def compile_one(job: Callable[[], Any]) -> None:
        # Each thread has a current device of its own.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                job()
            except Exception:  # compilers fail in many ways; the launch will say it again
                if not forgiving:
                    raise
        progress.add()

    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="wan-vae-parallel compile")
    try:
        with progress:
            pending = {pool.submit(compile_one, job) for job in collected.values()}
            while pending:
                done, pending = wait(pending, LOOK_SECONDS, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
                check_cancelled()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.monotonic() - started
    if seconds > WORD_SECONDS:
        logger.info(
            "compiled %d kernels for %s in %.0f s; they are kept for the next time", len(collected), device, seconds
        )


def _kind(argument: Any) -> Hashable:
    """What of an argument makes another kernel."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, abs(argument) >= 2**31
    return type(argument)


def _stand_in(argument: Any) -> Any:
    """Something small that makes the same kernel."""
    if isinstance(argument, torch.Tensor):
        small = torch.empty(32, dtype=argument.dtype, device=argument.device)
        return small if argument.data_ptr() % 16 == 0 else small[1:]
    if hasattr(argument, "block_shape"):
        return dataclasses.replace(argument, base=_stand_in(argument.base))
    return argument
