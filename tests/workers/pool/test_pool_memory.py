"""Workers that run out of memory, and what memory decodes leave; with real processes on the CPU."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import re
import resource
import time
import weakref
from pathlib import Path

import pytest
import torch

import wan_vae_parallel as wvp
from tests.processes import gone, shared_bytes, shared_files, shared_maps, shared_names, wait_until
from tests.workers.pool.common import CLOSE, ROOM, at, pids
from wan_vae_parallel.memory import decode_memory
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.workers.failures import StepOutOfMemory, _failure
from wan_vae_parallel.workers.run import PoolRun
from wan_vae_parallel.workers.shared_memory import SharedMemory

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
    # Far more than a thread's heap may have reserved, which counts as taken and is there to be used.
    wide = torch.cat([large] * 8, dim=3)[:, :, :2]
    starve(vae, wide, 1)
    before = pids(vae)
    with pytest.raises(wvp.OutOfMemoryError, match="worker 1 on cpu ran out of memory"):
        vae.decode(wide)
    assert all(map(gone, before))


def test_out_of_memory_before_the_first_step_is_an_error_that_names_the_device(vae, latents, monkeypatch):
    # As when weights don't fit on a device that another program fills.
    vae.release()
    monkeypatch.setattr("wan_vae_parallel.workers.pool.PoolRun._open", _out_of_memory)
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
    time.sleep(0.5)  # what a decode leaves goes a moment after it
    workers = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids(vae)]
    for _ in range(3):
        vae.decode(latents)
        next(vae.decode_stream(latents))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == count
    assert wait_until(lambda: [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids(vae)] == workers, 5)
    for pid in pids(vae):
        # Workers let go of both the latents and the frames.
        maps = Path(f"/proc/{pid}/maps")
        assert wait_until(lambda: "memfd:wan-vae-parallel" not in maps.read_text(), 5)  # noqa: B023 (called at once)


def test_a_stream_gives_back_the_memory_of_frames_that_were_taken(vae):
    wide = torch.randn((1, 16, 6, 4, 40), generator=torch.Generator().manual_seed(1))
    with contextlib.closing(vae.decode_stream(wide)) as stream:
        size, most = 0, 0
        for frames in stream:
            size += frames.nbytes
            most = max(most, shared_bytes())
    assert size > 15 * 2**15
    assert most < 0.6 * size


def test_a_stream_that_begins_anew_gives_frames_back_that_were_taken_before(vae, monkeypatch):
    wide = torch.randn((1, 16, 6, 4, 40), generator=torch.Generator().manual_seed(1))
    real, taken, shortages, after = vae._engine.gather, [], [], []

    def gather(kind, *arguments, **options):
        if kind == "done" and len(taken) == 5:
            if not shortages:
                shortages.append(shared_bytes())
                raise StepOutOfMemory("worker 1 on cpu ran out of memory (simulated)")
            after.append(shared_bytes())  # between the steps that decode once more what was taken
        return real(kind, *arguments, **options)

    vae.chunk = 2
    whole = vae.decode(wide).clone()  # which shares nothing
    vae.chunk = 1
    # A chunk of one can't be made smaller; this one is of a shortage that another chunk brought.
    monkeypatch.setattr(PoolRun, "_attempt", _with_begun(PoolRun._attempt))
    monkeypatch.setattr(vae._engine, "gather", gather)
    with contextlib.closing(vae.decode_stream(wide)) as stream:
        for frames in stream:
            taken.append(frames)
    torch.testing.assert_close(torch.cat(taken, dim=1), whole, **CLOSE)
    assert shortages
    assert len(after) >= 5
    before = sum(frames.nbytes for frames in taken[:5])
    assert max(after) < 0.6 * before


def _with_begun(attempt):
    def begun(run, chunk):
        for count in attempt(run, chunk):
            run._begun = 2
            yield count

    return begun


def test_no_memory_on_the_host_is_an_error_of_ours_and_the_next_decode_works(vae, latents, expected, monkeypatch):
    def nothing_left(_size):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(SharedMemory, "create", nothing_left)
        with pytest.raises(wvp.OutOfMemoryError, match="where this process gets no more"):
            vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_nothing_goes_to_dev_shm(vae, latents):
    # It has 64 MB in a default container, and a full one kills processes.
    names = shared_names()
    sizes = []
    vae.decode(latents, on_chunk=lambda *_: sizes.append(shared_names() - names))
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
