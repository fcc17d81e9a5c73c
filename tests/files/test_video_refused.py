"""What can't be written is refused before the start, and what only failed once is not."""

import subprocess
import tempfile
import time
from fractions import Fraction

import pytest
import torch

from tests.files.clips import FRAMES, SHAPE, by_ffmpeg, program, write
from tests.processes import patience
from wan_vae_parallel import OutputError
from wan_vae_parallel.files.audio import Audio
from wan_vae_parallel.files.ffmpeg import find_ffmpeg
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.files.video import plan_output
from wan_vae_parallel.files.video_out import encode_again, pictures_as_video, tag_as_hvc1


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("v.mp4", (1, 5, 64, 16400, 3), {}, "takes 2 to 16384 pixels a side, and frames of 16400x64 are 16400 wide"),
        ("v.mp4", (1, 5, 8, 8, 3), {"format": "h265"}, "takes 64 to 16384 pixels a side"),
        ("v.mov", (1, 5, 64, 65536, 3), {"format": "prores"}, "65536 wide; no video or picture takes them; decode to"),
        ("v.webm", (1, 5, 16384, 16384, 3), {}, "up to 268 million pixels a frame, 128 more rows and columns included"),
        ("v.mp4", (1, 5, 16400, 16384, 3), {}, "16400 high; no video or picture takes them"),
        ("v.mp4", SHAPE, {"format": "prores"}, "can't hold ProRes 422 HQ (10 bit); name a .mov"),
        ("v.mp4", SHAPE, {"format": "png16"}, "name a name as frames/%04d.png"),
        ("%d.png", SHAPE, {"format": "h264"}, "can't hold H.264"),
        ("v.safetensors", SHAPE, {"format": "h264"}, "without a format and sound"),
        ("v.mp4", SHAPE, {"format": "av1"}, "format is 'av1'; it must be one of h264"),
        ("v.mp4", SHAPE, {"quality": "fine"}, "quality is 'fine'; it must be low, medium, high, best or a CRF"),
        ("v.mp4", SHAPE, {"quality": 52}, "has a CRF from 0 (best) to 51, not 52"),
        ("v.mkv", SHAPE, {"format": "ffv1", "quality": 3}, "has no CRF, and 3 was asked for"),
        ("v.mp4", SHAPE, {"fps": 0}, "can't have 0 frames a second"),
        ("v.mp4", SHAPE, {"fps": float("nan")}, "can't have nan frames a second"),
        ("v.mp4", SHAPE, {"fps": 0.009}, "can't have 0.009 frames a second; name a rate from 0.01 to 1000"),
        ("v.mp4", (1, 5, 64, 96, 1), {}, "frames of 1 colours"),
        ("%d.png", SHAPE, {"audio": Audio(torch.zeros(1, 9), 48000)}, "can't hold sound"),
        ("v.mp4", SHAPE, {"odd": "stretch"}, "odd is 'stretch'; it must be pad or crop"),
        ("v.mp4", SHAPE, {"ffmpeg": "no-such-ffmpeg"}, "no-such-ffmpeg can't be run here"),
    ],
)
def test_what_can_not_work_is_refused_before_the_start(tmp_path, name, shape, options, words):
    with pytest.raises(OutputError) as refused:
        plan_output(tmp_path / name, shape, OutputSettings(**options))
    assert words in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.mov", "v.mkv"])
@pytest.mark.parametrize("fps", [Fraction(1, 100), 1000])
def test_the_least_and_the_largest_rate_can_be_written(tmp_path, name, fps):
    write(tmp_path / name, fps=fps)
    assert by_ffmpeg(tmp_path / name).shape == FRAMES[0].shape


@pytest.mark.parametrize(
    ("colours", "side"), [(3, 8), (4, 8), (3, 6400), pytest.param(4, 6400, marks=pytest.mark.slow)]
)
def test_ffv1_takes_frames_of_any_size(tmp_path, side, colours):
    # Of more than 42 million pixels, 31 with alpha, it wants more slices.
    plan_output(tmp_path / "v.mkv", (1, 5, side + side // 8 * 3, side, colours), OutputSettings(format="ffv1"))


@pytest.mark.parametrize("name", ["v.mp4", "p/%d.png", "n" * 300 + "/%d.png"])
def test_without_a_folder_for_temporary_files_the_error_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match=r"too long" if "n" * 300 in name else "folder for temporary files"):
        plan_output(tmp_path / name, SHAPE, OutputSettings(fps=17))


def test_an_ffmpeg_that_lacks_something_is_told_before_the_start(tmp_path):
    real = find_ffmpeg()
    lacking = program(tmp_path / "lacking", f'case "$*" in *encoder=libx265) echo no;; *) exec {real} "$@";; esac')
    with pytest.raises(OutputError, match="has no encoder libx265"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=lacking, format="h265"))
    text = "Encoder libx265 [x]:\\n    Supported pixel formats: yuv420p gray"
    eight = program(tmp_path / "eight", f'case "$*" in *encoder=libx265) printf "{text}";; *) exec {real} "$@";; esac')
    with pytest.raises(OutputError, match="has an libx265 that can't take yuv420p10le"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=eight, format="h265"))
    plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=eight))
    broken = program(tmp_path / "broken", f'case "$*" in *-f*null*) exit 3;; *) exec {real} "$@";; esac')
    with pytest.raises(OutputError, match="ended with code 3"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=broken))


@pytest.mark.parametrize("colours", [3, 4])
def test_the_trial_of_a_large_picture_is_cut_short_and_encodes_the_same_pixels(tmp_path, colours):
    command = tmp_path / "command"
    spying = program(
        tmp_path / "ffmpeg", f'case "$*" in *null*) echo "$*" > {command};; esac; exec {find_ffmpeg()} "$@"'
    )
    tried = []
    for width in (640, 2560):
        plan_output(tmp_path / "v.webm", (1, 5, 1440, width, colours), OutputSettings(ffmpeg=spying))
        tried.append(command.read_text())
    pixels = "yuv420p" if colours == 3 else "yuva420p"
    assert all(f"-pix_fmt {pixels} " in text for text in tried)
    assert ["-deadline realtime" in text for text in tried] == [False, True]


class Stop(Exception):
    pass


def stop():
    raise Stop


def test_the_trial_of_a_large_picture_can_be_cancelled(tmp_path):
    began = time.monotonic()
    with pytest.raises(Stop):
        plan_output(tmp_path / "v.webm", (1, 5, 10000, 12000, 3), OutputSettings(), stop)
    assert time.monotonic() - began < patience(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["again", "together", "tag"])
def test_what_ffmpeg_does_with_a_whole_file_can_be_cancelled(tmp_path, monkeypatch, name):
    write(tmp_path / "%d.png")
    write(tmp_path / "v.mp4", format="h265")
    # As core's copies of it are.
    copied = ["-c", "copy", "-tag:v", "hev1", str(tmp_path / "hev1.mp4")]
    subprocess.run([find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "v.mp4"), *copied], check=True)
    before = sorted(tmp_path.iterdir())
    slow = program(tmp_path / "slow", f'case "$*" in *partial*) sleep 60;; esac; exec {find_ffmpeg()} "$@"')
    monkeypatch.setattr("wan_vae_parallel.files.video_out.find_ffmpeg", lambda *_: str(slow))
    began = time.monotonic()
    does = {
        "again": lambda: encode_again(tmp_path / "v.mp4", tmp_path / "again.mp4", stop),
        "together": lambda: pictures_as_video(tmp_path / "%d.png", tmp_path / "t.mkv", OutputSettings(), stop),
        "tag": lambda: tag_as_hvc1(tmp_path / "hev1.mp4", stop),
    }
    with pytest.raises(Stop):
        does[name]()
    assert time.monotonic() - began < patience(2)
    assert sorted(tmp_path.iterdir()) == sorted([*before, slow])


def test_what_failed_once_is_tried_again(tmp_path):
    flag = tmp_path / "short of memory"
    flag.touch()
    sick = program(
        tmp_path / "sick", f'case "$*" in *null*) [ -e "{flag}" ] && kill -9 $$;; esac; {find_ffmpeg()} "$@"'
    )
    with pytest.raises(OutputError, match="can't be written"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=sick))
    flag.unlink()
    plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(ffmpeg=sick))


def test_a_slow_ffmpegs_video_is_kept(tmp_path):
    # It is done, and then takes its time on a busy machine.
    slow = program(
        tmp_path / "slow", f'{find_ffmpeg()} "$@"; code=$?; case "$*" in *pipe:0*) sleep 2;; esac; exit $code'
    )
    began = time.monotonic()
    write(tmp_path / "v.mp4", ffmpeg=slow)
    assert time.monotonic() > began + 2
    assert by_ffmpeg(tmp_path / "v.mp4").shape == FRAMES[0].shape
