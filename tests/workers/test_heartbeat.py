"""Ranks look after one another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types

import pytest
import torch.distributed as dist

from tests.processes import state, wait_until
from wan_vae_parallel.workers import heartbeat
from wan_vae_parallel.workers.heartbeat import Heartbeat, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a process's state is read from Linux's /proc")


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def sleepers():
    """Two processes that do nothing."""
    processes = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    assert wait_until(lambda: all(state(process.pid) == "S" for process in processes), 10)
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def both():
    store = dist.HashStore()
    return [Heartbeat(store, rank, f"rank {rank} on here/cpu", 2, [0, 1]) for rank in (0, 1)]


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


def test_one_that_is_over_is_not_missed(clock, both):
    first, second = both
    assert pass_seconds(clock, 5, *both) == ""
    second.end()
    assert pass_seconds(clock, 400, first) == ""
    second.beat()  # as its thread may, behind its back
    assert pass_seconds(clock, 400, first) == ""


def test_one_that_does_not_begin_is_missed_after_minutes(clock):
    first = Heartbeat(dist.HashStore(), 0, "rank 0 on here/cpu", 2, [1])
    assert pass_seconds(clock, 299, first) == ""
    assert pass_seconds(clock, 10, first).startswith("no word from rank 1 since 300 s")


def of_another_process(monkeypatch, process, *arguments):
    """A heartbeat that ``process`` would have made."""
    with monkeypatch.context() as patch:
        patch.setattr(heartbeat.os, "getpid", lambda: process.pid)
        return Heartbeat(*arguments)


@pytest.mark.parametrize("beats", [0, 3])
def test_a_stopped_process_is_named_within_seconds_and_all_such_are_continued(clock, sleepers, monkeypatch, beats):
    # The second one is another rank's to look after.
    store = dist.HashStore()
    first = Heartbeat(store, 0, "rank 0 on here/cpu", 3, [1])
    others = [
        of_another_process(monkeypatch, sleepers[rank - 1], store, rank, f"rank {rank} on here/cpu", 3, [])
        for rank in (1, 2)
    ]
    assert pass_seconds(clock, beats, first, *others) == ""
    for sleeper in sleepers:
        stop(sleeper)
    since = clock.now
    reason = pass_seconds(clock, 20, first)
    assert re.fullmatch(
        rf"no answer from rank 1 on here/cpu for \d s: its process {sleepers[0].pid} was stopped", reason
    )
    assert clock.now - since < 7
    assert wait_until(lambda: [state(sleeper.pid) for sleeper in sleepers] == ["S", "S"], 5)


@pytest.mark.parametrize("what", ["machine", "started"])
def test_another_machines_process_of_that_number_is_left_alone(clock, sleepers, monkeypatch, what):
    store = dist.HashStore()
    first = Heartbeat(store, 0, "rank 0 on here/cpu", 2, [1])
    identity = heartbeat._identity
    monkeypatch.setattr(heartbeat, "_identity", lambda: {**identity(), what: "another"})
    second = of_another_process(monkeypatch, sleepers[0], store, 1, "rank 1 on there/cpu", 2, [0])
    assert pass_seconds(clock, 3, first, second) == ""
    stop(sleepers[0])
    since = clock.now
    reason = pass_seconds(clock, 100, first)
    assert re.match(rf"no answer from rank 1 on there/cpu for 6\d s; look .* process {sleepers[0].pid} ", reason)
    assert 60 <= clock.now - since < 62
    assert state(sleepers[0].pid) == "T"


def test_one_that_says_nothing_is_missed_after_a_minute(clock, both):
    first, second = both
    assert pass_seconds(clock, 3, first, second) == ""
    assert pass_seconds(clock, 59, first) == ""
    assert pass_seconds(clock, 3, first).startswith("no answer from rank 1 on here/cpu for 6")


def test_who_did_not_run_itself_blames_nobody(clock, both):
    first, second = both
    assert pass_seconds(clock, 3, first, second) == ""
    clock.now += 1000
    assert first.beat() == ""
    assert pass_seconds(clock, 50, first) == ""
    assert pass_seconds(clock, 20, first) != ""


def test_a_process_that_is_gone_is_not_stopped(sleepers):
    assert not stopped(sleepers[0].pid)
    sleepers[0].kill()
    sleepers[0].wait()
    assert not stopped(sleepers[0].pid)
    assert not stopped(None)
