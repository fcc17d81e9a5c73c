"""Several workers that write a video's pixels, each of its own rows; as real processes on the CPU."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import wan_vae_parallel as wvp
from tests.processes import shared_bytes
from tests.workers.pool.common import at, pids
from wan_vae_parallel.files.ffmpeg import FedProcess
from wan_vae_parallel.files.video_in import VideoInput
from wan_vae_parallel.ops.pixel_format import GBR_16, RGB_16, YUV420, YUVA420

# The fixture's latents are 4 x 3: two workers split rows there, and columns of what has more of them.


def stream(vae, latents, pixels):
    return torch.cat([part.clone() for part in vae.pixel_stream(latents, pixels)], dim=1)


@pytest.mark.parametrize(
    ("pixels", "transposed"),
    [
        (YUV420, False),
        (YUV420, True),
        (RGB_16, False),
        pytest.param(YUVA420.alpha_alone, False, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_each_worker_writes_its_rows_of_every_plane(warm, latents, pixels, transposed):
    if transposed:
        latents = latents.transpose(3, 4)
    together, frames = stream(warm, latents, pixels), warm.decode(latents)
    expected = pixels.convert(frames)
    assert together.shape == expected.shape
    # Of floats that differ in their last bits some may be rounded to the next integer.
    assert (together != expected).float().mean() < 0.001
    size = frames.shape[2:4]
    worst = max(
        (pixels.picture(one, *size) - pixels.picture(other, *size)).abs().max()
        for one, other in zip(together[0], expected[0], strict=True)
    )
    assert worst < 0.02


def test_two_vaes_make_colours_and_alpha_with_the_same_workers(vae, path, latents, tmp_path):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=2) as alpha:
        before = pids(vae)
        for name in ("one.mkv", "other.mkv"):
            vae.decode_to_video(latents, tmp_path / name, format="ffv1", vae_alpha=alpha)
            assert pids(vae) == before
            assert pids(alpha) == []
    with VideoInput(tmp_path / "other.mkv", colours=4) as video:
        found = torch.cat(list(video))
    # Both have the same weights here.
    assert (found[..., 3] - found[..., 0]).abs().max() < 1e-4
    assert (found[..., :3] - vae.decode(latents)[0]).abs().max() < 1e-4


def test_a_long_video_takes_no_more_shared_memory_than_a_short_one(warm):
    peaks = []
    for frames in (6, 14):
        latents = torch.randn((1, 16, frames, 4, 8), generator=torch.Generator().manual_seed(1))
        most = 0
        for _ in warm.pixel_stream(latents, GBR_16):
            most = max(most, shared_bytes() - latents.nbytes)
        peaks.append(most)
    # Steps of four frames of 12 KiB, of which one is looked at and the next one may be there; in all 21 and 53 frames.
    assert max(peaks) <= 4 * 4 * 12 * 2**10 + 2**16, peaks


def test_a_worker_killed_while_a_video_is_written_leaves_no_file(vae, latents, tmp_path):
    def kill():
        os.kill(pids(vae)[1], signal.SIGKILL)

    with pytest.raises(wvp.WorkerError, match="worker 1 on cpu died with exit code -9"):
        vae.decode_to_video(latents, tmp_path / "v.mp4", on_chunk=at(5, kill))
    assert not list(tmp_path.iterdir())


def test_ffmpeg_killed_leaves_the_workers_as_they_are(vae, latents, tmp_path, monkeypatch):
    before, started = pids(vae), []
    begin = FedProcess.__init__

    def remember(self, command):
        begin(self, command)
        started.append(self)

    def kill():
        os.kill(started[0].pid, signal.SIGKILL)
        time.sleep(0.1)

    monkeypatch.setattr(FedProcess, "__init__", remember)
    with pytest.raises(wvp.OutputError, match="killed by signal 9"):
        vae.decode_to_video(latents, tmp_path / "v.mp4", on_chunk=at(5, kill))
    assert not list(tmp_path.iterdir())
    assert pids(vae) == before


def test_cancelled_while_the_encoder_is_waited_for(vae, latents, tmp_path):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    before = pids(vae)
    with pytest.raises(Stop):
        vae.decode_to_video(latents, tmp_path / "%d.png", on_chunk=at(9, stop))
    assert not list(tmp_path.iterdir())
    assert pids(vae) == before
