"""TF32 is off where fp32 was asked for, and the program's choice comes back, whichever switches it used."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from wan_vae_parallel.runtime.arithmetic import _without_tf32

# In a process of its own: PyTorch refuses the older switches for good once the newer ones were used. Every combination
# of everything's, CUDA's and the two operations' own, none of which may show "tf32" within nor be another one after.
NEWER = """
import itertools, torch
from wan_vae_parallel.runtime.arithmetic import _without_tf32
switches = [torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul]
def shown():
    return [switch.fp32_precision for switch in switches]
for values in itertools.product(("none", "tf32", "ieee"), repeat=4):
    for switch, value in zip(switches, values):
        switch.fp32_precision = value
    before = shown()
    with _without_tf32():
        assert "tf32" not in shown()[2:], (values, shown())
    assert shown() == before, (values, shown())
    # And each is still what it was by itself, whatever the ones above it become.
    for i in (0, 1):
        switches[i].fp32_precision = "ieee" if values[i] != "ieee" else "tf32"
    above = switches[1].fp32_precision
    for switch, value in zip(switches[2:], values[2:]):
        assert switch.fp32_precision == (above if value == "none" else value), (values, shown())
print("fine")
"""
OLDER = """
import sys, torch
from wan_vae_parallel.runtime.arithmetic import _without_tf32
torch.set_float32_matmul_precision(sys.argv[1])
def shown():
    return (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32)
before = shown()
with _without_tf32():
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
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
        with _without_tf32():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)

    def fail():
        with _without_tf32():
            assert switches() == (False, False)
            thread.start()
            assert entered.wait(10)
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
def test_the_newer_switches_come_back_however_a_program_set_them():
    run(NEWER)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_comes_back(precision):
    run(OLDER, precision)
