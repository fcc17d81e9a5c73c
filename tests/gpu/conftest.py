"""Fixtures for tests on GPUs."""

import pytest

from tests.gpu.kernel_tests import leave_kernels_alone


@pytest.fixture
def _kernels_alone(monkeypatch):
    leave_kernels_alone(monkeypatch)
