"""Workers that are prepared, loading, ready, parked and gone; what costs them what, and what happens to them there."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.processes import gone, patience, wait_until
from tests.runtime.pool.common import CLOSE, FRAMES, at, pids
from wan_vae_parallel.runtime.pool import WorkerPool


class Interrupt(BaseException):
    """As the newest ComfyUI's, which is no Exception."""


def stage(vae):
    return vae._engine.stage


def seconds_of_cpu(pid):
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def prepared(vae):
    """Waits until the workers have loaded their modules, as they tell the pool."""
    return wait_until(lambda: all(worker.prepared or worker.connection.poll() for worker in vae._engine.workers), 120)


@pytest.fixture
def fresh(path):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        yield vae


def test_loading_a_vae_prepares_workers_that_wait_quietly(fresh, latents, expected):
    assert stage(fresh) == "prepared"
    assert not fresh.loaded
    assert fresh.memory_held == 0
    before = pids(fresh)
    assert len(before) == 2
    # Those threads that load give way to all others.
    assert wait_until(lambda: any(os.getpriority(os.PRIO_PROCESS, tid) == 19 for tid in threads(before[0])), 60)
    assert prepared(fresh)
    assert os.getpriority(os.PRIO_PROCESS, before[0]) == 0
    used = seconds_of_cpu(before[0])
    time.sleep(2)
    assert seconds_of_cpu(before[0]) - used < 0.2
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert pids(fresh) == before


def threads(pid):
    return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]


def test_a_vae_that_never_decodes_ends_its_workers_at_once(path):
    vae = wvp.load_vae(path, devices="cpu,cpu")
    before = pids(vae)
    started = time.monotonic()
    vae.close()
    assert time.monotonic() - started < patience(2)
    assert all(map(gone, before))
    with pytest.raises(wvp.WanVAEError, match="closed"):
        vae.decode(torch.zeros(1, 16, 1, 4, 3))


def test_parked_workers_keep_their_processes_and_decode_again(vae, latents, expected):
    before = pids(vae)
    vae.park()
    assert stage(vae) == "parked"
    assert not vae.loaded
    assert pids(vae) == before
    vae.park()  # once more does nothing
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert stage(vae) == "ready"
    assert pids(vae) == before


def test_a_decode_that_is_under_way_is_not_parked(vae, latents, expected):
    before, parked = pids(vae), []
    frames = vae.decode(latents, on_chunk=at(5, lambda: parked.append(vae._engine.park())))
    assert parked == [False]
    assert stage(vae) == "ready"
    assert pids(vae) == before
    torch.testing.assert_close(frames, expected, **CLOSE)


def test_a_start_that_is_cancelled_ends_within_a_second_and_goes_on_for_the_next(fresh, latents, expected):
    called, raised = [], []

    def cancel():
        called.append(time.monotonic())
        if stage(fresh) == "loading" and not raised:
            raised.append(time.monotonic())
            raise Interrupt

    before = pids(fresh)
    with pytest.raises(Interrupt):
        fresh.decode(latents, on_wait=cancel)
    assert time.monotonic() - raised[0] < patience(1)
    assert stage(fresh) == "loading"
    called.clear()
    frames = fresh.decode(latents, on_wait=lambda: called.append(time.monotonic()))
    torch.testing.assert_close(frames, expected, **CLOSE)
    assert pids(fresh) == before
    assert max(later - sooner for sooner, later in itertools.pairwise(called)) < 1


def test_a_start_that_was_cancelled_can_be_parked(fresh, latents, expected):
    def cancel():
        if stage(fresh) == "loading":
            raise Interrupt

    with pytest.raises(Interrupt):
        fresh.decode(latents, on_wait=cancel)
    fresh.park()
    assert not fresh.loaded
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)


def test_a_decode_that_is_cancelled_while_it_waits_for_frames_leaves_the_workers(vae, latents, expected):
    before, cancelled = pids(vae), []

    def cancel():
        cancelled.append(True)
        raise Interrupt

    with pytest.raises(Interrupt):
        vae.decode(latents, on_wait=cancel)
    assert len(cancelled) == 1
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert pids(vae) == before


def test_a_cancelled_decode_does_not_wait_for_steps_that_take_long(vae, expected, latents):
    # Steps of seconds, of which two are under way; at one of these the workers are told that it is over.
    large = torch.randn(1, 16, 3, 48, 48)
    times = []

    def cancel():
        times.append(time.monotonic())
        if len(times) == 3:
            raise Interrupt

    before = pids(vae)
    with pytest.raises(Interrupt):
        vae.decode(large, on_wait=cancel)
    assert time.monotonic() - times[-1] < patience(1)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert pids(vae) == before


@pytest.mark.parametrize("when", ["prepared", "loading"])
def test_closing_during_a_start_takes_effect_within_a_second(path, latents, when):
    vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
    before, errors, ended = pids(vae), [], []

    def decode():
        try:
            vae.decode(latents)
        except wvp.WanVAEError as error:
            errors.append(error)
        ended.append(time.monotonic())

    thread = threading.Thread(target=decode)
    thread.start()
    if when == "loading":
        assert prepared(vae)
    assert wait_until(lambda: stage(vae) == "loading", 60)
    closed = time.monotonic()
    vae.close()
    thread.join(30)
    assert ended[0] - closed < 1
    assert len(errors) == 1
    assert all(map(gone, before))


@pytest.mark.parametrize("when", ["prepared", "parked"])
def test_workers_killed_while_they_wait_cost_nothing_but_time(path, latents, expected, when):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        if when == "parked":
            vae.decode(latents)
            vae.park()
        before = pids(vae)
        os.kill(before[1], signal.SIGKILL)
        assert wait_until(lambda: not vae._engine.workers[1].alive, 10)
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
        assert not set(before) & set(pids(vae))


@pytest.mark.parametrize("when", ["prepared", "parked"])
def test_a_worker_stopped_while_it_waits_is_an_error_that_names_it(path, latents, expected, when, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.runtime.pool._SILENCE_SECONDS", 2.0)
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        if when == "parked":
            vae.decode(latents)
            vae.park()
        before = pids(vae)
        os.kill(before[1], signal.SIGSTOP)
        with pytest.raises(wvp.WorkerError, match=f"worker 1 on cpu is not answering.*{before[1]}"):
            vae.decode(latents)
        assert all(map(gone, before))
        monkeypatch.undo()
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_a_worker_that_does_not_park_is_ended(vae, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.runtime.pool._SILENCE_SECONDS", 2.0)
    before = pids(vae)
    os.kill(before[0], signal.SIGSTOP)
    vae.park()
    assert all(map(gone, before))
    assert not vae.loaded


def test_two_threads_wait_for_one_start(path, latents, expected):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        before, frames = pids(vae), []
        started = [threading.Thread(target=lambda: frames.append(vae.decode(latents))) for _ in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(120)
        assert len(frames) == 2
        for one in frames:
            torch.testing.assert_close(one, expected, **CLOSE)
        assert pids(vae) == before


def test_parked_workers_end_when_idle(path, latents):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=1.0) as vae:
        time.sleep(2)
        assert len(pids(vae)) == 2  # a sampler may take its time before there is anything to decode
        vae.decode(latents)
        vae.park()
        before = pids(vae)
        assert wait_until(lambda: all(map(gone, before)), 10)
        assert pids(vae) == []


def test_a_successor_takes_over_the_processes_and_decodes_with_its_own_weights(path, latents, expected):
    weights = {key: tensor * 1.01 for key, tensor in load_file(path).items()}
    with wvp.vae_from_state_dict(weights, devices="cpu", chunk=1) as alone:
        other = alone.decode(latents)
    assert not torch.allclose(other, expected, atol=1e-3)
    with wvp.vae_from_state_dict(weights, devices="cpu,cpu", chunk=1) as before:
        before.decode(latents)
        workers = pids(before)
        with wvp.load_vae(path, devices="cpu,cpu", chunk=1, predecessor=before) as vae:
            assert pids(vae) == workers
            assert pids(before) == []
            torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
            assert pids(vae) == workers
            # And the one before starts its own, if it is needed after all.
            torch.testing.assert_close(before.decode(latents), other, **CLOSE)


def test_processes_that_can_not_be_made_are_told_of_when_they_are_wanted(path, latents, monkeypatch):
    def refused(*_args):
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr("wan_vae_parallel.runtime.pool.WorkerProcess", refused)
        vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
        with pytest.raises(wvp.WorkerError, match=r"workers can't start .*temporarily unavailable.*ulimit"):
            vae.decode(latents)
    with vae:
        assert vae.decode(latents).shape[1] == FRAMES


def test_a_pool_in_a_forked_process_is_left_alone(vae):
    before = pids(vae)
    pid = os.fork()
    if not pid:
        pool = vae._engine
        assert isinstance(pool, WorkerPool)
        os._exit(0 if not pool.park() and len(pool.workers) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pids(vae) == before
    assert stage(vae) == "ready"
