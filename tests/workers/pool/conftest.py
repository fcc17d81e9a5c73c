"""Two warm workers on the CPU, and what they must decode."""

from __future__ import annotations

import gc

import pytest
import torch

import wan_vae_parallel as wvp
from tests.processes import (
    nothing_left,
    shared_files,
    shared_maps,
)
from tests.workers.pool.common import CLOSE


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, 16, 4, 4, 3), generator=generator)


@pytest.fixture(scope="module")
def expected(path, latents):
    with wvp.load_vae(path, devices="cpu", chunk=1) as alone:
        return alone.decode(latents)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left(tmp_path_factory):
    """After all of these tests there is no process, port, shared memory or temporary file."""
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch, nothing_left(temporary):
        patch.setattr("tempfile.tempdir", str(temporary))
        yield
    gc.collect()
    assert shared_files() == 0
    assert shared_maps() == 0


@pytest.fixture(scope="module")
def warm(path):
    """One pool for the tests that leave it usable."""
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        yield vae


@pytest.fixture
def vae(warm, latents, expected):
    """The warm pool with living workers; after the test it must decode right, whatever was done to it."""
    if not warm.loaded:
        torch.testing.assert_close(warm.decode(latents), expected, **CLOSE)
    yield warm
    # Two steps tell of that; what comes later has no part in the first frames.
    torch.testing.assert_close(warm.decode(latents[:, :, :2]), expected[:, :5], **CLOSE)
    warm.chunk = 1
