"""Encodes on workers: one set of processes with decodes, and every fault that decodes know."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import wan_vae_parallel as wvp
from tests.processes import gone, patience, wait_until
from tests.workers.pool.common import CLOSE, at, pids
from wan_vae_parallel.workers.encode_run import PoolEncodeRun
from wan_vae_parallel.workers.failures import _failure


@pytest.fixture(scope="module")
def frames():
    return torch.rand((1, 17, 32, 24, 3), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def encoded(path, frames):
    with wvp.load_vae(path, devices="cpu", chunk=1) as alone:
        return alone.encode(frames)


@pytest.fixture
def encoder(vae, frames, encoded):
    """The warm pool; after the test it must encode right, whatever was done to it."""
    yield vae
    torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)


def test_decodes_and_encodes_share_the_processes(encoder, latents, expected, frames, encoded):
    before = pids(encoder)
    for _ in range(2):
        torch.testing.assert_close(encoder.encode(frames), encoded, **CLOSE)
        torch.testing.assert_close(encoder.decode(latents), expected, **CLOSE)
    assert pids(encoder) == before


def test_weights_are_taken_when_they_are_wanted(path, latents, expected, frames, encoded):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        pool = vae._engine
        torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)
        assert pool.parts == {"encoder"}
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
        assert pool.parts == {"encoder", "decoder"}
        before = pids(vae)
        assert vae.park()
        assert pool.parts == set()
        torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)
        assert pool.parts == {"encoder"}
        assert pids(vae) == before


def test_videos_of_a_batch_and_of_other_sizes(encoder, path):
    videos = [torch.rand(2, 5, 16, 40, 3), torch.rand(1, 1, 8, 8, 3), torch.rand(1, 9, 64, 16, 3)]
    with wvp.load_vae(path, devices="cpu", chunk=2) as alone:
        for video in videos:
            torch.testing.assert_close(encoder.encode(video), alone.encode(video), **CLOSE)


def test_a_worker_that_is_killed_is_an_error_and_the_next_encode_starts_new_ones(encoder, frames):
    before = pids(encoder)
    with pytest.raises(wvp.WorkerError, match="worker 1 on cpu died with exit code -9"):
        encoder.encode(frames, on_chunk=at(2, lambda: os.kill(before[1], signal.SIGKILL)))
    assert all(map(gone, before))


def test_a_worker_killed_before_it_begins_costs_no_error(encoder, frames, caplog):
    expected, before = encoder.encode(frames), pids(encoder)
    pool = encoder._engine
    real = pool.tell

    def tell(kind, *message):
        if kind == "encode" and pids(encoder) == before:
            os.kill(before[1], signal.SIGKILL)
        real(kind, *message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "tell", tell)
        torch.testing.assert_close(encoder.encode(frames), expected, **CLOSE)
    assert all(map(gone, before))
    assert "worker 1 on cpu died with exit code -9 since it was used last; starting new ones" in caplog.text


def test_a_worker_that_is_stopped_is_an_error_that_names_it(encoder, frames, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.workers.crew._SILENCE_SECONDS", 2.0)
    before = pids(encoder)
    with pytest.raises(wvp.WorkerError, match=r"worker 0 on cpu is not answering"):
        encoder.encode(frames, on_chunk=at(2, lambda: os.kill(before[0], signal.SIGSTOP)))
    assert all(map(gone, before))


@pytest.mark.parametrize("when", [1, 3])
def test_what_a_callback_raises_ends_the_encode_and_keeps_the_workers(encoder, frames, when):
    before = pids(encoder)

    def stop():
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        encoder.encode(frames, on_chunk=at(when, stop))
    assert pids(encoder) == before


def test_on_wait_ends_it_within_a_second(encoder, frames):
    before, began = pids(encoder), []

    def stop():
        began.append(time.monotonic())
        raise TimeoutError("cancelled")

    with pytest.raises(TimeoutError, match="cancelled"):
        encoder.encode(frames, on_wait=stop)
    assert time.monotonic() - began[0] < patience(1)
    assert pids(encoder) == before


def test_what_a_streams_source_raises_keeps_the_workers(encoder, frames):
    before = pids(encoder)

    def source():
        yield frames[0, :9]
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        list(encoder.encode_stream(source()))
    assert pids(encoder) == before


def test_frames_with_nan_keep_the_workers(encoder, frames):
    before, bad = pids(encoder), frames.clone()
    bad[0, 9, 20, 5, 1] = torch.nan  # in the second one's rows
    with pytest.raises(wvp.FrameError, match="NaN or infinite"):
        encoder.encode(bad)
    assert pids(encoder) == before


def test_a_stream_that_is_dropped_frees_the_workers(encoder, frames, latents, expected):
    stream = encoder.encode_stream(frames[0].split(4))
    next(stream)
    with pytest.raises(wvp.BusyError, match="open in this very thread"):
        encoder.decode(latents)
    stream.close()
    torch.testing.assert_close(encoder.decode(latents), expected, **CLOSE)


def test_threads_wait_for_one_another(encoder, frames, encoded, latents, expected):
    results = {}

    def work(name, call, given):
        results[name] = call(given)

    threads = [
        threading.Thread(target=work, args=("encoded", encoder.encode, frames)),
        threading.Thread(target=work, args=("decoded", encoder.decode, latents)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results["encoded"], encoded, **CLOSE)
    torch.testing.assert_close(results["decoded"], expected, **CLOSE)


def test_closing_from_another_thread_ends_it(path, frames):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        workers = []

        def close():
            workers.extend(pids(vae))
            threading.Thread(target=vae.close).start()
            assert wait_until(lambda: all(map(gone, workers)), patience(10))

        with pytest.raises(wvp.ClosedError):
            vae.encode(frames, on_chunk=at(2, close))


def test_out_of_memory_in_a_worker_goes_on_with_a_smaller_chunk_and_the_same_latents(
    encoder, frames, encoded, monkeypatch, caplog
):
    encoder.chunk = 4
    real, chunks = PoolEncodeRun._open_rings, []

    def open_rings(run, chunk):
        chunks.append(chunk)
        if len(chunks) == 1:
            raise _failure(run._pool.workers[1], "memory", "OutOfMemoryError: CUDA out of memory")
        return real(run, chunk)

    monkeypatch.setattr(PoolEncodeRun, "_open_rings", open_rings)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(encoder.encode(frames), encoded, **CLOSE)
    assert chunks == [4, 2]
    assert "going on with chunk 2, same latents" in caplog.text
    chunks.clear()
    encoder.release()
    with pytest.raises(wvp.OutOfMemoryError, match="a stream can't be read again"):
        list(encoder.encode_stream([frames[0]]))


@pytest.mark.parametrize("chunk", [2, 4, 5])
def test_a_picture_and_equal_frames_behind_it(encoder, path, chunk):
    # What a step makes of many repeats has its place in the ring of latents.
    video = torch.full((1, 81, 8, 16, 3), 0.5)
    video[:, 0] = torch.rand(8, 16, 3)
    with wvp.load_vae(path, devices="cpu", chunk=chunk) as alone:
        expected = alone.encode(video)
    encoder.chunk = chunk
    torch.testing.assert_close(encoder.encode(video), expected, **CLOSE)
    parts = list(encoder.encode_stream(video[0].split(7)))
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, **CLOSE)
    assert len(parts) >= 4  # they come as they are known, not all at the end


def test_a_stream_may_go_on_in_another_inference_mode(encoder, frames, encoded):
    with torch.inference_mode():
        stream = encoder.encode_stream(frames[0].split(4))
        parts = [next(stream).clone()]
    parts += list(stream)
    torch.testing.assert_close(torch.cat(parts, dim=2), encoded, **CLOSE)


def mapped(pid):
    """Which of the engine's shared memories a process has mapped, by inode."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:wan-vae-parallel" in line}


def test_shared_memory_stays_for_the_next_encode_of_the_size_and_no_longer(path, frames, encoded, monkeypatch):
    others = mapped("self")

    def mapped_here():
        return mapped("self") - others

    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)
        mine, workers = mapped_here(), pids(vae)
        assert len(mine) == 2
        assert wait_until(lambda: all(mapped(pid) == mine for pid in workers), patience(10))
        # Of what lay there before nothing is seen: other frames, other latents.
        other = vae.encode(frames.flip(1))
        assert mapped_here() == mine
        torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)
        torch.testing.assert_close(vae.encode(frames.flip(1)), other, **CLOSE)
        assert mapped_here() == mine
        # Another size has its own, and the first one's goes.
        vae.encode(frames[:, :, :16])
        assert len(mapped_here()) == 2
        assert not mapped_here() & mine
        assert wait_until(lambda: all(mapped(pid) == mapped_here() for pid in workers), patience(10))
        assert vae.park()
        assert wait_until(lambda: not mapped_here() and not any(map(mapped, workers)), patience(10))
        # What is large goes with the encode.
        monkeypatch.setattr("wan_vae_parallel.workers.encode_run._KEPT_BYTES", 0)
        for _ in range(2):
            torch.testing.assert_close(vae.encode(frames), encoded, **CLOSE)
            assert wait_until(lambda: not mapped_here() and not any(map(mapped, workers)), patience(10))
        assert pids(vae) == workers


def test_shared_memory_goes_with_the_workers_from_one_vae_to_another(path, frames, encoded):
    with (
        wvp.load_vae(path, devices="cpu,cpu", chunk=1) as one,
        wvp.load_vae(path, devices="cpu,cpu", chunk=2) as other,
    ):
        torch.testing.assert_close(one.encode(frames), encoded, **CLOSE)
        for taker, owner in ((other, one), (one, other), (other, one)):
            before = pids(owner)
            taker.take_over(owner)
            assert not owner._engine.rings
            torch.testing.assert_close(taker.encode(frames), encoded, **CLOSE)
            assert pids(taker) == before
