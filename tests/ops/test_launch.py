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
from wan_vae_parallel.ops.dispatch import KernelError
from wan_vae_parallel.ops.kernels import launch as launching
from wan_vae_parallel.ops.kernels import progress
from wan_vae_parallel.ops.kernels.launch import Call, compile_all, launch

CPU = torch.device("cpu")
# What all are compiled with.
FUSED = {"enable_fp_fusion": True}


@pytest.fixture(autouse=True)
def _nothing_failed(monkeypatch):
    monkeypatch.setattr(launching, "_failed", {})


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
    assert kernel.launched == [((2,), (x, 7), {"BLOCK": 16, **FUSED})]
    assert kernel.compiled == []


def test_a_call_goes_straight_to_the_compiled_kernel_from_the_second_time_on(monkeypatch):
    monkeypatch.setattr(launching, "COMPILED_TAKE_ALL", True)
    kernel, x, y = Compiling(), torch.zeros(64), torch.ones(64)
    call = Call(kernel, (2,), SILU=True, BLOCK=16, num_warps=4)
    call(x, 7)
    assert kernel.launched == [((2, 1, 1), (x, 7), {"SILU": True, "BLOCK": 16, "num_warps": 4, **FUSED})]
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


class Broken(Compiling):
    """One that fails to compile, or to be launched, or only from the second launch on."""

    def __init__(self, error, *, when):
        super().__init__()
        self.error, self.when, self.tried = error, when, 0

    def _fail(self):
        self.tried += 1
        raise self.error

    def warmup(self, *arguments, grid, **options):
        if self.when == "compiled":
            self._fail()
        super().warmup(*arguments, grid=grid, **options)

    def __getitem__(self, grid):
        if self.when == "launched again":
            return lambda *_arguments, **_options: {grid: lambda *_: self._fail()}
        return lambda *_arguments, **_options: self._fail()


def test_what_can_not_be_compiled_is_left_to_its_launch_which_does_not_try_again():
    good, broken = Kernel(), Broken(RuntimeError("ptxas fatal: out of registers"), when="compiled")

    def run():
        launch(broken, (1,), torch.zeros(4), BLOCK=1)
        launch(good, (1,), torch.zeros(4), BLOCK=2)

    compile_all(run, CPU)
    assert len(good.compiled) == 1
    for _ in range(2):
        with pytest.raises(KernelError, match=r"fn: RuntimeError ptxas fatal: out of registers"):
            launch(broken, (1,), torch.zeros(4), BLOCK=1)
    assert broken.tried == 1
    launch(good, (1,), torch.zeros(4), BLOCK=2)  # others go on
    assert len(good.launched) == 1
    # A second decode's compiling does not begin with it again.
    with pytest.raises(KernelError):
        compile_all(lambda: launch(broken, (1,), torch.zeros(4), BLOCK=1), CPU)


@pytest.mark.parametrize("when", ["launched", "launched again"])
@pytest.mark.parametrize("call", [False, True])
def test_a_kernel_that_fails_says_so_in_one_line_and_its_like_is_not_tried_again(monkeypatch, when, call):
    if when == "launched again" and not call:
        pytest.skip("each launch is looked up anew")
    monkeypatch.setattr(launching, "COMPILED_TAKE_ALL", True)
    text = "make_cubin\n\nptxas error: too much shared data\nand many more lines"
    broken, x = Broken(RuntimeError(text), when=when), torch.zeros(64)
    direct = Call(broken, (1,), SILU=True, BLOCK=16)
    if when == "launched again":
        direct(x, 7)
    for _ in range(2):
        with pytest.raises(KernelError) as raised:
            direct(x, 7) if call else launch(broken, (1,), x, 7, SILU=True, BLOCK=16)
        assert str(raised.value) == "Kernel.fn: RuntimeError ptxas error: too much shared data"
    assert broken.tried == (1 if when == "launched" else 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), RuntimeError("Triton Error [CUDA]: out of memory")])
@pytest.mark.parametrize("when", ["compiled", "launched"])
def test_out_of_memory_stays_what_it_is_and_is_tried_again(error, when):
    broken, x = Broken(error, when=when), torch.zeros(4)

    def run():
        launch(broken, (1,), x)

    for tried in (1, 2):
        with pytest.raises(type(error), match="out"):
            compile_all(run, CPU) if when == "compiled" else run()
        assert broken.tried == tried


@pytest.mark.parametrize("specialized", [True, False])
def test_numbers_that_a_kernel_is_not_specialised_for_make_no_other_kernel(specialized):
    kernel = Compiling()
    kernel.do_not_specialize = [] if specialized else ["count"]

    def run():
        for count in (1, 3, 32, 2**31):
            launch(kernel, (1,), torch.zeros(64), count, BLOCK=16)

    compile_all(run, CPU)
    assert len(kernel.compiled) == (4 if specialized else 2)  # of 32 or of 64 bits


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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # As Triton's compiler, its assembler and its passes say it.
        (
            "at 74:15:\n        a = tl.load(error_ptr)\n               ^\nK should be >= 16",
            "_a_kernel: RuntimeError at 74:15: K should be >= 16",
        ),
        (
            "Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas /tmp/x.ptx, line 5; error   : Feature 'tcgen05' "
            "requires .target sm_100a\nptxas fatal   : Ptx assembly aborted due to errors\nRepro command: ptxas x",
            "_a_kernel: RuntimeError ptxas /tmp/x.ptx, line 5; error   : Feature 'tcgen05' requires .target sm_100a",
        ),
        ("PassManager::run failed", "_a_kernel: RuntimeError PassManager::run failed"),
        ("first\nsecond", "_a_kernel: RuntimeError first"),
        ("", "_a_kernel: RuntimeError RuntimeError"),
        ("at 1:2:", "_a_kernel: RuntimeError at 1:2:"),
        ("an error " + 500 * "x", "_a_kernel: RuntimeError an error " + 291 * "x"),
    ],
)
def test_a_failure_is_told_in_the_line_that_says_why(text, line):
    assert launching.reason("_a_kernel", RuntimeError(text)) == line


def test_a_failures_cause_is_told_where_it_is_not_in_the_text():
    def raised(text, cause):
        try:
            raise RuntimeError(text) from cause
        except RuntimeError as error:
            return error

    places = ["at 7:1:\n    f(x)\n    ^", "at 2:9:\n    tl.dot(x, y)\n    ^"]
    inner = raised(places[1], AssertionError("first\nK should be >= 16"))
    assert launching.reason("_a_kernel", raised(places[0], inner)) == (
        "_a_kernel: RuntimeError at 7:1: K should be >= 16"
    )
    assert (
        launching.reason("_a_kernel", raised(places[0], ValueError())) == "_a_kernel: RuntimeError at 7:1: ValueError"
    )
    assert launching.reason("_a_kernel", raised(places[0], None)) == "_a_kernel: RuntimeError at 7:1:"
