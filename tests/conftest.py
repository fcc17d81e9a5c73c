"""What holds for the whole suite."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded, and for processes that tests start: several tests at a time share the processor.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import wan_vae_parallel as wvp
from tests import forking
from tests.gpu.posing.pose import POSES, begin
from tests.processes import MARK, children, listening, shared_files, shared_names, strays, wait_until


def pytest_addoption(parser):
    parser.addoption(
        "--pose", choices=sorted(POSES), help="have Triton take the GPU for an older one (see tests/gpu/posing/pose.py)"
    )


def pytest_configure(config):
    if name := config.getoption("--pose"):
        folder = tempfile.TemporaryDirectory(prefix="wvp-pose-")
        config.add_cleanup(folder.cleanup)
        begin(name, Path(folder.name))


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_of_the_suite():
    """After all tests there is no process of theirs, no shared memory and no open port."""
    if not os.path.isdir("/proc/self/fd"):
        yield
        return
    names, ports, mark = shared_names(), listening(), f"tests of {os.getpid()}, {time.time()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        yield
    gc.collect()
    wait_until(lambda: not children() and not strays(mark) and not shared_names() - names, 10)
    assert children() == {}
    assert strays(mark) == {}
    assert shared_names() - names == set()
    assert shared_files() == 0
    assert sorted(listening()) == sorted(ports)


@pytest.fixture(scope="session", autouse=True)
def _forks(_nothing_left_of_the_suite):
    """Workers that tests start in this process are forked, see `tests.forking`."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    with forking.workers() as forks:
        yield forks


@pytest.fixture
def real_starts(_forks, monkeypatch):
    """Workers start as everybody's do."""
    if _forks:
        monkeypatch.setattr(_forks, "enabled", False)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory):
    """What tests measure is not what the user's decodes go by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small Wan 2.1 VAE."""
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    wvp.save_demo_checkpoint(path, "wan2.1", 8)
    return path
