"""Decoding straight into files: the frames, sound and parts in time, and every way in which it may end early."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import time

import numpy
import pytest
import torch
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.oracle import load, oracle_vae, random_latents
from tests.processes import children, patience, wait_until
from wan_vae_parallel import to_video
from wan_vae_parallel.files.ffmpeg import FedProcess, find_ffmpeg
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.ops.pixel_format import YUV420
from wan_vae_parallel.runtime.local import LocalDecoder
from wan_vae_parallel.to_video import VideoDecode


def read(path, frames):
    """A video's or picture's frames as floats, of the shape that ``frames`` have."""
    command = [find_ffmpeg(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb48le", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    values = numpy.frombuffer(data, dtype="<u2").reshape(-1, *frames.shape[2:])
    return torch.from_numpy(values.astype("float32") / 65535)


@pytest.fixture(scope="module")
def vae():
    with load(oracle_vae("wan2.1"), chunk=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def latents():
    return random_latents("wan2.1", frames=6, rows=4, columns=3)


@pytest.fixture(scope="module")
def frames(vae, latents):
    return vae.decode(latents)


@pytest.fixture
def slow(tmp_path):
    """An ffmpeg that reads its frames when it is told to."""
    return script(tmp_path, 'case "$*" in *pipe:0*) while [ ! -e "$0.go" ]; do sleep 0.05; done;; esac')


def script(folder, beginning, name="ffmpeg"):
    file = folder / name
    file.write_text(f'#!/bin/sh\n{beginning}\nexec {find_ffmpeg()} "$@"\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_a_lossless_video_has_decodes_frames(vae, latents, frames, tmp_path):
    seen = []

    def on_chunk(done, total, picture):
        seen.append((done, total))
        assert (picture() - frames[0, done - 1]).abs().max() <= 1 / 65535

    assert vae.decode_to_video(latents, tmp_path / "v.mkv", format="ffv1", on_chunk=on_chunk) == [tmp_path / "v.mkv"]
    assert [total for _, total in seen] == [21] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == 21
    assert len(seen) > 3
    assert (read(tmp_path / "v.mkv", frames) - frames[0]).abs().max() <= 0.5 / 65535 + 1e-6


def test_pictures_a_tensor_and_a_batch(vae, latents, frames, tmp_path):
    both = torch.cat([latents, latents.flip(2)])
    files = vae.decode_to_video(both, tmp_path / "p" / "%02d.png", format="png16")
    assert [file.name for file in files] == [f"{i:02d}.png" for i in range(42)]
    assert (read(files[20], frames)[0] - frames[0, 20]).abs().max() <= 0.5 / 65535 + 1e-6
    vae.decode_to_video(latents, tmp_path / "f.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "f.safetensors")["frames"], frames)
    files = vae.decode_to_video(both, tmp_path / "v.mkv", format="ffv1")
    assert [file.name for file in files] == ["v_1.mkv", "v_2.mkv"]
    assert (read(files[1], frames) - vae.decode(both[1:])[0]).abs().max() <= 0.5 / 65535 + 1e-5


def test_parts_in_time_are_one_stream_without_a_seam(vae, latents, frames, tmp_path):
    parts = [latents[:, :, :1].squeeze(2), latents[:, :, 1:3], latents[:, :, 3:]]
    vae.decode_to_video(parts, tmp_path / "v.mkv", format="ffv1")
    assert (read(tmp_path / "v.mkv", frames) - frames[0]).abs().max() <= 0.5 / 65535 + 1e-6
    with pytest.raises(wvp.LatentError, match="part 2 of the latents has the shape"):
        vae.decode_to_video([latents, latents[..., :2]], tmp_path / "w.mkv")
    with pytest.raises(wvp.LatentError, match="no latents"):
        vae.decode_to_video([], tmp_path / "w.mkv")


def test_parts_may_have_their_axes_in_another_order_each(vae, latents, frames, tmp_path):
    # [C, T, h, w] is no latent frame with a batch in front; [B, T, C, h, w] is not C frames of T channels.
    parts = [latents[0, :, :2], latents[:, :, 2:].transpose(1, 2)]
    vae.decode_to_video(parts, tmp_path / "v.mkv", format="ffv1")
    assert (read(tmp_path / "v.mkv", frames) - frames[0]).abs().max() <= 0.5 / 65535 + 1e-6
    either = torch.zeros(16, 16, 4, 3)
    either[:] = torch.arange(16.0)[:, None, None, None]
    with pytest.raises(wvp.LatentError):
        vae.decode(either)
    with pytest.raises(wvp.LatentError):
        vae.decode_to_video([either], tmp_path / "w.mkv")


@pytest.mark.parametrize(
    ("latents", "path", "options", "error"),
    [
        (None, "v.mp4", {}, wvp.LatentError),
        ({"samples": torch.zeros(1, 16, 1, 2, 2)}, "v.mp4", {}, wvp.LatentError),
        (["a"], "v.mp4", {}, wvp.LatentError),
        (torch.zeros(1, 16, 1, 2, 2), 5, {}, wvp.OutputError),
        (torch.zeros(1, 16, 1, 2, 2), "v.mp4", {"audio": 5}, wvp.OutputError),
        (torch.zeros(1, 16, 1, 2, 2), "v.mp4", {"audio": (torch.zeros(1, 9),)}, wvp.ArgumentError),
        (torch.zeros(1, 16, 1, 2, 2), "v.mp4", {"preview": 5}, wvp.OutputError),
        (torch.zeros(1, 16, 1, 2, 2), "v.mp4", {"metadata": {"seed": 1}}, wvp.OutputError),
        (torch.zeros(1, 16, 1, 2, 2), "%d.png", {"metadata": {"prompt": "\ud83d"}}, wvp.OutputError),
        (torch.zeros(1, 16, 1, 2, 2), "v.mp4", {"metadata": "prompt"}, wvp.OutputError),
    ],
)
def test_what_is_of_another_kind_is_an_error_of_the_packages(vae, latents, path, options, error, tmp_path):
    with pytest.raises(error):
        vae.decode_to_video(latents, tmp_path / path if isinstance(path, str) else path, **options)


def test_options_may_be_numpys_numbers_and_names_of_files(vae, latents, tmp_path):
    vae.decode_to_video(
        latents,
        tmp_path / "v.mov",
        format="prores",
        fps=numpy.float32(24),
        audio=(torch.zeros(1, 99), numpy.int64(8000)),
        preview=str(tmp_path / "preview.mp4"),
    )
    vae.decode_to_video(latents, tmp_path / "w.mp4", fps=numpy.int64(24), quality=numpy.int64(20), metadata=None)
    for name in ("v.mov", "preview.mp4", "w.mp4"):
        said = subprocess.run([find_ffmpeg(), "-i", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert " 24 fps" in said.stderr


def test_rate_and_sound(vae, latents, tmp_path):
    vae.decode_to_video(latents, tmp_path / "v.mp4", audio=(torch.rand(2, 99) - 0.5, 44100))
    said = subprocess.run([find_ffmpeg(), "-i", str(tmp_path / "v.mp4")], capture_output=True, text=True, check=False)
    assert " 16 fps" in said.stderr  # what Wan 2.1 was trained at
    assert "Audio: aac" in said.stderr
    assert "Duration: 00:00:01.3" in said.stderr


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"quality": 99}, wvp.OutputError, "CRF from 0"),
        ({"crf": 3}, wvp.ArgumentError, "crf is no option of a video"),
        ({"format": "h265"}, wvp.OutputError, "takes 64 to 16384 pixels a side"),
        ({"fps": -1}, wvp.OutputError, "frames a second"),
        ({"audio": "none.wav"}, wvp.OutputError, "no audio file"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_step(vae, latents, tmp_path, monkeypatch, options, error, words):
    monkeypatch.setattr(type(vae), "pixel_stream", lambda *_: pytest.fail("it decoded"))
    with pytest.raises(error, match=words):
        vae.decode_to_video(latents, tmp_path / "v.mp4", **options)
    assert not list(tmp_path.iterdir())


def test_images_of_a_batch_are_pictures_of_one_process_a_few_decoded_at_a_time(vae, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(to_video, "images_that_pay", lambda *_: 3)
    started, seen = [], []
    begin = FedProcess.__init__

    def remember(self, command):
        begin(self, command)
        started.append(self)

    monkeypatch.setattr(FedProcess, "__init__", remember)
    images = torch.cat([latents, latents.flip(3)], dim=2).transpose(0, 2)[:8].contiguous()
    files = vae.decode_to_video(
        images, tmp_path / "%02d.png", format="png16", on_chunk=lambda done, total, _: seen.append((done, total))
    )
    assert [file.name for file in files] == [f"{i:02d}.png" for i in range(8)]
    expected = vae.decode(images)
    for file, frame in zip(files, expected, strict=True):
        assert (read(file, expected)[0] - frame[0]).abs().max() <= 0.5 / 65535 + 1e-5
    assert len(started) == 1
    assert seen == [(3, 8), (6, 8), (8, 8)]
    # A tensor, and videos, are a batch's as ever.
    vae.decode_to_video(images, tmp_path / "f.safetensors")
    assert load_file(tmp_path / "f.safetensors")["frames"].shape == expected.shape
    images[-1, 0] = torch.nan
    with pytest.raises(wvp.LatentError, match="NaN"):
        vae.decode_to_video(images, tmp_path / "none" / "%02d.png")
    assert len(started) == 1


@pytest.mark.parametrize("change", ["nan", "infinite for the dtype"])
def test_of_several_decodes_all_can_be_checked_before_the_first(vae, latents, tmp_path, change):
    bad = latents.double()
    bad[0, 0, -1, 0, 0] = torch.nan if change == "nan" else 1e300
    settings = OutputSettings(format="ffv1")
    good = VideoDecode(vae, latents, tmp_path / "a.mkv", settings)
    with pytest.raises(wvp.LatentError):
        VideoDecode(vae, bad, tmp_path / "b.mkv", settings)
    assert not list(tmp_path.iterdir())
    assert good.run() == [tmp_path / "a.mkv"]


# Ends before the end: no file, no process, a cause, and the next decode works.


@pytest.fixture
def out(vae, latents, frames, tmp_path):
    """A folder in which nothing may be left; the next decode must work, whatever was done."""
    folder = tmp_path / "out"
    folder.mkdir()
    before = children()
    yield folder
    assert not list(folder.iterdir())
    assert wait_until(lambda: children() == before, patience(10))
    torch.testing.assert_close(vae.decode(latents), frames)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("v.mp4", "chunk"),
        ("v.mp4", "wait"),
        ("v.mp4", "trial"),
        ("p_%d.png", "chunk"),
        ("p_%d.png", "trial"),
        ("v.safetensors", "chunk"),
    ],
)
def test_cancelled(vae, latents, out, name, when):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    options = {"on_chunk": stop} if when == "chunk" else {"on_wait": stop}
    if when == "wait":
        options["ffmpeg"] = script(out.parent, 'case "$*" in *pipe:0*) sleep 60;; esac')
    if when == "trial":
        # What ffmpeg starts goes with it.
        options["ffmpeg"] = script(out.parent, f'case "$*" in *null*) sleep 61; touch "{out / "went on"}";; esac')
    began = time.monotonic()
    with pytest.raises(Stop):
        vae.decode_to_video(latents, out / name, **options)
    assert when != "trial" or time.monotonic() - began < patience(1)


@pytest.mark.parametrize("name", ["v.mp4", "p_%d.png"])
def test_ffmpeg_is_killed(vae, latents, out, name, monkeypatch):
    started = []
    begin = FedProcess.__init__

    def remember(self, command):
        begin(self, command)
        started.append(self)

    monkeypatch.setattr(FedProcess, "__init__", remember)

    def kill(*_):
        os.kill(started[0].pid, signal.SIGKILL)
        time.sleep(0.1)

    with pytest.raises(wvp.OutputError, match=r"could not be written; .*\(ffmpeg was killed by signal 9"):
        vae.decode_to_video(latents, out / name, on_chunk=kill)


@pytest.mark.parametrize(("name", "format"), [("v.mkv", "ffv1"), ("v.mp4", "h264"), ("p_%d.png", "png16")])
@pytest.mark.parametrize("told", ['trap "" XFSZ; ', ""], ids=["told", "ended by the signal"])
def test_the_disk_is_full(vae, latents, out, name, format, told):
    # The limit on a file's size is the way to have writes fail that every user has.
    short = script(out.parent, f'case "$*" in *pipe:0*) {told}ulimit -f 8;; esac')
    with pytest.raises(wvp.OutputError, match=r"free some room .*File too large"):
        vae.decode_to_video(latents, out / name, format=format, quality="best", ffmpeg=short)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk_is_full(vae, latents, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(wvp.OutputError, match=r"free some room .*No space left on device"):
            vae.decode_to_video(latents, disk / "v.mkv", format="ffv1")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_decode_fails(vae, latents, out, monkeypatch):
    real = LocalDecoder.stream

    def stream(*arguments):
        steps = real(*arguments)
        yield next(steps)
        yield next(steps)
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(LocalDecoder, "stream", stream)
    with pytest.raises(RuntimeError, match="fell off"):
        vae.decode_to_video(latents, out / "v.mp4")
    monkeypatch.undo()


def test_nan_is_told_though_pixels_have_none(latents, tmp_path):
    state = {key: tensor.clone() for key, tensor in oracle_vae("wan2.1").state_dict().items()}
    state["decoder.conv_out.weight"][:] = torch.nan
    with (
        wvp.vae_from_state_dict(state, devices="cpu", dtype="float32") as vae,
        pytest.raises(wvp.WanVAEError, match="frames are NaN"),
    ):
        vae.decode_to_video(latents, tmp_path / "v.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_steps_are_small_where_an_encoder_takes_the_frames(path, latents, devices, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.memory._HANDED_ON_PIXELS", 2 * 32 * 24)
    with wvp.load_vae(path, devices=devices) as vae, wvp.load_vae(path, devices="cpu", chunk=2) as small:
        pixels, floats = (
            [part.shape[1] for part in stream]
            for stream in (vae.pixel_stream(latents, YUV420), vae.decode_stream(latents))
        )
        assert pixels == [part.shape[1] for part in small.decode_stream(latents)]
    assert max(floats) > max(pixels)


def test_a_slow_encoder_holds_the_decode_back(path, slow, tmp_path):
    latents = torch.randn((1, 16, 15, 8, 8), generator=torch.Generator().manual_seed(1))  # 57 frames of 24 KiB
    done = []
    with wvp.load_vae(path, devices="cpu", chunk=1) as vae:
        thread = threading.Thread(
            target=vae.decode_to_video,
            args=(latents, tmp_path / "v.mkv"),
            kwargs={"format": "ffv1", "ffmpeg": slow, "on_chunk": lambda count, *_: done.append(count)},
        )
        thread.start()
        assert wait_until(lambda: len(done) > 2, patience(60))
        time.sleep(2)
        # What may wait: two steps, another one in the thread that feeds, and what a pipe holds.
        assert done[-1] <= 1 + 4 * 5
        slow.with_name("ffmpeg.go").touch()
        thread.join(patience(120))
        assert not thread.is_alive()
    assert done[-1] == 57
    assert (tmp_path / "v.mkv").is_file()
