"""Compiling all kernels of a decode at once; with stand-ins for kernels, as Triton itself is not needed."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time
import weakref

import pytest
import torch

from wan_vae_parallel.cancel import cancellable
from wan_vae_parallel.ops.kernels import progress
from wan_vae_parallel.ops.kernels.launch import Call, compile_all, launch

CPU = torch.device("cpu")


class Kernel:
    """Remembers what it was launched and compiled with."""

    def __init__(self):
        self.launched, self.compiled, self.threads = [], [], set()
        self.barrier = None

    def fn(self):
        """What a jitted kernel wraps: its name tells kernels apart."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments, grid, **options):
        if self.barrier:
            self.barrier.wait()
        self.threads.add(threading.get_ident())
        self.compiled.append((grid, arguments, options))


class Compiling(Kernel):
    """As Triton's do: the first launch returns what later ones can be launched with."""

    arg_names = ("x", "count", "BLOCK", "SILU")

    def __init__(self):
        super().__init__()
        self.ready = []

    def __getitem__(self, grid):
        def first(*arguments, **options):
            self.launched.append((grid, arguments, options))
            return {grid: lambda *arguments: self.ready.append((grid, arguments))}

        return first


@dataclasses.dataclass
class Descriptor:
    base: torch.Tensor
    block_shape: list


def test_a_kernel_is_launched_at_once():
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, (2,), x, 7, BLOCK=16)
    assert kernel.launched == [((2,), (x, 7), {"BLOCK": 16})]
    assert kernel.compiled == []


def test_a_call_goes_straight_to_the_compiled_kernel_from_the_second_time_on():
    kernel, x, y = Compiling(), torch.zeros(64), torch.ones(64)
    call = Call(kernel, (2,), SILU=True, BLOCK=16, num_warps=4)
    call(x, 7)
    assert kernel.launched == [((2, 1, 1), (x, 7), {"SILU": True, "BLOCK": 16, "num_warps": 4})]
    call(y, 8)
    assert kernel.ready == [((2, 1, 1), (y, 8, 16, True))]  # constants in the kernel's own order
    assert len(kernel.launched) == 1
    call(y[1:], 7)  # compiled for tensors that are aligned
    assert len(kernel.launched) == 2
    compile_all(lambda: call(y, 7), CPU)
    assert len(kernel.compiled) == 1
    assert (len(kernel.launched), len(kernel.ready)) == (2, 1)


def test_a_call_that_compiles_nothing_is_launched_each_time():
    kernel, x = Kernel(), torch.zeros(64)
    call = Call(kernel, (2,), BLOCK=16)
    call(x)
    call(x)
    assert len(kernel.launched) == 2


def test_what_a_run_would_launch_is_compiled_once_a_kind_and_not_launched():
    kernel = Kernel()
    half, single = torch.zeros(64, dtype=torch.float16), torch.zeros(64)

    def run():
        for x in (half, half.clone(), single):
            launch(kernel, (1,), x, 3, BLOCK=16)
        launch(kernel, (1,), half, 32, BLOCK=16)  # a multiple of 16, which Triton makes another kernel of
        launch(kernel, (9,), half, 48, BLOCK=16)  # as the one before
        launch(kernel, (1,), half[1:], 3, BLOCK=16)  # not aligned
        launch(kernel, (1,), half, 3, BLOCK=32)
        launch(kernel, (1,), Descriptor(half, [1, 16]), 3, BLOCK=16)
        launch(kernel, (1,), Descriptor(half, [1, 32]), 3, BLOCK=16)
        launch(kernel, (1,), None, 3, BLOCK=16)

    compile_all(run, CPU)
    assert kernel.launched == []
    assert len(kernel.compiled) == 8
    launch(kernel, (1,), half)
    assert len(kernel.launched) == 1  # afterwards all is as before


def test_no_tensor_of_the_run_is_kept_for_compiling():
    kernel, seen = Kernel(), []

    def run():
        x = torch.zeros(2**16, dtype=torch.bfloat16)
        seen.append(weakref.ref(x))
        launch(kernel, (1,), x, Descriptor(x, [16]))
        del x
        gc.collect()
        assert seen[0]() is None

    compile_all(run, CPU)
    ((_, (x, descriptor), _),) = kernel.compiled
    assert x.dtype == descriptor.base.dtype == torch.bfloat16
    assert x.numel() < 100


def test_kernels_compile_side_by_side():
    kernel = Kernel()
    kernel.barrier = threading.Barrier(2, timeout=30)  # one alone would wait for ever

    def run():
        launch(kernel, (1,), BLOCK=1)
        launch(kernel, (1,), BLOCK=2)

    compile_all(run, CPU)
    assert len(kernel.threads) == 2


def test_a_run_that_fails_leaves_launching_as_it_was():
    kernel = Kernel()

    def run():
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        compile_all(run, CPU)
    launch(kernel, (1,))
    assert len(kernel.launched) == 1


def test_what_can_not_be_compiled_may_be_left_to_its_launch():
    class Broken(Kernel):
        def warmup(self, *_arguments, **_options):
            raise RuntimeError("out of registers")

    good, broken = Kernel(), Broken()

    def run():
        launch(broken, (1,), BLOCK=1)
        launch(good, (1,), BLOCK=2)

    compile_all(run, CPU, forgiving=True)
    assert len(good.compiled) == 1
    with pytest.raises(RuntimeError, match="out of registers"):
        compile_all(run, CPU)


def test_long_compiling_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(progress, "WORD_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    said = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            if "1 of 2" in record.getMessage():
                said.set()

    class Slow(Kernel):
        def warmup(self, *arguments, grid, **options):
            super().warmup(*arguments, grid=grid, **options)
            if options["BLOCK"] == 2:
                assert said.wait(30)

    kernel, handler = Slow(), Handler()

    def run():
        launch(kernel, (1,), BLOCK=1)
        launch(kernel, (1,), BLOCK=2)

    monkeypatch.setattr(progress.logger, "handlers", [handler])
    compile_all(run, CPU)
    assert any("compiling kernels for cpu, which is done once: 1 of 2" in r.getMessage() for r in caplog.records)
    assert not [thread for thread in threading.enumerate() if "progress" in thread.name]


def test_short_compiling_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    kernel = Kernel()
    compile_all(lambda: launch(kernel, (1,), BLOCK=1), CPU)
    assert len(kernel.compiled) == 1
    assert not caplog.records


class Cancelled(Exception):
    """What a user interface raises."""


@pytest.mark.parametrize("raised", [Cancelled, KeyboardInterrupt])
def test_a_cancelled_decode_does_not_wait_for_what_is_being_compiled(raised):
    kernels, begun, release = [Kernel() for _ in range(40)], threading.Event(), threading.Event()

    def warmup(*arguments, grid, **options):
        begun.set()
        assert release.wait(20)
        kernels[0].compiled.append((grid, arguments, options))

    for kernel in kernels:
        kernel.warmup = warmup

    def run():
        for number, kernel in enumerate(kernels):
            launch(kernel, (1,), torch.zeros(4), NUMBER=number)

    def check():
        if begun.is_set():
            raise raised

    started = time.monotonic()
    with pytest.raises(raised), cancellable(check):
        compile_all(run, CPU)
    assert time.monotonic() - started < 1
    release.set()
    # What nobody had begun with is not compiled for nobody.
    time.sleep(0.2)
    assert len(kernels[0].compiled) < len(kernels)


def test_a_kernel_that_can_not_be_compiled_ends_the_others():
    kernels = [Kernel() for _ in range(3)]
    kernels[1].warmup = _failing
    with pytest.raises(RuntimeError, match="no such instruction"):
        compile_all(lambda: [launch(kernel, (1,), torch.zeros(4), N=i) for i, kernel in enumerate(kernels)], CPU)
    compile_all(lambda: launch(kernels[1], (1,), torch.zeros(4)), CPU, forgiving=True)


def _failing(*_arguments, **_options):
    raise RuntimeError("no such instruction")
