"""Workers when things break, with real processes: killed, stopped, failing, out of memory, left alone.

All on the CPU; tests/gpu/test_pool_gpu.py has what differs there.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.processes import (
    children,
    gone,
    listening,
    nothing_left,
    open_files,
    shared_bytes,
    shared_files,
    shared_maps,
    wait_until,
)
from wan_vae_parallel.memory import decode_memory
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.runtime import pool as pool_module
from wan_vae_parallel.runtime.faults import _failure
from wan_vae_parallel.runtime.pool_run import PoolRun
from wan_vae_parallel.runtime.process import WorkerProcess, _hidden_main

CLOSE = {"atol": 1e-5, "rtol": 0}
FRAMES = 21
ROOM = 6 * 2**20


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, 16, 6, 4, 3), generator=generator)


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
    torch.testing.assert_close(warm.decode(latents), expected, **CLOSE)
    warm.chunk = 1


def pids(vae):
    return [worker.process.pid for worker in vae._engine.workers]


def at(frame, action):
    """A callback that does ``action()`` once, when ``frame`` is done."""
    did = []

    def on_chunk(done, _total, _frames):
        if done >= frame and not did:
            did.append(True)
            action()

    return on_chunk


# Workers that die, stop or fail.


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_the_middle_is_named_and_the_next_decode_works(vae, latents, rank):
    before = pids(vae)
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(before[rank], signal.SIGKILL)

    with pytest.raises(wvp.WorkerError) as raised:
        vae.decode(latents, on_chunk=at(5, kill))
    assert time.monotonic() - killed[0] < 10
    assert f"worker {rank} on cpu died with exit code -9" in str(raised.value)
    assert "the next decode starts new ones" in str(raised.value)
    assert all(map(gone, before))
    assert not vae.loaded


def test_a_death_that_is_noticed_late_still_names_the_one_that_died(vae, latents):
    # The others fail for want of their neighbour, and may have told so before the parent looks.
    before = pids(vae)

    def kill():
        os.kill(before[1], signal.SIGKILL)
        time.sleep(1.5)

    with pytest.raises(wvp.WorkerError, match="worker 1 on cpu died with exit code -9"):
        vae.decode(latents, on_chunk=at(1, kill))
    assert all(map(gone, before))


def test_a_worker_that_is_stopped_is_not_answering(vae, latents):
    before = pids(vae)
    stopped = []

    def stop():
        stopped.append(time.monotonic())
        os.kill(before[1], signal.SIGSTOP)

    with pytest.raises(wvp.WorkerError, match=rf"worker 1 on cpu is not answering .*process {before[1]}"):
        vae.decode(latents, on_chunk=at(5, stop))
    assert time.monotonic() - stopped[0] < 10
    assert all(map(gone, before))


@pytest.mark.slow
def test_a_worker_that_is_stopped_between_steps_does_not_hold_up_the_end_of_a_decode(vae, latents, caplog, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.runtime.pool._SILENCE_SECONDS", 3.0)  # the test above waits in full
    before = pids(vae)
    stream = vae.decode_stream(latents)
    next(stream)
    os.kill(before[1], signal.SIGSTOP)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 10
    assert "worker 1 on cpu is not answering" in caplog.text
    assert all(map(gone, before))


def test_a_worker_that_dies_after_its_answer_is_noticed_though_the_others_go_on(vae):
    # Of two the first has answered and died; the second, which waits for it on its device, only says that it lives.
    class Stub:
        def __init__(self, rank, messages, alive):
            self.rank, self.messages = rank, messages
            self.connection, self.theirs = multiprocessing.Pipe()
            for message in messages:
                self.theirs.send(message)
            self.process = types.SimpleNamespace(exitcode=None if alive else 1, pid=0, join=lambda *_: None)
            self.alive, self.stopped = alive, False
            if not alive:
                self.theirs.close()

        def __str__(self):
            return f"stub {self.rank}"

        def last_lines(self):
            return ""

    pool = vae._engine
    real, pool.workers = pool.workers, [Stub(0, [("done", 1)], alive=False), Stub(1, [("alive",)] * 3, alive=True)]
    try:
        with pytest.raises(wvp.WorkerError, match="stub 0 died with exit code 1"):
            pool.gather("done", 2)
    finally:
        pool.workers = real


def test_a_worker_that_is_stopped_while_it_starts_is_not_answering(path, latents, monkeypatch):
    monkeypatch.setattr(pool_module, "_SILENCE_SECONDS", 1.0)

    def stop(vae):
        assert wait_until(lambda: len(vae._engine.workers) == 2, 20)
        os.kill(pids(vae)[1], signal.SIGSTOP)

    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        thread = threading.Thread(target=stop, args=(vae,))
        thread.start()
        with pytest.raises(wvp.WorkerError, match="worker 1 on cpu is not answering"):
            vae.decode(latents)
        thread.join()
        assert pids(vae) == []


def test_a_worker_that_is_made_while_the_pool_is_released_does_not_stay(path, latents, monkeypatch):
    made = []

    class Released(WorkerProcess):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.process)
            vae.release()

    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        monkeypatch.setattr(pool_module, "WorkerProcess", Released)
        with pytest.raises(wvp.WorkerError, match="ended while they started"):
            vae.decode(latents)
    assert len(made) == 1
    assert gone(made[0].pid)


def test_other_threads_find_the_main_module_while_a_worker_starts():
    main = sys.modules["__main__"]
    main.Something = type("Something", (), {"__module__": "__main__", "__qualname__": "Something"})
    try:
        with _hidden_main():
            hidden = sys.modules["__main__"]
            assert hidden is not main
            # What tells multiprocessing which program it should run again.
            assert not hasattr(hidden, "__file__")
            assert hidden.__spec__ is None
            assert isinstance(pickle.loads(pickle.dumps(main.Something())), main.Something)
            hidden.more = 1
        assert main.more == 1
        assert sys.modules["__main__"] is main
    finally:
        del main.Something, main.more


def test_an_interrupt_while_a_decode_is_being_ended_leaves_no_half_ended_workers(vae, latents, expected):
    before = pids(vae)
    real = vae._engine.gather

    def interrupted(kind, *args, **options):
        if kind == "finished":
            raise KeyboardInterrupt
        return real(kind, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae._engine, "gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vae.decode(latents)
    assert all(map(gone, before))
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_tensors_that_share_memory_are_weights_too(path, latents, expected):
    weights = dict(load_file(path))
    both = torch.cat([weights[key].flatten() for key in ("decoder.conv1.bias", "decoder.middle.0.residual.2.bias")])
    for key in ("decoder.conv1.bias", "decoder.middle.0.residual.2.bias"):
        size = weights[key].numel()
        weights[key], both = both[:size], both[size:]
    with wvp.vae_from_state_dict(weights, devices="cpu,cpu", chunk=1) as vae:
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
        # And nobody keeps the copy that the workers got.
        for pid in (*pids(vae), "self"):
            assert not [file for file in open_files(pid) if file.startswith("/memfd:wan-vae-parallel ")]


def test_a_very_long_idle_time_is_for_ever(path, latents):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=1e10) as vae:
        vae.decode(latents)
        assert vae._engine._idle_timer is None
        assert len(pids(vae)) == 2


def test_nan_in_any_chunk_is_told_and_the_workers_stay(path, latents):
    # fp16 overflows from the second latent frame on.
    weights = dict(load_file(path))
    weights["conv2.weight"] = 100 * weights["conv2.weight"]
    large = latents.clone()
    large[:, :, 1:3] *= 1e4
    with wvp.vae_from_state_dict(weights, devices="cpu,cpu", chunk=1, dtype="float16") as vae:
        seen = []
        with pytest.raises(wvp.WanVAEError, match="frames are NaN: in float16 the activations overflow"):
            vae.decode(large, on_chunk=lambda done, *_: seen.append(done))
        assert seen[:1] == [1]
        before = pids(vae)
        assert vae.decode(latents).isfinite().all()
        assert pids(vae) == before


def test_a_copy_is_refused_and_harms_nothing(vae):
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load it where it is used"):
            attempt(vae)


@pytest.mark.parametrize("idle", [-1, "10", None, math.nan, True])
def test_idle_seconds_are_a_number(path, idle):
    with pytest.raises(wvp.ArgumentError, match="idle_seconds is"):
        wvp.load_vae(path, devices="cpu,cpu", idle_seconds=idle)


def test_a_worker_killed_between_decodes_costs_at_most_one_error(vae, latents, expected):
    before = pids(vae)
    os.kill(before[1], signal.SIGKILL)
    assert wait_until(lambda: gone(before[1]), 5)
    try:
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    except wvp.WorkerError as error:
        assert "worker 1 on cpu died with exit code -9" in str(error)  # noqa: PT017
    assert all(map(gone, before))


def test_a_file_that_vanished_or_broke_is_an_error_and_its_return_is_none(
    path, tmp_path, latents, expected, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # see the next test
    copy = tmp_path / "vae.safetensors"
    shutil.copy2(path, copy)
    with wvp.load_vae(copy, devices="cpu,cpu", chunk=1) as vae:
        copy.unlink()
        with pytest.raises(wvp.CheckpointError):
            vae.decode(latents)
        copy.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(wvp.CheckpointError):
            vae.decode(latents)
        assert pids(vae) == []
        copy.unlink()
        shutil.copy2(path, copy)
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_a_start_that_fails_leaves_no_folder(path, tmp_path, latents, monkeypatch):
    copy, temporary = tmp_path / "vae.safetensors", tmp_path / "temporary"
    shutil.copy2(path, copy)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with wvp.load_vae(copy, devices="cpu,cpu", chunk=1) as vae:
        copy.unlink()
        for _ in range(2):
            with pytest.raises(wvp.CheckpointError):
                vae.decode(latents)
    assert os.listdir(temporary) == []


def test_an_error_in_a_worker_is_told_with_its_rank_and_last_lines(path, tmp_path, latents, monkeypatch):
    copy = tmp_path / "vae.safetensors"
    shutil.copy2(path, copy)
    with wvp.load_vae(copy, devices="cpu,cpu", chunk=1) as vae:
        real = vae._engine._weights

        def vanishing():
            # Behind the parent's own look at it, before the workers'.
            checkpoint = real()
            copy.unlink()
            return checkpoint

        monkeypatch.setattr(vae._engine, "_weights", vanishing)
        with pytest.raises(wvp.WorkerError, match=r"worker [01] on cpu failed: CheckpointError: .*does not exist") as e:
            vae.decode(latents)
        assert "its last lines:\n" in str(e.value)
        assert "Traceback" in str(e.value)
        assert pids(vae) == []


def test_a_group_that_can_not_be_joined_is_an_error_with_its_reason_and_a_way_out(path, latents, monkeypatch):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        with monkeypatch.context() as patch:
            for module in ("pool", "faults"):
                patch.setattr(f"wan_vae_parallel.runtime.{module}.INTERFACE", "wan0")
            with pytest.raises(wvp.WorkerError, match=r"worker \d on cpu failed: .*interface wan0, which has to be up"):
                vae.decode(latents)
        assert pids(vae) == []
        vae.decode(latents)


# Running out of memory. The limit is the address space of one worker, so torch's own allocator fails there.


def starve(vae, latents, chunk):
    """Decodes once small, then leaves worker 1 too little memory for ``latents`` with ``chunk``."""
    vae.chunk = 1
    vae.decode(latents[:, :, :2, :4, :4])  # what code, threads and buffers take is there
    plan = plan_shards(*latents.shape[3:], 2)
    shard = (1, latents.shape[2], plan.height(1), plan.columns)
    needed = decode_memory(vae.architecture, shard, chunk=chunk, dtype=torch.float32, kernels=False).step
    status = Path(f"/proc/{pids(vae)[1]}/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024
    # The latents and the whole video, which are mapped there, and then little more.
    mapped = 4 * vae.output_shape(latents.shape).numel() + latents.nbytes
    limit = size + mapped + ROOM
    assert needed > 2.5 * ROOM, f"{needed / 2**20:.0f} MiB are no shortage"
    resource.prlimit(pids(vae)[1], resource.RLIMIT_AS, (limit, limit))
    vae.chunk = chunk


@pytest.fixture(scope="module")
def large():
    return torch.randn((1, 16, 5, 24, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def large_expected(path, large):
    with wvp.load_vae(path, devices="cpu", chunk=2) as alone:
        return alone.decode(large)


def test_out_of_memory_in_one_rank_goes_on_with_a_smaller_chunk_and_the_same_frames(vae, large, large_expected, caplog):
    starve(vae, large, 4)
    before, done = pids(vae), []
    with caplog.at_level(logging.WARNING):
        frames = vae.decode(large, on_chunk=lambda count, _total, newest: done.append((count, newest.clone())))
    torch.testing.assert_close(frames, large_expected, **CLOSE)
    # Each frame once, in order, though the decode began anew.
    assert [count for count, _ in done] == sorted({count for count, _ in done})
    assert torch.equal(torch.cat([newest for _, newest in done], dim=1), frames)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "worker 1 on cpu ran out of memory" in warnings[0]
    assert "same frames" in warnings[0]
    assert all(map(gone, before))


@pytest.mark.slow
def test_out_of_memory_that_is_noticed_late_goes_on_too(vae, large, large_expected):
    # Behind a callback that takes its time: the others have failed as well by then, for want of their neighbour.
    starve(vae, large, 4)
    frames = vae.decode(large, on_chunk=at(1, lambda: time.sleep(4)))
    torch.testing.assert_close(frames, large_expected, **CLOSE)


def test_out_of_memory_with_chunk_1_is_an_error_that_names_the_device(vae, large):
    wide = torch.cat([large, large, large], dim=3)[:, :, :2]
    starve(vae, wide, 1)
    before = pids(vae)
    with pytest.raises(wvp.OutOfMemoryError, match="worker 1 on cpu ran out of memory"):
        vae.decode(wide)
    assert all(map(gone, before))


def test_out_of_memory_before_the_first_step_is_an_error_that_names_the_device(vae, latents, monkeypatch):
    # As when weights don't fit on a device that another program fills.
    vae.release()
    monkeypatch.setattr("wan_vae_parallel.runtime.pool.PoolRun._open", _out_of_memory)
    with pytest.raises(
        wvp.OutOfMemoryError, match=r"worker 1 on cpu ran out of memory.*it had not begun yet; use more"
    ):
        vae.decode(latents)
    monkeypatch.undo()


def test_a_shortage_that_meets_new_workers_ends_the_decode(vae, large):
    # Out of memory in a step; and then again and again before the first, as when another program took the device.
    starts = []
    real = PoolRun._open

    def short(run, chunk):
        starts.append(chunk)
        if len(starts) > 1:
            _out_of_memory(run, chunk)
        real(run, chunk)

    starve(vae, large, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolRun, "_open", short)
        with pytest.raises(wvp.OutOfMemoryError, match="it had not begun yet"):
            vae.decode(large)
    assert len(starts) == 2


def _out_of_memory(run, chunk):  # noqa: ARG001 (stands for a method)
    raise _failure(run._pool.workers[1], "memory", "OutOfMemoryError: CUDA out of memory")


# The caller's own errors, and leaving off.


class Interrupt(Exception):
    """What a user interface raises to stop a decode."""


@pytest.mark.parametrize("frame", [1, 9, FRAMES])
def test_what_on_chunk_raises_ends_the_decode_and_the_workers_stay(vae, latents, frame):
    before = pids(vae)

    def stop():
        raise Interrupt

    with pytest.raises(Interrupt):
        vae.decode(latents, on_chunk=at(frame, stop))
    assert pids(vae) == before
    gc.collect()
    assert shared_files() == 0
    assert shared_maps() == 0


def test_a_stream_may_be_closed_at_any_chunk(vae, latents, expected):
    before = pids(vae)
    steps = sum(1 for _ in vae.decode_stream(latents))
    assert steps >= 6
    for taken in (0, 1, 3, steps):
        stream = vae.decode_stream(latents)
        parts = [next(stream) for _ in range(taken)]
        stream.close()
        if parts:
            got = torch.cat(parts, dim=1)
            torch.testing.assert_close(got, expected[:, : got.shape[1]], **CLOSE)
    dropped = vae.decode_stream(latents)
    next(dropped)
    del dropped
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert pids(vae) == before
    gc.collect()
    assert shared_maps() == 0


# Threads and streams.


def test_threads_decode_one_after_the_other(vae, latents, expected):
    videos = [latents, latents.flip(-1).contiguous(), latents.flip(-2).contiguous()]
    right = [expected, *(vae.decode(video) for video in videos[1:])]
    barrier = threading.Barrier(len(videos), timeout=30)

    def decode(video):
        barrier.wait()
        return vae.decode(video)

    with ThreadPoolExecutor(len(videos)) as threads:
        decoded = list(threads.map(decode, videos))
    for frames, one in zip(decoded, right, strict=True):
        torch.testing.assert_close(frames, one, **CLOSE)


def test_a_stream_may_go_from_one_thread_to_another(vae, latents, expected):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        stream = vae.decode_stream(latents)
        first = one.submit(next, stream).result()
        second = other.submit(next, stream).result()
        # Its thread is now the other one: this one may wait for its turn.
        waiting = one.submit(vae.decode, latents)
        time.sleep(0.2)
        assert not waiting.done()
        rest = other.submit(list, stream).result()
        torch.testing.assert_close(torch.cat([first, second, *rest], dim=1), expected, **CLOSE)
        torch.testing.assert_close(waiting.result(), expected, **CLOSE)


def test_closing_ends_those_who_wait_before_they_start_anything(path, latents):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae, ThreadPoolExecutor(1) as thread:
        stream = vae.decode_stream(latents)
        next(stream)
        waiting = thread.submit(vae.decode, latents)
        time.sleep(0.2)
        vae.close()
        with pytest.raises(wvp.WanVAEError):
            next(stream)
        with pytest.raises(wvp.WanVAEError, match="closed"):
            waiting.result()
        assert pids(vae) == []


def test_a_second_stream_in_the_same_thread_is_an_error_and_not_a_deadlock(vae, latents, expected):
    stream = vae.decode_stream(latents)
    parts = [next(stream)]
    for second in (lambda: next(vae.decode_stream(latents)), lambda: vae.decode(latents)):
        with pytest.raises(wvp.WanVAEError, match="finish or close its stream first"):
            second()
    parts += stream  # the first one is not hurt
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_decoding_within_a_callback_is_an_error_and_not_a_deadlock(vae, latents):
    with pytest.raises(wvp.WanVAEError, match="another decode of this VAE is open"):
        vae.decode(latents, on_chunk=lambda *_: vae.decode(latents))


# Memory.


def test_frames_stay_when_others_are_decoded_and_the_vae_is_closed(path, latents, expected):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        frames = vae.decode(latents)
        others = vae.decode(latents.flip(-1).contiguous())
        assert frames.data_ptr() != others.data_ptr()
        torch.testing.assert_close(frames, expected, **CLOSE)
        workers = pids(vae)
    assert all(map(gone, workers))  # closing is the end of them
    before = frames.clone()
    gc.collect()
    assert torch.equal(frames, before)
    frames.mul_(2)  # the caller's own
    # Gone with the tensor, and not before: a view is enough to keep it.
    assert shared_maps() == shared_files() == 2  # Python's mmap keeps a descriptor of its own
    view = frames[:, 3]
    del frames, others
    gc.collect()
    assert shared_maps() == shared_files() == 1
    assert torch.equal(view, before[:, 3] * 2)
    del view
    gc.collect()
    assert shared_maps() == shared_files() == 0


def test_decodes_leave_no_descriptors_and_no_memory(vae, latents):
    vae.decode(latents)
    gc.collect()
    count = len(os.listdir("/proc/self/fd"))
    workers = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids(vae)]
    for _ in range(3):
        vae.decode(latents)
        next(vae.decode_stream(latents))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == count
    assert [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids(vae)] == workers
    for pid in pids(vae):
        # Workers let go of both the latents and the frames.
        assert "memfd:wan-vae-parallel" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_stream_gives_back_the_memory_of_frames_that_were_taken(vae):
    wide = torch.randn((1, 16, 6, 4, 40), generator=torch.Generator().manual_seed(1))
    with contextlib.closing(vae.decode_stream(wide)) as stream:
        size, most = 0, 0
        for frames in stream:
            size += frames.nbytes
            most = max(most, shared_bytes())
    assert size > 15 * 2**15
    assert most < 0.6 * size


def test_nothing_goes_to_dev_shm(vae, latents):
    # It has 64 MB in a default container, and a full one kills processes.
    names = set(os.listdir("/dev/shm"))
    sizes = []
    vae.decode(latents, on_chunk=lambda *_: sizes.append(set(os.listdir("/dev/shm")) - names))
    assert not any(sizes)


def test_a_dropped_vae_is_not_kept_by_its_idle_timer_and_ends_its_workers(path, latents):
    vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
    vae.decode(latents)
    workers = pids(vae)
    engine = weakref.ref(vae._engine)
    gc.collect()
    gc.disable()  # at once, and not when a collector comes by
    try:
        del vae
        assert engine() is None
    finally:
        gc.enable()
    assert wait_until(lambda: all(map(gone, workers)), 5)


# Ends.


def test_idle_workers_end_and_the_next_decode_starts_new_ones(path, latents, expected):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1, idle_seconds=1) as vae:
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
        first = pids(vae)
        assert len(first) == 2
        assert wait_until(lambda: all(map(gone, first)), 6)
        assert wait_until(lambda: not vae.loaded, 2)
        # Not while it decodes, however slowly frames are taken.
        stream = vae.decode_stream(latents)
        parts = [next(stream)]
        second = pids(vae)
        assert not set(first) & set(second)
        time.sleep(1.5)
        parts += stream
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
        assert wait_until(lambda: all(map(gone, second)), 6)


def test_release_ends_the_processes(vae):
    before = pids(vae)
    assert vae.loaded
    assert len(before) == 2
    vae.release()
    assert not vae.loaded
    assert all(map(gone, before))
    vae.release()  # twice is fine


def test_nothing_starts_before_the_devices_are_known_to_be_there(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda _backend: True)
    before = children()
    for devices in ("cuda:0,cuda:0", "cuda:0,cuda:7", "cpu,cuda:1", "cpu,gpu"):
        with pytest.raises(wvp.DeviceError):
            wvp.load_vae(path, devices=devices)
    assert children() == before


# What others see.


def test_ports_are_open_to_this_machine_alone(vae):
    addresses = [address for pid in pids(vae) for address in listening(pid)]
    assert addresses, "gloo connects its ranks through sockets, so there is something to look at"
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}  # 127.0.0.1


def test_logs_name_devices_and_rows(vae, latents, caplog):
    vae.release()
    with caplog.at_level(logging.INFO):
        vae.decode(latents)
    text = caplog.text
    assert "2 workers on cpu, cpu started" in text
    assert "cpu: rows 0-1, cpu: rows 2-3" in text


def test_more_workers_than_rows_are_said_to_be_idle(vae, caplog):
    with caplog.at_level(logging.INFO):
        vae.decode(torch.zeros(1, 16, 1, 1, 1))
    assert "1 of 2 devices not used, for want of latent rows" in caplog.text
