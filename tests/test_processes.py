"""What the suite holds against a test: only what is this process's, in a time that the machine allows."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import processes
from tests.processes import MARK, patience, shared_names, wait_until

pytestmark = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")


@pytest.fixture
def name():
    """Of a file in /dev/shm that is not there yet."""
    path = Path(f"/dev/shm/wan-vae-parallel-test-{os.getpid()}")
    yield path.name
    path.unlink(missing_ok=True)


def held_by(name, environment):
    """The pid of a process that holds the file open and that has lost its parent."""
    script = f"exec 3>/dev/shm/{name}; sleep 60 >&- 2>&- & echo $!"
    return int(subprocess.run(["sh", "-c", script], env=environment, capture_output=True, check=True).stdout)


def test_what_another_program_shares_is_not_ours(name):
    pid = held_by(name, {key: value for key, value in os.environ.items() if key != MARK})
    try:
        assert os.path.exists(f"/dev/shm/{name}")
        assert name not in shared_names()
    finally:
        os.kill(pid, 9)


def test_what_a_lost_process_of_ours_shares_is_ours(name):
    pid = held_by(name, dict(os.environ))
    try:
        assert name in shared_names()
    finally:
        os.kill(pid, 9)


def test_what_nobody_has_any_more_is_a_leak(name):
    Path("/dev/shm", name).touch()
    assert name in shared_names()


def test_a_busy_machine_gets_more_time_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, seconds in ((0.0, 5), (1.0, 5), (8.0, 40), (1e6, 100)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert patience(5) == seconds
    monkeypatch.setattr(processes, "patience", lambda seconds: seconds)
    started = time.monotonic()
    assert not wait_until(lambda: False, 0.2)
    assert time.monotonic() - started >= 0.2
