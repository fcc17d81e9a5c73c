"""Decodes that begin in this process while the workers start; with real processes on the CPU.

There frames of one device and of several differ in the last bits, and so no decode begins so but in these tests.
tests/gpu/test_pool_gpu.py compares bits.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.forking import Gate
from tests.oracle import decode_at_once
from tests.processes import gone, patience, shared_bytes, wait_until
from tests.workers.pool.common import CLOSE, FRAMES, at, pids
from wan_vae_parallel.ops.gpu import H200
from wan_vae_parallel.ops.pixel_format import YUV420
from wan_vae_parallel.runtime.engine import LocalEngine
from wan_vae_parallel.runtime.local import LocalDecoder
from wan_vae_parallel.workers.meanwhile import MeanwhileRun
from wan_vae_parallel.workers.pool import WorkerPool

ALONE = "on cpu alone, while the workers start"


class Interrupt(BaseException):
    """As the newest ComfyUI's, which is no Exception."""


@pytest.fixture(autouse=True)
def _begins_here(monkeypatch, caplog):
    """Decodes begin in this process, and the workers cost nothing but their steps."""
    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(lambda *_: True))
    monkeypatch.setattr("wan_vae_parallel.workers.meanwhile._BEGIN_SECONDS", 0.0)
    caplog.set_level(logging.INFO)


@pytest.fixture(autouse=True)
def gate(_forks):
    """Workers begin to load when a test waits for them, or a decode does that can't go on without them."""
    shut, start = Gate(_forks), WorkerPool.start

    def start_and_open(pool, part):
        shut.open()
        start(pool, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "start", start_and_open)
        yield shut
    shut.open()


@pytest.fixture
def fresh(path):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        yield vae


def come(vae, gate):
    """Waits, within a decode, until the workers are ready."""
    gate.open()
    assert wait_until(lambda: vae._engine.advance("decoder"), 120)


def come_idle(vae, gate):
    """Waits, between decodes, until the workers are ready."""
    gate.open()

    def ready():
        vae._engine.settle()
        return vae._engine.stage == "ready"

    assert wait_until(ready, 120)


def held_here(vae):
    """Whether this process has the decoder's weights."""
    return vae._engine._local.running


def test_a_decode_ends_here_before_the_workers_are_there_and_the_next_one_is_theirs(
    fresh, latents, expected, caplog, gate
):
    before, held = pids(fresh), []
    frames = fresh.decode(latents, on_chunk=at(5, lambda: held.append((fresh.loaded, fresh.loaded_parts))))
    assert torch.equal(frames, expected)
    assert held == [(True, {"decoder"})]
    assert not held_here(fresh)
    assert ALONE in caplog.text
    assert "(first)" in caplog.text
    assert fresh.worked_on == fresh.devices[:1]
    # They have been told to load, and are not waited for.
    assert fresh._engine.stage == "loading"
    come_idle(fresh, gate)
    caplog.clear()
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert "on cpu: rows 0-1, cpu: rows 2-3" in caplog.text
    assert fresh.worked_on == fresh.devices
    assert pids(fresh) == before


def test_decodes_begin_here_until_the_workers_have_their_modules(fresh, latents, expected, caplog, gate):
    before = pids(fresh)
    for _ in range(2):
        torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
        assert ALONE in caplog.text
        caplog.clear()
    gate.open()
    assert wait_until(lambda: fresh._engine.listen() or all(one.prepared for one in fresh._engine.workers), 120)
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert ALONE not in caplog.text
    assert pids(fresh) == before


def test_workers_that_are_sooner_go_on_from_there(fresh, latents, expected, caplog, gate):
    before, parts, after = pids(fresh), [], []

    def on_chunk(done, total, newest):
        parts.append(newest.clone())
        if len(parts) == 2:
            come(fresh, gate)
        if len(parts) == 3:
            after.append((held_here(fresh), fresh._engine.stage, fresh.worked_on))
        assert done == sum(part.shape[1] for part in parts)
        assert total == FRAMES

    frames = fresh.decode(latents, on_chunk=on_chunk)
    torch.testing.assert_close(frames, expected, **CLOSE)
    assert torch.equal(torch.cat(parts, dim=1), frames)
    assert after == [(False, "ready", fresh.devices)]
    assert "on cpu, then cpu: rows 0-1, cpu: rows 2-3" in caplog.text
    assert pids(fresh) == before
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert pids(fresh) == before


@pytest.mark.slow
def test_workers_that_would_end_later_do_not(fresh, latents, expected, caplog, gate):
    # Four frames are left, and they would begin with the first of 13.
    frames = fresh.decode(latents, on_chunk=at(9, lambda: come(fresh, gate)))
    assert torch.equal(frames, expected)
    assert ALONE in caplog.text
    assert fresh._engine.stage == "ready"


def test_a_stream_goes_over_and_keeps_no_frames_that_were_taken(path, fresh, gate):
    wide = torch.randn((1, 16, 6, 4, 40), generator=torch.Generator().manual_seed(1))
    with wvp.load_vae(path, devices="cpu", chunk=1) as alone:
        expected = alone.decode(wide)
    parts, most = [], 0
    for frames in fresh.decode_stream(wide):
        parts.append(frames)
        if len(parts) == 2:
            come(fresh, gate)
        most = max(most, shared_bytes())
    whole = torch.cat(parts, dim=1)
    torch.testing.assert_close(whole, expected, **CLOSE)
    assert fresh.worked_on == fresh.devices
    assert 0 < most < 0.6 * whole.nbytes


def test_pixels_of_a_file_go_over(path, fresh, latents, gate):
    with wvp.load_vae(path, devices="cpu", chunk=1) as alone:
        expected = torch.cat([part.clone() for part in alone.pixel_stream(latents, YUV420)], dim=1)
    parts = []
    for pixels in fresh.pixel_stream(latents, YUV420):
        parts.append(pixels.clone())
        if len(parts) == 2:
            come(fresh, gate)
    assert fresh.worked_on == fresh.devices
    together = torch.cat(parts, dim=1)
    assert together.shape == expected.shape
    # Of floats that differ in their last bits some may be rounded to the next integer.
    assert (together != expected).float().mean() < 0.001


# Memory.


@pytest.mark.parametrize("when", ["weights", "first", pytest.param("later", marks=pytest.mark.slow)])
def test_without_the_memory_here_the_workers_decode(fresh, latents, expected, caplog, monkeypatch, when):
    before, parts = pids(fresh), []
    real, steps = LocalDecoder.stream, {"weights": 0, "first": 0, "later": 3}[when]

    def short(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    def stream(*arguments, **options):
        for _, frames in zip(range(steps), real(*arguments, **options), strict=False):
            yield frames
        short()

    if when == "weights":
        monkeypatch.setattr(LocalDecoder, "__init__", short)
    else:
        monkeypatch.setattr(LocalDecoder, "stream", stream)
    frames = fresh.decode(latents, on_chunk=lambda *call: parts.append(call[2].clone()))
    torch.testing.assert_close(frames, expected, **CLOSE)
    assert torch.equal(torch.cat(parts, dim=1), frames)
    assert "cpu has not the memory to decode alone; the workers go on, same frames" in caplog.text
    assert ("on cpu, then cpu: rows" if steps else "on cpu: rows") in caplog.text
    assert not held_here(fresh)
    assert pids(fresh) == before


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), "auto"])
def test_a_decode_that_does_not_fit_here_by_arithmetic_does_not_begin(
    fresh, latents, expected, caplog, monkeypatch, chunk
):
    steps = []
    monkeypatch.setattr("wan_vae_parallel.workers.meanwhile.free_memory", lambda _: 2**20)
    monkeypatch.setattr(LocalDecoder, "stream", lambda *_: steps.append(True))
    fresh.chunk = chunk
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert not steps
    assert "cpu has not the memory to decode alone" in caplog.text
    assert "on cpu: rows" in caplog.text


def test_where_bits_would_differ_the_workers_decode(fresh, latents, expected, caplog, monkeypatch):
    # What is known only once the weights are loaded and measured.
    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(lambda _devices, _dtype, decoder=None: decoder is None))
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert "on cpu: rows" in caplog.text
    assert not held_here(fresh)


def test_where_a_decode_may_begin_here(fresh, monkeypatch):
    monkeypatch.undo()
    for dtype in (torch.float32, torch.bfloat16):
        assert not MeanwhileRun.possible(fresh.devices, dtype)  # CPUs
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    facts = {"kernels": [True, True], "models": [H200, H200], "ours": True, "shared": True, "forked": False}

    def possible(**changed):
        now = {**facts, **changed}
        module = "wan_vae_parallel.workers.meanwhile"
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.kernels_expected", lambda device, _: now["kernels"][device.index])
            patch.setattr(f"{module}.gpu", lambda device: now["models"][device.index])
            patch.setattr(f"{module}.takes_processes", lambda _: now["shared"])
            patch.setattr(torch.cuda, "_is_in_bad_fork", lambda: now["forked"])
            decoder = SimpleNamespace(kernels=now["ours"])
            return [MeanwhileRun.possible(devices, torch.bfloat16, one) for one in (None, decoder)]

    assert possible() == [True, True]
    assert possible(ours=False) == [True, False]  # as layers are measured
    assert possible(kernels=[True, False]) == [False, False]
    assert possible(models=[H200, H200._replace(capability=(8, 9))]) == [False, False]
    assert possible(shared=False) == [False, False]
    assert possible(forked=True) == [False, False]


def test_what_workers_hold_that_were_not_waited_for_is_told(fresh, latents, gate):
    fresh.decode(latents)
    assert fresh.memory_held == fresh.weights_size
    assert fresh.memory_to_start > 0
    gate.open()
    assert wait_until(lambda: fresh.memory_to_start == 0, 120)
    assert fresh._engine.stage == "ready"


def test_workers_that_were_not_waited_for_can_be_parked(fresh, latents, expected, gate):
    before, pool = pids(fresh), fresh._engine
    fresh.decode(latents)
    gate.open()
    assert wait_until(lambda: pool.listen() or len(pool._early.get("ready", {})) == 2, 120)
    assert pool.stage == "loading"
    assert fresh.park()
    assert (fresh.loaded, fresh._engine.stage) == (False, "parked")
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert pids(fresh) == before


# Faults.


@pytest.mark.parametrize(("send", "words"), [(signal.SIGKILL, "exit code -9"), (signal.SIGSTOP, "is not answering")])
def test_a_worker_that_falls_meanwhile_fails_no_decode(fresh, latents, expected, caplog, monkeypatch, send, words):
    monkeypatch.setattr("wan_vae_parallel.workers.crew._SILENCE_SECONDS", 0.5)
    before = pids(fresh)

    def strike():
        os.kill(before[1], send)
        time.sleep(1)

    assert torch.equal(fresh.decode(latents, on_chunk=at(5, strike)), expected)
    assert ALONE in caplog.text
    assert f"worker 1 on cpu {'died with' if send == signal.SIGKILL else ''}" in caplog.text
    assert words in caplog.text
    assert "the next call starts new ones" in caplog.text
    assert all(map(gone, before))
    assert not fresh.loaded
    monkeypatch.undo()
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert not set(pids(fresh)) & set(before)


def test_workers_that_can_not_begin_fail_no_decode(path, latents, expected, caplog, monkeypatch):
    def refused(*_args):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("wan_vae_parallel.workers.pool.WorkerProcess", refused)
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        assert torch.equal(vae.decode(latents), expected)
    assert "workers can't start" in caplog.text


def test_a_worker_that_fell_before_costs_no_wait(fresh, latents, expected, caplog, gate):
    fresh.decode(latents)
    come_idle(fresh, gate)
    gate.shut()
    before = pids(fresh)
    os.kill(before[1], signal.SIGKILL)
    assert wait_until(lambda: not fresh._engine.workers[1].alive, 5)
    caplog.clear()
    assert torch.equal(fresh.decode(latents), expected)
    assert ALONE in caplog.text
    assert "starting new ones" in caplog.text
    assert not set(pids(fresh)) & set(before)


@pytest.mark.parametrize("when", ["weights", "steps"])
def test_a_cancelled_decode_leaves_no_memory_here_and_the_workers(fresh, latents, expected, monkeypatch, when):
    before, called, parts, freed = pids(fresh), [], [], []
    real = LocalEngine.free_cached
    monkeypatch.setattr(LocalEngine, "free_cached", lambda engine: freed.append(real(engine)))

    def cancel():
        called.append(time.monotonic())
        if len(parts) == 3 or (when == "weights" and len(called) == 20):
            raise Interrupt

    with pytest.raises(Interrupt):
        fresh.decode(latents, on_wait=cancel, on_chunk=lambda *call: parts.append(call))
    assert len(parts) == (0 if when == "weights" else 3)
    assert len(freed) == 1
    assert time.monotonic() - called[-1] < patience(1)
    assert not held_here(fresh)
    assert pids(fresh) == before
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)


def test_an_interrupt_holds_no_memory_however_long_it_is_kept(fresh, latents, expected, monkeypatch):
    real, decoders = LocalDecoder.stream, []

    def stream(decoder, *arguments, **options):
        decoders.append(weakref.ref(decoder))
        for count, frames in enumerate(real(decoder, *arguments, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield frames

    before = pids(fresh)
    with monkeypatch.context() as patch:
        patch.setattr(LocalDecoder, "stream", stream)
        with pytest.raises(KeyboardInterrupt) as raised:
            fresh.decode(latents)
    gc.collect()
    assert decoders[0]() is None
    assert raised.value is not None
    assert pids(fresh) == before
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)


def test_an_interrupt_while_workers_are_told_ends_them(fresh, latents, expected, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = pids(fresh)
    for name in ("tell", "listen"):
        with monkeypatch.context() as patch:
            patch.setattr(fresh._engine, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                fresh.decode(latents)
        assert all(map(gone, before))
        assert not fresh.loaded
        assert torch.equal(fresh.decode(latents), expected)
        before = pids(fresh)


def test_closing_from_another_thread_ends_both(path, latents):
    vae = wvp.load_vae(path, devices="cpu,cpu", chunk=1)
    before, errors, entered, go = pids(vae), [], threading.Event(), threading.Event()

    def hold():
        entered.set()
        assert go.wait(60)

    def decode():
        try:
            vae.decode(latents, on_chunk=at(5, hold))
        except wvp.WanVAEError as error:
            errors.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    assert entered.wait(60)
    vae.close()
    assert all(map(gone, before))
    go.set()
    thread.join(60)
    assert [type(error) for error in errors] == [wvp.ClosedError]
    assert not vae.loaded
    assert pids(vae) == []


@pytest.mark.slow
def test_a_release_from_another_thread_starts_no_workers_anew(fresh, latents, expected):
    before = pids(fresh)
    released = at(5, lambda: in_a_thread(fresh.release))
    assert torch.equal(fresh.decode(latents, on_chunk=released), expected)
    assert all(map(gone, before))
    assert pids(fresh) == []
    assert not fresh.loaded


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)


def test_a_stream_that_is_dropped_leaves_no_memory_here_and_the_workers(fresh, latents, expected, gate):
    before = pids(fresh)
    stream = fresh.decode_stream(latents)
    for _ in range(3):
        next(stream)
    assert held_here(fresh)
    assert not fresh.park()
    del stream
    assert not held_here(fresh)
    come_idle(fresh, gate)
    torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
    assert pids(fresh) == before


def test_a_stream_may_be_handed_to_another_thread_and_one_thread_has_one(fresh, latents, expected):
    stream = fresh.decode_stream(latents)
    parts = [next(stream)]
    with pytest.raises(wvp.BusyError, match="another decode or encode of this VAE is open in this very thread"):
        fresh.decode(latents)
    in_a_thread(lambda: parts.extend(stream))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert torch.equal(fresh.decode(latents), expected) or fresh.worked_on == fresh.devices


def test_two_threads_at_once(fresh, latents, expected):
    others = latents.flip(-1).contiguous()
    frames = decode_at_once(fresh, [latents, others])
    torch.testing.assert_close(frames[0], expected, **CLOSE)
    torch.testing.assert_close(fresh.decode(others), frames[1], **CLOSE)


def test_a_fork_of_this_process_leaves_decode_and_workers_alone(fresh, latents, expected):
    before = pids(fresh)
    stream = fresh.decode_stream(latents)
    parts = [next(stream)]
    pid = os.fork()
    if not pid:
        stream.close()
        os._exit(0 if len(fresh._engine.workers) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    parts.extend(stream)
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert pids(fresh) == before


def test_a_vae_takes_over_workers_that_still_load(path, fresh, latents, expected, tmp_path, gate):
    weights = load_file(path)
    weights["decoder.conv1.weight"] = weights["decoder.conv1.weight"] * 0.5
    save_file(weights, tmp_path / "other.safetensors")
    with (
        wvp.load_vae(tmp_path / "other.safetensors", devices="cpu", chunk=1) as alone,
        wvp.load_vae(tmp_path / "other.safetensors", devices="cpu,cpu", chunk=1) as other,
    ):
        fresh.decode(latents)
        before, own = pids(fresh), pids(other)
        other.take_over(fresh)
        assert pids(other) == before
        assert all(map(gone, own))
        assert (fresh.loaded, other.loaded_parts) == (False, frozenset())
        come_idle(other, gate)
        torch.testing.assert_close(other.decode(latents), alone.decode(latents), **CLOSE)
        assert other.loaded_parts == {"decoder"}
        # Which have both weights.
        fresh.take_over(other)
        assert fresh.loaded_parts == {"decoder"}
        torch.testing.assert_close(fresh.decode(latents), expected, **CLOSE)
        assert pids(fresh) == before
