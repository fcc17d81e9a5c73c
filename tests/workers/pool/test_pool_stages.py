"""Workers that are prepared, loading, ready, parked and gone; what costs them what, and what happens to them there."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.processes import children, gone, open_files, patience, wait_until
from tests.workers.pool.common import CLOSE, FRAMES, at, pids
from wan_vae_parallel.workers import pool, process
from wan_vae_parallel.workers.pool import WorkerPool
from wan_vae_parallel.workers.shared_weights import share_weights


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
def given(monkeypatch):
    """The parts whose weights pools have handed to workers."""
    parts = []

    def share(checkpoint, part, dtype):
        parts.append(part)
        return share_weights(checkpoint, part, dtype)

    monkeypatch.setattr(pool, "share_weights", share)
    return parts


@pytest.fixture
def others(path, tmp_path):
    """Files of other weights than the usual ones'."""
    paths = []
    for number in range(2):
        weights = load_file(path)
        weights["decoder.conv1.weight"] = weights["decoder.conv1.weight"] * (0.5 + number)
        paths.append(tmp_path / f"other{number}.safetensors")
        save_file(weights, paths[-1])
    return paths


def test_vaes_that_take_turns_keep_both_weights_on_the_same_workers(path, others, latents, expected, given):
    frames = torch.rand(1, 5, 32, 24, 3, generator=torch.Generator().manual_seed(3))
    with (
        wvp.load_vae(others[0], devices="cpu") as alone,
        wvp.load_vae(path, devices="cpu,cpu", chunk=1) as one,
        wvp.load_vae(others[0], devices="cpu,cpu", chunk=1) as other,
    ):
        other_expected, encoded = alone.decode(latents), alone.encode(frames)
        assert (other_expected - expected).abs().max() > 0.01
        torch.testing.assert_close(one.decode(latents), expected, **CLOSE)
        before = pids(one)
        for _ in range(2):
            other.take_over(one)
            assert (pids(other), pids(one)) == (before, [])
            assert (stage(other), stage(one)) == ("ready", "gone")
            torch.testing.assert_close(other.decode(latents), other_expected, **CLOSE)
            assert other.loaded_parts == {"decoder"}
            assert one.loaded_parts == frozenset()
            one.take_over(other)
            torch.testing.assert_close(one.decode(latents), expected, **CLOSE)
        assert given == ["decoder", "decoder"]
        # A part more changes nothing for the other one.
        other.take_over(one)
        torch.testing.assert_close(other.encode(frames), encoded, atol=1e-4, rtol=0)
        one.take_over(other)
        torch.testing.assert_close(one.decode(latents), expected, **CLOSE)
        assert given == ["decoder", "decoder", "encoder"]
        # Given back is given back, of both.
        assert one.park()
        other.take_over(one)
        torch.testing.assert_close(other.decode(latents), other_expected, **CLOSE)
        one.take_over(other)
        torch.testing.assert_close(one.decode(latents), expected, **CLOSE)
        assert given == ["decoder", "decoder", "encoder", "decoder", "decoder"]
        assert pids(one) == before


@pytest.mark.slow
def test_of_three_vaes_that_take_turns_two_keep_their_weights(path, others, latents, expected, given):
    paths = [path, *others]
    vaes = [wvp.load_vae(one, devices="cpu,cpu", chunk=1) for one in paths]
    try:
        results = []
        for last, vae in ((None, 0), (0, 1), (1, 2), (2, 1), (1, 0)):
            if last is not None:
                vaes[vae].take_over(vaes[last])
            results.append(vaes[vae].decode(latents))
        assert given == ["decoder"] * 4  # the first one's once more
        torch.testing.assert_close(results[0], expected, **CLOSE)
        torch.testing.assert_close(results[4], expected, **CLOSE)
        torch.testing.assert_close(results[3], results[1], **CLOSE)
        assert (results[1] - results[2]).abs().max() > 0.01
    finally:
        for vae in vaes:
            vae.close()


@pytest.fixture
def fresh(path):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        yield vae


@pytest.mark.usefixtures("real_starts")
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
    assert max(later - sooner for sooner, later in itertools.pairwise(called)) < patience(1)


@pytest.mark.slow
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


def cancelled_in_a_long_step(vae):
    """Cancels a decode whose first step takes seconds, while the workers are at it; what that took."""
    times = []

    def cancel():
        times.append(time.monotonic())
        if vae._engine._opened and len(times) > 10:
            raise Interrupt

    large = torch.randn(1, 16, 1, 96, 96)
    with pytest.raises(Interrupt):
        vae.decode(large, on_wait=cancel)
    assert vae._engine._finishing  # else the step was over
    return time.monotonic() - times[-1]


def test_a_cancelled_decode_does_not_wait_for_steps_that_take_long(vae, expected, latents, monkeypatch):
    monkeypatch.setattr(pool, "_REPLACE_SECONDS", 120.0)
    before = pids(vae)
    assert cancelled_in_a_long_step(vae) < patience(1)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert pids(vae) == before


def test_nor_does_the_next_one_longer_than_new_workers_take(vae, expected, latents, monkeypatch, caplog):
    monkeypatch.setattr(pool, "_REPLACE_SECONDS", 0.1)
    caplog.set_level("INFO", "wan_vae_parallel")
    before = pids(vae)
    cancelled_in_a_long_step(vae)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert not set(pids(vae)) & set(before)
    assert "still at a step that was cancelled; starting new ones" in caplog.text
    assert caplog.messages[-1].endswith("(first)")
    assert wait_until(lambda: all(gone(pid) for pid in before), 5)


def test_the_wait_for_a_cancelled_step_can_be_cancelled(vae, expected, latents, monkeypatch):
    monkeypatch.setattr(pool, "_REPLACE_SECONDS", 120.0)
    cancelled_in_a_long_step(vae)
    before, called = pids(vae), []

    def cancel():
        called.append(time.monotonic())
        raise Interrupt

    with pytest.raises(Interrupt):
        vae.decode(latents, on_wait=cancel)
    assert time.monotonic() - called[-1] < patience(1)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert pids(vae) == before


def test_nor_does_who_wants_the_memory(vae, expected, latents):
    cancelled_in_a_long_step(vae)
    started = time.monotonic()
    assert vae.park()
    assert time.monotonic() - started < patience(2)
    assert not vae.loaded
    assert stage(vae) in ("prepared", "parked")  # the latter where the step is over soon
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_who_waits_for_another_threads_decode_can_be_cancelled(vae, latents):
    entered, go, called = threading.Event(), threading.Event(), []

    def hold(*_):
        entered.set()
        assert go.wait(60)

    def cancel():
        called.append(time.monotonic())
        if len(called) == 3:
            raise Interrupt

    thread = threading.Thread(target=lambda: vae.decode(latents, on_chunk=hold))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(Interrupt):
        vae.decode(latents, on_wait=cancel)
    assert time.monotonic() - called[-1] < patience(1)
    go.set()
    thread.join(60)


def test_an_alarm_of_the_programs_leaves_nothing_that_hangs(vae, latents, expected, monkeypatch):
    # From a signal's handler, anywhere: here when some have answered, and before workers hear of the decode.
    class Alarm(Exception):
        """Raised by a handler."""

    def alarm(*_args, **_options):
        raise Alarm

    for name in ("gather", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(vae._engine, name, alarm)
            with pytest.raises(Alarm):
                vae.decode(latents)
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    # Between the memory and the first step.
    run = vae._engine.run(latents, vae.output_shape(latents.shape), 1)
    run.close()
    assert not vae._engine._finishing
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_weights_that_come_slowly_can_be_cancelled(fresh, latents, expected, monkeypatch):
    real, reads, called = os.preadv, [], []

    def slow(*arguments):
        reads.append(time.monotonic())
        time.sleep(0.3)
        return real(*arguments)

    def cancel():
        called.append(time.monotonic())
        if len(reads) > 2:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("wan_vae_parallel.files.tensor_file._BLOCK", 2**16)
        patch.setattr(os, "preadv", slow)
        with pytest.raises(Interrupt):
            fresh.decode(latents, on_wait=cancel)
    assert time.monotonic() - called[-1] < patience(1)
    assert len(reads) < 6
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)


@pytest.mark.usefixtures("real_starts")
def test_a_program_with_many_open_files_has_workers_that_hear_it(path, expected, latents):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 2000:
        pytest.skip(f"this system allows {limit[1]} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, limit[1]))
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
            assert max(worker.connection.fileno() for worker in vae._engine.workers) >= 1024
            # Two seconds without a word of the parent's: they say that they live.
            slowly = at(1, lambda: time.sleep(2.5))
            torch.testing.assert_close(vae.decode(latents, on_chunk=slowly), expected, **CLOSE)
            assert len(pids(vae)) == 2
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.usefixtures("real_starts")
def test_a_process_forked_while_workers_start_does_not_hold_up_their_end(path):
    forked = []
    with pytest.MonkeyPatch.context() as patch:
        real = os.pipe

        def pipe():
            ends = real()
            # Not those of subprocess, which waits for their end itself.
            if sys._getframe(1).f_globals["__name__"] != process.__name__:
                return ends
            if (pid := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            forked.append(pid)
            return ends

        patch.setattr(os, "pipe", pipe)
        vae = wvp.load_vae(path, devices="cpu,cpu")
    try:
        assert forked
        workers = list(vae._engine.workers)
        started = time.monotonic()
        vae.close()
        assert time.monotonic() - started < patience(3)
        assert all(gone(worker.pid) for worker in workers)
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.usefixtures("real_starts")
@pytest.mark.parametrize("when", [pytest.param("prepared", marks=pytest.mark.slow), "loading"])
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
    assert ended[0] - closed < patience(1)
    assert len(errors) == 1
    assert all(map(gone, before))


@pytest.mark.parametrize("when", [pytest.param("prepared", marks=pytest.mark.slow), "parked"])
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


@pytest.mark.parametrize("when", [pytest.param("prepared", marks=pytest.mark.slow), "parked"])
def test_a_worker_stopped_while_it_waits_is_an_error_that_names_it(path, latents, expected, when, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.workers.crew._SILENCE_SECONDS", 2.0)
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
    monkeypatch.setattr("wan_vae_parallel.workers.crew._SILENCE_SECONDS", 2.0)
    before = pids(vae)
    os.kill(before[0], signal.SIGSTOP)
    started = time.monotonic()
    vae.park()
    assert time.monotonic() - started < patience(4)
    assert all(map(gone, before))
    assert not vae.loaded


@pytest.mark.slow
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


def test_workers_that_were_taken_over_end_when_idle(path, latents):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as before:
        before.decode(latents)
        workers = pids(before)
        with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=1.0, predecessor=before) as vae:
            assert pids(vae) == workers
            assert wait_until(lambda: all(map(gone, workers)), 10)


@pytest.mark.slow
def test_parked_workers_end_when_idle(path, latents):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=1.0) as vae:
        time.sleep(2)
        assert len(pids(vae)) == 2  # a sampler may take its time before there is anything to decode
        vae.decode(latents)
        vae.park()
        before = pids(vae)
        assert wait_until(lambda: all(map(gone, before)), 10)
        assert pids(vae) == []


def test_idle_workers_end_though_somebody_looks_after_them_at_that_moment(path):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=0.5) as vae:
        with vae._engine._turn.at_once() as free:
            assert free
            vae._engine._end_when_idle()
            before = pids(vae)
            time.sleep(1)
            assert pids(vae) == before
        assert wait_until(lambda: all(map(gone, before)), 10)


def test_prepared_workers_that_were_taken_over_wait_as_long_for_their_first_decode(path):
    first = wvp.load_vae(path, devices="cpu,cpu", idle_seconds=0.5)
    before = pids(first)
    with wvp.VAE(
        first._weights, devices="cpu,cpu", dtype="auto", chunk="auto", idle_seconds=0.5, predecessor=first
    ) as vae:
        assert pids(vae) == before
        assert stage(vae) == "prepared"
        time.sleep(1.5)
        assert pids(vae) == before
    first.close()


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
            # They are the new one's to end when it is idle.
            assert vae._engine._idle_timer is not None
            # And the one before starts its own, if it is needed after all.
            torch.testing.assert_close(before.decode(latents), other, **CLOSE)


@pytest.mark.slow
def test_processes_that_can_not_be_made_are_told_of_when_they_are_wanted(path, latents, monkeypatch):
    def refused(*_args):
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr("wan_vae_parallel.workers.pool.WorkerProcess", refused)
        vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
        with pytest.raises(wvp.WorkerError, match=r"workers can't start .*temporarily unavailable.*ulimit"):
            vae.decode(latents)
    with vae:
        assert vae.decode(latents).shape[1] == FRAMES


@pytest.mark.usefixtures("real_starts")
def test_threads_that_can_not_be_made_are_told_of_and_leave_no_process(path, latents, monkeypatch):
    # Of a limit on processes threads take their part: there may be room for a process and not for its reader.
    def refused(_thread):
        raise RuntimeError("can't start new thread")

    before, files = set(children()), len(open_files())
    with monkeypatch.context() as patch:
        patch.setattr(process.threading.Thread, "start", refused)
        vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
        with pytest.raises(wvp.WorkerError, match=r"workers can't start .*new thread.*ulimit"):
            vae.decode(latents)
    assert set(children()) == before
    assert len(open_files()) == files
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
