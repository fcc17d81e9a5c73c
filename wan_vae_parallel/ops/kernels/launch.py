"""Launching kernels; and compiling all that a decode will launch at once, before it begins.

Compiling one takes seconds of one core, and a decode needs some thirty: one after the other they would take minutes.
A kernel that can't be compiled or launched raises `dispatch.KernelError`, for which operations have another way.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import torch

from ...cancel import LOOK_SECONDS, check_cancelled
from ...errors import is_out_of_memory
from ..dispatch import KernelError
from .progress import WORD_SECONDS, Progress
from .triton_version import COMPILED_TAKE_ALL

logger = logging.getLogger(__name__)

_MOST_THREADS = 16
# How Triton's errors begin: where in the kernel it is; and that its assembler says more.
_PLACE, _HEADING = re.compile(r"at \d+:\d+:"), re.compile(r"codegen error|raised SIG")

# Newer versions of Triton fuse no multiplications with additions unless told to: other bits.
_OPTIONS = {"enable_fp_fusion": True}

Job = Callable[[], Any]
# A kernel's name first.
Key = tuple[Hashable, ...]

_collected: contextvars.ContextVar[dict[Key, Job] | None] = contextvars.ContextVar("collected", default=None)
# Of this process: what could not be compiled or launched, and why.
_failed: dict[Key, str] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a kernel; within `collect` it is only noted which.

    Raises:
        KernelError: it can't be compiled or launched, now or before.
        Exception: there is no memory left.
    """
    _launch(kernel, grid, arguments, options)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """What a first launch returns: the compiled kernel."""
    options = _OPTIONS | options
    collected = _collected.get()
    if collected is None and not _failed:
        with _failing(kernel, arguments, options):
            return kernel[grid](*arguments, **options)
    key = _key(kernel, arguments, options)
    if key in _failed:
        raise KernelError(_failed[key])
    if collected is None:
        with _failing(kernel, arguments, options):
            return kernel[grid](*arguments, **options)
    if key not in collected:
        # Not the tensors themselves, which would all stay in memory.
        collected[key] = functools.partial(kernel.warmup, *map(_stand_in, arguments), grid=grid, **options)
    return None


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
        """Launches it as `launch` does."""
        # The compiler takes 16 bytes' alignment, which all tensors have that are not views, for granted.
        aligned = all(a.data_ptr() % 16 == 0 for a in arguments if isinstance(a, torch.Tensor))
        if not aligned or not COMPILED_TAKE_ALL or _collected.get() is not None:
            _launch(self._kernel, self._grid, arguments, self._options)
        elif self._compiled:
            with _failing(self._kernel, arguments, self._options):
                self._compiled(*arguments, *self._constants)
        else:
            compiled = _launch(self._kernel, self._grid, arguments, self._options)
            if compiled is not None:  # as it is in the interpreter
                self._constants = tuple(self._options[name] for name in self._kernel.arg_names[len(arguments) :])
                self._compiled = compiled[self._grid]


class _failing:
    """Within it a launch's errors become `KernelError`, and its like is not tried again; but no lack of memory."""

    __slots__ = ("_arguments", "_kernel", "_options")

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self._kernel, self._arguments, self._options = kernel, arguments, options

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not is_out_of_memory(error):
            key = _key(self._kernel, self._arguments, _OPTIONS | self._options)
            _failed[key] = reason(key[0], error)
            raise KernelError(_failed[key]) from error


def reason(name: str, error: Exception) -> str:
    """One line, not all that a compiler had to say.

    Triton shows the lines of the kernel, and what is wrong there below them or in the error's cause; of its assembler's
    output the lines that speak of an error say more than its own heading.
    """
    lines = _lines(error)
    if _PLACE.match(lines[0]):
        inner: BaseException = error
        while lines[-1] in ("^", lines[0]) and inner.__cause__ is not None:
            inner = inner.__cause__
            lines = [lines[0], *_lines(inner)]
        telling = " ".join(dict.fromkeys((lines[0], lines[-1].strip("^"))))
    else:
        grave = [line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)]
        telling = next((line for line in grave if not _HEADING.search(line)), (grave or lines)[0])
    return f"{name}: {type(error).__name__} {telling[:300]}".strip()


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def at_once() -> contextlib.AbstractContextManager[None]:
    """Within it launches are launches, also within `collect`."""
    return _collecting(None)


@contextlib.contextmanager
def _collecting(collected: dict[Key, Job] | None) -> Iterator[None]:
    token = _collected.set(collected)
    try:
        yield
    finally:
        _collected.reset(token)


def collect(run: Callable[[], None]) -> dict[Key, Job]:
    """What compiles each of the kernels that ``run()`` would launch; none is launched.

    Args:
        run: does everything but launch; what its tensors hold is never written.
    """
    collected: dict[Key, Job] = {}
    with _collecting(collected):
        run()
    return collected


def compile_all(run: Callable[[], None], device: torch.device) -> None:
    """Compiles what ``run()`` would launch, in parallel; kernels that are compiled already take no time.

    What can't be compiled is left for its launch to say.

    Args:
        run: as in `collect`.
        device: where it would be launched.

    Where the decode is cancelled meanwhile, what is being compiled just then goes on, but is not waited for.
    """
    collected = collect(run)
    started = time.monotonic()
    progress = Progress(f"compiling kernels for {device}, which is done once", len(collected))

    def compile_one(key: Key, job: Job) -> None:
        # Each thread has a current device of its own.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                job()
            except Exception as error:  # compilers fail in many ways
                if is_out_of_memory(error):
                    raise
                _failed[key] = reason(key[0], error)
        progress.add()

    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="wan-vae-parallel compile")
    try:
        with progress:
            pending = {pool.submit(compile_one, key, job) for key, job in collected.items()}
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


def _key(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Key:
    """What of a launch makes another kernel, and where."""
    plain = frozenset(getattr(kernel, "do_not_specialize", None) or ())
    names = (*kernel.arg_names[: len(arguments)],) if plain else ("",) * len(arguments)
    kinds = tuple(_kind(argument, name not in plain) for argument, name in zip(arguments, names, strict=True))
    device = next((str(a.device) for a in map(_tensor, arguments) if a is not None), "")
    return kernel.fn.__qualname__, kernel.fn.__module__, device, kinds, tuple(sorted(options.items()))


def _tensor(argument: Any) -> torch.Tensor | None:
    base = getattr(argument, "base", argument)
    return base if isinstance(base, torch.Tensor) else None


def _kind(argument: Any, specialized: bool) -> Hashable:
    """What of an argument makes another kernel."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, int):
        wide = abs(argument) >= 2**31
        return (argument == 1, argument % 16 == 0, wide) if specialized else wide
    return type(argument)


def _stand_in(argument: Any) -> Any:
    """Something small that makes the same kernel."""
    if isinstance(argument, torch.Tensor):
        small = torch.empty(32, dtype=argument.dtype, device=argument.device)
        return small if argument.data_ptr() % 16 == 0 else small[1:]
    if hasattr(argument, "block_shape"):
        return dataclasses.replace(argument, base=_stand_in(argument.base))
    return argument
