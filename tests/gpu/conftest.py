"""Fixtures for tests on GPUs."""

import pytest
import torch

from tests.gpu.device import CUDA, clear
from tests.gpu.kernel_tests import leave_kernels_alone
from tests.oracle import FAMILIES, oracle_vae
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.workers.meanwhile import MeanwhileRun


@pytest.fixture(autouse=True)
def _failures_are_errors(monkeypatch):
    """No test passes because PyTorch's kernels stood in for one of ours that fails."""
    monkeypatch.setattr(dispatch.FallingBack, "__exit__", lambda *_: False)


@pytest.fixture(autouse=True)
def _workers_decode(monkeypatch):
    """What is asked of several devices is done by all of them, in the first decode too; see `test_pool_gpu`."""
    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(lambda *_: False))


@pytest.fixture
def _kernels_alone(monkeypatch):
    leave_kernels_alone(monkeypatch)


@pytest.fixture
def clean_device():
    if torch.cuda.is_available():
        torch.cuda.init()  # resetting statistics does not do it
        clear()
        torch.cuda.reset_peak_memory_stats(CUDA)
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
        clear()


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    """On the CPU in fp32; tests that need it on the device take a copy of their own."""
    return oracle_vae(family, width=96)


@pytest.fixture(scope="module")
def wan21():
    return oracle_vae("wan2.1", width=96)
