"""TF32 is off where fp32 was asked for, and the program's choice comes back, whichever switches it used."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from wan_vae_parallel.runtime.arithmetic import _without_tf32

# In a process of its own: PyTorch refuses the older switches for good once the newer ones were used.
NEWER = """
import torch
from wan_vae_parallel.runtime.arithmetic import _without_tf32
for switch in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
    switch.fp32_precision = "tf32"
with _without_tf32():
    print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
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


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch")
def test_a_program_that_uses_the_newer_switches_gets_them_back():
    run = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, check=False)
    within, after = run.stdout.splitlines() or [run.stderr, ""]
    assert "tf32" not in within
    assert after == "tf32 tf32"
