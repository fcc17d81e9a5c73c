"""Files of frames: what is in them, and that a failure leaves nothing behind."""

import contextlib
import os
import time

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wan_vae_parallel import OutputError
from wan_vae_parallel.files import ffmpeg
from wan_vae_parallel.files.ffmpeg import FedProcess
from wan_vae_parallel.files.pictures import comparison_sheet, contact_sheet, to_picture
from wan_vae_parallel.files.video import open_output, output_files, plan_output

# Smooth pictures, which H.264 keeps to within a few levels: a ramp that moves.
ROWS, COLUMNS = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
FRAMES = torch.stack(
    [torch.stack([(ROWS + t / 18) / 2, (COLUMNS + t / 18) / 2, ROWS * COLUMNS], dim=-1) for t in range(9)]
)[None]


def write(path, frames, fps=16.0, steps=(1, 4, 4)):
    with open_output(path, shape=frames.shape, fps=fps) as put:
        for step in frames.split(list(steps), dim=1):
            put(step)


def read_video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    frames = [numpy.frombuffer(frame, dtype=numpy.uint8).reshape(height, width, 3) for frame in reader]
    return meta, torch.from_numpy(numpy.stack(frames))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_video_has_the_frames_size_and_rate(tmp_path, suffix):
    write(tmp_path / f"out{suffix}", FRAMES, fps=24.0)
    meta, frames = read_video(tmp_path / f"out{suffix}")
    assert meta["fps"] == 24.0
    assert frames.shape == (9, 32, 48, 3)
    assert (frames.float() / 255 - FRAMES[0]).abs().mean() < 0.02
    # in the right order: each is nearest to itself
    distance = (frames.float()[:, None] / 255 - FRAMES[0][None]).abs().mean(dim=(2, 3, 4))
    assert distance.argmin(dim=1).tolist() == list(range(9))
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.mov", "out.safetensors", "out_%02d.png"])
def test_the_same_frames_make_the_same_bytes_in_whatever_steps_they_come(tmp_path, name):
    contents = []
    for folder, steps in ((tmp_path / "one", (1, 4, 4)), (tmp_path / "two", (1, 1, 7))):
        folder.mkdir()
        write(folder / name, FRAMES, steps=steps)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert all(contents[0].values())


def test_a_frame_rate_that_is_no_whole_number(tmp_path):
    write(tmp_path / "out.mp4", FRAMES, fps=23.976)
    assert read_video(tmp_path / "out.mp4")[0]["fps"] == pytest.approx(23.98, abs=0.01)


def test_each_video_of_a_batch_gets_a_file(tmp_path):
    batch = torch.cat([FRAMES, 1 - FRAMES])
    write(tmp_path / "out.mp4", batch)
    assert output_files(tmp_path / "out.mp4", batch.shape) == [tmp_path / "out_1.mp4", tmp_path / "out_2.mp4"]
    for i in (0, 1):
        _, frames = read_video(tmp_path / f"out_{i + 1}.mp4")
        assert (frames.float() / 255 - batch[i]).abs().mean() < 0.02


@pytest.mark.parametrize(("videos", "threads"), [(1, 12), (3, 4), (20, 1)])
def test_encoders_of_a_batch_share_the_threads_and_so_the_memory(tmp_path, monkeypatch, videos, threads):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    commands, begin = [], FedProcess.__init__

    def begun(self, command):
        commands.append(command)
        begin(self, command)

    monkeypatch.setattr(FedProcess, "__init__", begun)
    write(tmp_path / "out.mp4", FRAMES.expand(videos, -1, -1, -1, -1))
    assert [command[command.index("-threads") + 1] for command in commands] == [str(threads)] * videos


def test_a_tensor_is_exact(tmp_path):
    write(tmp_path / "out.safetensors", FRAMES)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["frames"], FRAMES)


def test_pictures_are_numbered_through_and_rounded_to_the_nearest(tmp_path):
    batch = torch.cat([FRAMES, 1 - FRAMES])
    write(tmp_path / "f_%03d.png", batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f_{i:03d}.png" for i in range(18)]
    for index in (0, 8, 9, 17):
        picture = torch.from_numpy(numpy.array(Image.open(tmp_path / f"f_{index:03d}.png")))
        assert (picture.float() / 255 - batch.flatten(0, 1)[index]).abs().max() <= 0.5 / 255 + 1e-6


def test_alpha_is_kept_in_pictures_and_left_out_of_videos_that_have_none_which_is_told(tmp_path, caplog):
    with_alpha = torch.cat([FRAMES, torch.full_like(FRAMES[..., :1], 0.5)], dim=-1)
    write(tmp_path / "%d.png", with_alpha)
    assert Image.open(tmp_path / "0.png").mode == "RGBA"
    assert "alpha" not in caplog.text
    write(tmp_path / "out.mp4", with_alpha)
    assert "out.mp4 has no alpha: the fourth colour is left out; vp9, prores, ffv1, png8, png16 keep it" in caplog.text
    assert read_video(tmp_path / "out.mp4")[1].shape == (9, 32, 48, 3)


@pytest.mark.parametrize("name", ["out.mp4", "out.safetensors", "%04d.png"])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, name):
    old = tmp_path / (name % 0 if "%" in name else name)
    old.write_text("old")

    def interrupted():
        with open_output(tmp_path / name, shape=FRAMES.shape, fps=16.0) as put:
            put(FRAMES[:, :5])
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_text() == "old"


def test_a_video_that_ffmpeg_did_not_finish_is_an_error(tmp_path):
    with (
        pytest.raises(OutputError, match="would have 4 of 9 frames"),
        open_output(tmp_path / "out.mp4", shape=FRAMES.shape, fps=16.0) as put,
    ):
        put(FRAMES[:, :4])  # the other five never come
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.gif", ".mp4"),  # a kind that is not written
        ("nowhere/out.mp4", "no folder"),
        ("nowhere/deeper/%04d.png", "no folder"),
        ("out.png", "%04d"),  # one picture for many frames
        ("%d_%d.png", "%04d"),
    ],
)
def test_bad_paths_are_refused_before_anything_is_decoded(tmp_path, name, words):
    with pytest.raises(OutputError, match=words):
        plan_output(tmp_path / name, FRAMES.shape)


def test_too_little_disk_is_seen_beforehand(tmp_path):
    with pytest.raises(OutputError, match="are free"):
        plan_output(tmp_path / "out.safetensors", (1, 10**9, 720, 1280, 3))


def test_the_contact_sheet_shows_first_and_last():
    frames = torch.zeros(20, 32, 48, 3)
    frames[0, ..., 0] = 1
    frames[-1, ..., 2] = 1
    sheet = contact_sheet(frames, columns=4, rows=2, width=192)
    assert sheet.size == (192, 64)
    assert sheet.getpixel((5, 5)) == (255, 0, 0)
    assert sheet.getpixel((185, 60)) == (0, 0, 255)
    assert contact_sheet(frames[:1]).size[0] > 0  # a single picture


def test_the_comparison_sheet_shows_one_above_the_other():
    above, below = torch.zeros(9, 32, 48, 3), torch.ones(9, 32, 48, 3)
    sheet = comparison_sheet(above, below, columns=4, width=192)
    assert sheet.size == (192, 64)
    assert [sheet.getpixel((x, y)) for x in (5, 185) for y in (5, 60)] == 2 * [(0, 0, 0), (255, 255, 255)]
    assert comparison_sheet(above[:1], below[:1]).height > 0


def test_a_grey_frame_is_a_picture_too():
    assert to_picture(torch.rand(4, 4, 1)).mode == "L"


def test_the_folder_of_a_sequence_is_made(tmp_path):
    write(tmp_path / "frames" / "%04d.png", FRAMES)
    assert len(list((tmp_path / "frames").iterdir())) == 9


def test_a_sequence_that_can_not_be_moved_leaves_nothing(tmp_path):
    def doomed():
        with open_output(tmp_path / "frames" / "%04d.png", shape=FRAMES.shape, fps=16.0) as put:
            put(FRAMES)
            (tmp_path / "frames" / "0003.png").mkdir()  # in the way of the fourth picture

    with pytest.raises(OutputError, match="could not be written"):
        doomed()
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["0003.png"]
    with pytest.raises(OutputError, match="is a folder"):  # seen beforehand the next time
        plan_output(tmp_path / "frames" / "%04d.png", FRAMES.shape)


@pytest.mark.parametrize("name", ["out.safetensors", "%04d.png"])
def test_frames_that_never_come_are_an_error(tmp_path, name):
    with (
        pytest.raises(OutputError, match="4 of 9 frames"),
        open_output(tmp_path / name, shape=FRAMES.shape, fps=16.0) as put,
    ):
        put(FRAMES[:, :4])
    assert not list(tmp_path.iterdir())


def test_a_double_precision_tensor_stays_one(tmp_path):
    write(tmp_path / "out.safetensors", FRAMES.double())
    assert load_file(tmp_path / "out.safetensors")["frames"].dtype == torch.float64


@pytest.mark.skipif(os.name == "nt", reason="there is no program called sleep")
def test_an_ffmpeg_that_takes_nothing_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(ffmpeg, "_SLOW_SECONDS", 0.3)
    began = time.monotonic()

    def check():
        if time.monotonic() > began + 1:
            raise TimeoutError

    with contextlib.closing(FedProcess(["sleep", "60"])) as process, contextlib.suppress(TimeoutError):
        while True:
            process.put(torch.zeros(2**20, dtype=torch.uint8), check)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"ffmpeg (process {process.pid}) has taken no frames for 0 s: it is slow, or stopped")
