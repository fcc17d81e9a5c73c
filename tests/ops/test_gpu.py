"""What a GPU's driver is asked, without one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from wan_vae_parallel.ops import gpu

CUDA = torch.device("cuda:1")


class Driver:
    """CUDA's, whose every device has a compute mode; or none, if it fails."""

    def __init__(self, mode):
        self.mode = mode
        self.asked = []

    def cuDeviceGet(self, number, ordinal):
        self.asked.append(ordinal)
        number._obj.value = 10 + ordinal
        return 0

    def cuDeviceGetAttribute(self, value, attribute, number):
        self.asked.append((attribute, number.value))
        if self.mode is None:
            return 1
        value._obj.value = self.mode
        return 0


@pytest.mark.parametrize(("mode", "takes"), [(0, True), (3, False), (2, False), (None, True)])
def test_whether_a_device_takes_several_processes(monkeypatch, mode, takes):
    driver = Driver(mode)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(gpu, "gpu", lambda _: None)
    gpu.takes_processes.cache_clear()
    assert gpu.takes_processes(CUDA) == takes
    assert driver.asked == [1, (20, 11)]


def test_without_a_driver_that_tells_it_does(monkeypatch):
    def missing(_name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(gpu, "gpu", lambda _: None)
    gpu.takes_processes.cache_clear()
    assert gpu.takes_processes(CUDA)


@pytest.fixture(autouse=True)
def _nothing_kept():
    yield
    gpu.takes_processes.cache_clear()
