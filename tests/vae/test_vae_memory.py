"""A decode on one device whose memory is short: smaller chunks, the same frames, or an error that says what fits."""

from __future__ import annotations

import logging
import os

import pytest
import torch

import wan_vae_parallel as wvp
from tests.oracle import random_latents
from tests.processes import resident_bytes
from wan_vae_parallel import memory
from wan_vae_parallel.runtime.local import LocalDecoder

CLOSE = {"atol": 1e-5, "rtol": 0}


def fail_beyond(monkeypatch, largest, *, at_step, error=None):
    """Chunks larger than ``largest`` run out of memory at their step number ``at_step``; returns the chunks tried."""
    real, tried = LocalDecoder.stream, []

    def stream(self, latents, chunk):
        tried.append(chunk)
        for step, frames in enumerate(real(self, latents, chunk)):
            if chunk > largest and step == at_step:
                raise error or torch.OutOfMemoryError("CUDA out of memory (simulated)\nand more lines")
            yield frames

    monkeypatch.setattr(LocalDecoder, "stream", stream)
    return tried


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
# Before any frame, behind the first one, with several handed out.
@pytest.mark.parametrize("at_step", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_out_of_memory_goes_on_with_smaller_chunks_and_the_same_frames(
    family, family_vae, monkeypatch, caplog, at_step, batch
):
    latents = random_latents(family, frames=9, rows=2, columns=2, batch=batch)
    monkeypatch.setattr(family_vae, "chunk", 1)
    expected = family_vae.decode(latents)
    monkeypatch.setattr(family_vae, "chunk", 8)
    tried = fail_beyond(monkeypatch, 1, at_step=at_step)
    calls = []
    with caplog.at_level(logging.WARNING):
        decoded = family_vae.decode(latents, on_chunk=lambda done, _, frames: calls.append((done, frames.clone())))
    assert tried == [8, 4, 2, 1]
    # Each frame once, in order.
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[-1] == 33
    assert torch.equal(torch.cat([call[1] for call in calls], dim=1), decoded)
    torch.testing.assert_close(decoded, expected, **CLOSE)
    # Said once, not for every reduction.
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cpu ran out of memory with chunk 8; going on with smaller chunks, same frames" in warnings[0]


def test_a_decode_that_ran_out_of_memory_once_does_not_make_later_ones_smaller(vae, latents, monkeypatch):
    vae.chunk = 4
    with monkeypatch.context() as patch:
        fail_beyond(patch, 1, at_step=1)
        vae.decode(latents)
    tried = fail_beyond(monkeypatch, 100, at_step=0)
    vae.decode(latents)
    assert tried == [4]


# torch's CPU allocator raises a plain RuntimeError, with this text.
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_when_not_even_one_latent_frame_fits_the_error_names_sizes_and_ways_out(vae, latents, monkeypatch, error):
    with monkeypatch.context() as patch:
        fail_beyond(patch, 0, at_step=1, error=error)
        with pytest.raises(wvp.OutOfMemoryError) as raised:
            vae.decode(latents)
    text = str(raised.value)
    assert text.startswith("24x16 does not fit on cpu even one latent frame at a time: it takes about ")
    assert "iB, and " in text
    assert "would fit" in text
    assert "decode on the CPU" not in text  # where it does already
    assert str(error) in text
    assert isinstance(raised.value, MemoryError)
    assert torch.equal(vae.decode(latents), vae.decode(latents))  # and the VAE still works


def test_a_batch_that_does_not_fit_is_advised_to_go_one_by_one(vae, monkeypatch):
    fail_beyond(monkeypatch, 0, at_step=0)
    with pytest.raises(wvp.OutOfMemoryError, match="decode the batch of 3 one by one"):
        vae.decode(random_latents("wan2.1", frames=2, rows=2, columns=2, batch=3))


def test_other_errors_are_no_reason_to_try_again(vae, latents, monkeypatch):
    tried = fail_beyond(monkeypatch, 0, at_step=1, error=RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        vae.decode(latents)
    assert tried == [2]


def test_a_real_shortage_of_host_memory_goes_the_same_way(vae, latents, monkeypatch):
    # What torch itself raises for more than there is, once, in the middle of a decode.
    real, shortages = LocalDecoder.stream, []

    def stream(self, video, chunk):
        for step, frames in enumerate(real(self, video, chunk)):
            if chunk == 2 and step == 2:
                shortages.append(chunk)
                torch.empty(2**55, dtype=torch.uint8)
            yield frames

    expected = vae.decode(latents)
    monkeypatch.setattr(LocalDecoder, "stream", stream)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert shortages == [2]


def test_frames_that_the_host_can_not_hold_are_refused_before_decoding(vae, latents, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.memory.free_memory", lambda _device: 1000)
    with pytest.raises(wvp.OutOfMemoryError) as raised:
        vae.decode(latents)
    assert "21 frames of 24x16 take 0.1 MiB of the computer's own memory (RAM), where 0.0 MiB" in str(raised.value)
    assert str(raised.value) == raised.value.text + ", or take the frames from decode_stream"
    # Which is true: the stream needs no whole video.
    assert sum(frames.shape[1] for frames in vae.decode_stream(latents)) == 21


def test_a_limit_of_this_process_alone_is_an_error_of_ours(vae, latents, monkeypatch):
    real = torch.empty

    def empty(*sizes, **options):
        whole = sizes == (vae.output_shape(latents.shape),)
        return real(2**60, dtype=torch.uint8) if whole else real(*sizes, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(wvp.OutOfMemoryError, match=r"21 frames of 24x16 take .* this process gets no more; free"):
        vae.decode(latents)


def test_a_stream_short_of_memory_is_not_advised_to_stream(vae, latents, monkeypatch):
    def empty_like(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "empty_like", empty_like)
    with pytest.raises(wvp.OutOfMemoryError, match=r"this process gets no more; free some of it") as raised:
        next(vae.decode_stream(latents))
    assert "decode_stream" not in str(raised.value)


def test_a_larger_batch_needs_more_memory(vae):
    assert vae.memory_needed((64, 16, 1, 90, 160)) > 2 * vae.memory_needed((1, 16, 1, 90, 160))


def test_a_chunk_that_the_cpu_chooses_is_no_more_than_keeps_it_busy(vae, latents, monkeypatch):
    # As for frames of a real size: those of a test are so small that all go at once.
    vae.chunk = "auto"
    tried = fail_beyond(monkeypatch, 100, at_step=100)
    vae.decode(latents)
    all_at_once = vae.memory_needed(latents.shape)
    monkeypatch.setattr("wan_vae_parallel.memory._CPU_PIXELS", 0)
    vae.decode(latents)
    assert tried == [5, 1]
    assert vae.memory_needed(latents.shape) < all_at_once


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.skipif(not memory._malloc_trim(), reason="another C library")
def test_a_decode_on_the_cpu_leaves_no_holes_in_the_hosts_memory(vae, latents):
    vae.decode(latents)
    # What stays between large blocks keeps the allocator from giving these back itself.
    blocks = [torch.ones(2**14) for _ in range(4000)]
    del blocks[:-1]
    before = resident_bytes()
    vae.decode(latents)
    assert resident_bytes() < before - 200 * 2**20
    del blocks
