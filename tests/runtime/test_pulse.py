"""Ranks look after one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import pytest
import torch.distributed as dist

from tests.processes import state, wait_until
from wan_vae_parallel.runtime import pulse
from wan_vae_parallel.runtime.pulse import Pulse, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a process's state is read from Linux's /proc")


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pulse, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def sleeper():
    """A process that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def both():
    store = dist.HashStore()
    return [Pulse(store, rank, f"rank {rank} on here/cpu", [0, 1]) for rank in (0, 1)]


def pass_seconds(clock, seconds, *beating):
    """What is wrong, at the first of those that beat that sees it."""
    for _ in range(2 * seconds):
        clock.now += 0.5
        for one in beating:
            if reason := one.beat():
                return reason
    return ""


def stop(process):
    process.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: stopped(process.pid), 5)


def test_ranks_that_run_are_well(clock, both):
    assert pass_seconds(clock, 200, *both) == ""


def test_one_that_has_not_begun_or_is_over_is_not_missed(clock, both):
    first, second = both
    assert pass_seconds(clock, 100, first) == ""
    assert pass_seconds(clock, 5, *both) == ""
    second.end()
    assert pass_seconds(clock, 100, first) == ""
    second.beat()  # as its thread may, behind its back
    assert pass_seconds(clock, 100, first) == ""


def test_a_stopped_process_is_named_within_seconds_and_continued(clock, sleeper, monkeypatch):
    store = dist.HashStore()
    first = Pulse(store, 0, "rank 0 on here/cpu", [1])
    monkeypatch.setattr(pulse.os, "getpid", lambda: sleeper.pid)
    second = Pulse(store, 1, "rank 1 on here/cpu", [0])
    assert pass_seconds(clock, 3, first, second) == ""
    stop(sleeper)
    since = clock.now
    assert pass_seconds(clock, 20, first) == (
        f"rank 1 on here/cpu does not answer for 6 s, as its process {sleeper.pid} was stopped"
    )
    assert clock.now - since < 7
    assert wait_until(lambda: state(sleeper.pid) == "S", 5)


def test_one_that_says_nothing_is_missed_after_a_minute_whatever_its_machine_does(clock, both, monkeypatch):
    first, second = both
    monkeypatch.setattr(pulse, "stopped", lambda _pid: True)
    monkeypatch.setattr(pulse.socket, "gethostname", lambda: "another")
    assert pass_seconds(clock, 3, first, second) == ""
    since = clock.now
    reason = pass_seconds(clock, 100, first)
    assert reason.startswith(f"rank 1 on here/cpu does not answer for 60 s (process {os.getpid()})")
    assert 60 <= clock.now - since < 62


def test_who_did_not_run_itself_blames_nobody(clock, both):
    first, second = both
    assert pass_seconds(clock, 3, first, second) == ""
    clock.now += 1000
    assert first.beat() == ""
    assert pass_seconds(clock, 50, first) == ""
    assert pass_seconds(clock, 20, first) != ""


def test_a_process_that_is_gone_is_not_stopped(sleeper):
    assert not stopped(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert not stopped(sleeper.pid)
    assert not stopped(None)
