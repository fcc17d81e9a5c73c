"""A pool of workers in use: callbacks, threads, streams, its end; with real processes on the CPU."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.oracle import decode_at_once
from tests.processes import (
    children,
    gone,
    listening,
    open_files,
    shared_files,
    shared_maps,
    wait_until,
)
from tests.workers.pool.common import CLOSE, FRAMES, at, pids


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
            assert wait_until(partial(_no_memory_open, pid), 5)


def _no_memory_open(pid):
    return not [file for file in open_files(pid) if file.startswith("/memfd:wan-vae-parallel ")]


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
        with pytest.raises(wvp.DeviceError, match="frames are NaN: in float16 the activations overflow"):
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
    for frames, one in zip(decode_at_once(vae, videos), right, strict=True):
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
        with pytest.raises(wvp.ClosedError, match="closed while it worked"):
            next(stream)
        with pytest.raises(wvp.ClosedError, match="closed"):
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
    with pytest.raises(wvp.WanVAEError, match="another decode or encode of this VAE is open"):
        vae.decode(latents, on_chunk=lambda *_: vae.decode(latents))


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


def test_one_line_a_decode_names_all_that_counts(vae, latents, caplog):
    vae.release()
    with caplog.at_level(logging.INFO):
        vae.decode(latents)
        vae.decode(latents)
        vae.park()
        vae.decode(latents)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    about = r"decoded 13 frames of 24x32 on cpu: rows 0-1, cpu: rows 2-3, in float32, chunk 1, in [\d.]+ s "
    found = [re.fullmatch(about + r"\((.*)\)", line) for line in lines]
    assert [match and match[1] for match in found] == ["first", "warm", "after giving memory back"]


def test_more_workers_than_rows_are_said_to_be_idle(vae, caplog):
    with caplog.at_level(logging.INFO):
        vae.decode(torch.zeros(1, 16, 1, 1, 1))
    assert "1 of 2 devices not used, for want of latent rows" in caplog.text
