"""What lowers precision is off where it was not asked for, and the program's choice comes back, whatever it used."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import pytest
import torch

from tests.oracle import load, oracle_vae, random_latents
from wan_vae_parallel.runtime import arithmetic
from wan_vae_parallel.runtime.arithmetic import exact_arithmetic, tf32, turned_off

CPU = torch.device("cpu")
# In processes of their own: PyTorch refuses the older switches for good once the newer ones were used. Every
# combination of everything's, the backend's and the two operations' own, none of which may show less than fp32 within
# nor be another one after.
NEWER = """
import functools, itertools, sys, torch
from wan_vae_parallel.runtime import arithmetic
if sys.argv[1] == "cuda":
    backend, within = torch.backends.cudnn, functools.partial(arithmetic.turned_off, arithmetic.tf32)
    operations, lowered = [torch.backends.cudnn.conv, torch.backends.cuda.matmul], ["tf32"]
else:
    backend = torch.backends.mkldnn
    within = functools.partial(arithmetic.exact_arithmetic, torch.device("cpu"), torch.float32)
    operations, lowered = [backend.conv, backend.matmul], ["tf32", "bf16"]
setters = [functools.partial(setattr, torch.backends, "fp32_precision"),
           functools.partial(arithmetic._set_backend, backend),
           *(functools.partial(setattr, operation, "fp32_precision") for operation in operations)]
def shown():
    return [switch.fp32_precision for switch in (torch.backends, backend, *operations)]
for values in itertools.product(("none", "ieee", *lowered), repeat=4):
    for put, value in zip(setters, values):
        put(value)
    before = shown()
    with within():
        assert not set(lowered) & set(shown()[2:]), (values, shown())
    assert shown() == before, (values, shown())
    # And each is still what it was by itself, whatever the ones above it become.
    for i in (0, 1):
        setters[i]("ieee" if values[i] != "ieee" else "tf32")
    above = shown()[1]
    for seen, value in zip(shown()[2:], values[2:]):
        assert seen == (above if value == "none" else value), (values, shown())
print("fine")
"""
OLDER = """
import contextlib, sys, torch
from wan_vae_parallel.runtime.arithmetic import exact_arithmetic, onednn_precision, tf32, turned_off
torch.set_float32_matmul_precision(sys.argv[1])
def shown():
    return (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32, getattr(getattr(torch.backends.mkldnn, "matmul", None),
            "fp32_precision", None))
def onednn_is_exact():
    if hasattr(torch.backends.mkldnn, "matmul"):
        return torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() == "highest"
before = shown()
cpu = exact_arithmetic(torch.device("cpu"), torch.float32)
gpu = turned_off(onednn_precision, tf32)
with cpu:
    assert onednn_is_exact()
    assert torch.get_float32_matmul_precision()  # a program may read it meanwhile
assert shown() == before, shown()
with turned_off(onednn_precision, tf32):
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
assert shown() == before, shown()
# One thread on the CPU and one on a GPU, which is done first.
with exact_arithmetic(torch.device("cpu"), torch.float32):
    with gpu:
        pass
    assert onednn_is_exact()
assert shown() == before, shown()
print("fine")
"""


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def _allowed():
    before = switches()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_allowed")
def test_tf32_is_off_until_the_last_thread_is_done_however_they_end():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with turned_off(tf32):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)

    def fail():
        with turned_off(tf32):
            assert switches() == (False, False)
            thread.start()
            assert entered.wait(60)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert switches() == (False, False)  # the other one still computes
    leave.set()
    thread.join()
    assert switches() == (True, True)


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch")
@pytest.mark.parametrize("backend", ["cuda", "onednn"])
def test_the_newer_switches_come_back_however_a_program_set_them(backend):
    run(NEWER, backend)


@pytest.mark.parametrize(
    "precision", ["high", *(pytest.param(one, marks=pytest.mark.slow) for one in ("highest", "medium"))]
)
def test_the_precision_of_products_comes_back(precision):
    run(OLDER, precision)


def reductions():
    matmul = torch.backends.cuda.matmul
    return (
        getattr(matmul, "allow_fp16_accumulation", None),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    )


@pytest.mark.parametrize("allowed", [False, True])
def test_sums_in_fewer_bits_are_off_and_come_back(allowed):
    matmul, before = torch.backends.cuda.matmul, reductions()

    def allow(accumulation, fp16, bf16, attention):
        if accumulation is not None:
            matmul.allow_fp16_accumulation = accumulation
        matmul.allow_fp16_reduced_precision_reduction = fp16
        matmul.allow_bf16_reduced_precision_reduction = bf16
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention)

    try:
        allow(None if before[0] is None else allowed, allowed, allowed, allowed)
        chosen = reductions()
        with turned_off(arithmetic.reduced_sums):
            assert not any(reductions())
        assert reductions() == chosen
    finally:
        allow(*before)


@pytest.mark.parametrize("warn_only", [False, True])
def test_what_must_be_deterministic_is_no_error_and_comes_back(warn_only):
    def chosen():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
        )

    before = chosen()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with turned_off(arithmetic.deterministic_only):
            assert chosen() == (False, False, True)
        assert chosen() == (True, warn_only, before[2])
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_nnpack_is_off_and_comes_back():
    for chosen in (True, False):
        (before,) = torch.backends.nnpack.set_flags(chosen)
        with exact_arithmetic(CPU, torch.float32):
            assert not torch._C._get_nnpack_enabled()
        assert torch._C._get_nnpack_enabled() == chosen
        torch.backends.nnpack.set_flags(before)


def test_a_switch_that_can_not_be_turned_leaves_the_others_as_they_were():
    def refuse(_restore):
        raise RuntimeError("no such switch")

    before = torch._C._get_nnpack_enabled()
    with pytest.raises(RuntimeError, match="no such switch"), turned_off(arithmetic.nnpack, refuse):
        pytest.fail("not entered")
    assert torch._C._get_nnpack_enabled() == before
    assert (arithmetic._users, arithmetic._restore, arithmetic._off) == (0, [], set())


# What a program may have chosen for itself, and how it takes that back.


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


CHOICES = {
    "bf16 by default": lambda: _default_dtype(torch.bfloat16),
    "fp64 by default": lambda: _default_dtype(torch.float64),
    "deterministic": _deterministic,
    "medium": _medium,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_programs_choice_changes_no_bit_of_a_decode(choice, loaded):
    latents = random_latents("wan2.1", frames=4, rows=2, columns=3)
    with load(oracle_vae("wan2.1"), chunk=2) as vae:
        expected = vae.decode(latents)
        if not loaded:
            vae.release()
        with CHOICES[choice]():
            assert torch.equal(vae.decode(latents), expected)
            assert torch.equal(torch.cat(list(vae.decode_stream(latents)), dim=1), expected)


def test_products_are_computed_with_the_switches_off(monkeypatch):
    # On CPUs without bf16 a decode's bits would not tell.
    seen, real = [], torch.nn.functional.linear

    def linear(*arguments):
        shown = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
        seen.append(torch.get_float32_matmul_precision() if shown is None else shown)
        return real(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with load(oracle_vae("wan2.1"), chunk=2) as vae, _medium():
        vae.decode(random_latents("wan2.1", frames=2, rows=2, columns=3))
    assert set(seen) & {"ieee", "none", "highest"} == set(seen) != set()


def test_flags_without_oneDNN_come_close():
    # A program may have turned the library off: its own choice of speed.
    latents = random_latents("wan2.1", frames=2, rows=2, columns=3)
    with load(oracle_vae("wan2.1"), chunk=1) as vae:
        expected = vae.decode(latents)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(vae.decode(latents), expected, atol=1e-5, rtol=0)
