"""Fixtures for the tests of workers and groups."""

from __future__ import annotations

import pytest

import wan_vae_parallel as wvp


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small Wan 2.1 VAE."""
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    wvp.save_demo_checkpoint(path, "wan2.1", 8)
    return path
