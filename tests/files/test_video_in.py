"""Videos that are read for an encode: which frames come, what is said of damaged ones, that no process stays."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import imageio_ffmpeg
import pytest
import torch

from tests.processes import children
from wan_vae_parallel import FrameError, OutputError
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.files.video import open_output, plan_output
from wan_vae_parallel.files.video_in import VideoInput

ROWS, COLUMNS = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
FRAMES = torch.stack(
    [torch.stack([(ROWS + t / 34) / 2, (COLUMNS + t / 34) / 2, ROWS * COLUMNS], dim=-1) for t in range(17)]
)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One video in several containers, and sound alone."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("v.mp4", "v.mkv", "an odd: name%d.mov"):
        with open_output(folder / name, shape=FRAMES.shape, fps=16.0) as write:
            write(FRAMES)
    sound = ["-f", "lavfi", "-i", "sine=d=0.1", str(folder / "sound.wav")]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *sound], check=True)
    return folder


def read(path, **options):
    with VideoInput(path, colours=options.pop("colours", 3), **options) as video:
        return torch.cat(list(video))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "an odd: name%d.mov"])
def test_all_frames_come_once_in_order_and_their_number_is_known_early(folder, name):
    with VideoInput(folder / name, colours=3) as video:
        frames = iter(video)
        first = next(frames)
        assert video.expected == 17
        got = torch.cat([first, *frames])
    assert got.dtype == torch.float32
    assert got.shape == FRAMES.shape[1:]
    assert (got - FRAMES[0]).abs().mean() < 0.02
    distance = (got[:, None] - FRAMES[0][None]).abs().mean(dim=(2, 3, 4))
    assert distance.argmin(dim=1).tolist() == list(range(17))
    assert torch.equal((got * 65535).round() / 65535, got)


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuvj420p", "yuv422p", "yuv411p", "nv12", "uyvy422", "yuyv422", "yuv420p10le", "yuv444p"]
)
def test_colours_are_interpolated_as_comfyui_does(tmp_path, pixels):
    path = tmp_path / "v.nut"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    source = ["-f", "lavfi", "-i", "testsrc2=s=96x70:d=0.2", "-pix_fmt", pixels, "-c:v", "rawvideo"]
    subprocess.run([*ffmpeg, *source, str(path)], check=True)
    # What PyAV's to_ndarray("gbrpf32le") gives: swscale by two rows and columns, in floats.
    floats = ["-sws_flags", "bilinear", "-f", "rawvideo", "-pix_fmt", "gbrpf32le", "-"]
    done = subprocess.run([*ffmpeg, "-i", str(path), *floats], check=True, capture_output=True)
    wanted = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(-1, 3, 70, 96)
    wanted = wanted[:, [2, 0, 1]].permute(0, 2, 3, 1)
    got = read(path)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < 2e-5
    opaque = read(path, colours=4)
    assert torch.equal(opaque[..., :3], got)
    assert (opaque[..., 3] == 1).all()


@pytest.mark.parametrize("pixels", ["bgr0", "gbrp", "gray", "pal8"])
def test_of_rgb_of_8_bits_every_value_is_itself(tmp_path, pixels):
    path = tmp_path / "v.nut"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    source = ["-f", "lavfi", "-i", "testsrc2=s=96x70:d=0.2", "-pix_fmt", pixels, "-c:v", "rawvideo"]
    subprocess.run([*ffmpeg, *source, str(path)], check=True)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([*ffmpeg, "-i", str(path), *raw], check=True, capture_output=True)
    wanted = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).view(-1, 70, 96, 3)
    assert torch.equal((read(path) * 255).round(), wanted.float())


@pytest.mark.parametrize(("format", "file", "error"), [("ffv1", "w.mkv", 1 / 65535), ("h265", "w.mp4", 0.02)])
def test_of_more_than_8_bits_none_are_lost(tmp_path, format, file, error):
    # A dark ramp, of which 8 bits have few steps.
    frames = torch.linspace(0.1, 0.16, 96).view(1, 1, 1, 96, 1).expand(1, 3, 64, 96, 3)
    with open_output(tmp_path / file, shape=frames.shape, fps=16, format=format, quality="best") as write:
        write(frames)
    got = read(tmp_path / file)
    assert got.shape == frames.shape[1:]
    assert (got - frames[0]).abs().max() <= error
    assert len(got.unique()) > 40  # of 8 bits it has 17
    rgba = read(tmp_path / file, colours=4)
    assert torch.equal(rgba[..., 3], torch.ones_like(rgba[..., 3]))
    assert (rgba[..., :3] - frames[0]).abs().max() <= error


def test_the_first_frames_alone(folder):
    whole = read(folder / "v.mp4")
    assert torch.equal(read(folder / "v.mp4", most=5), whole[:5])
    assert torch.equal(read(folder / "v.mp4", most=99), whole)
    with VideoInput(folder / "v.mp4", colours=3, most=5) as video:
        next(iter(video))
        assert video.expected == 5


def test_a_vae_with_alpha_gets_opaque_frames(folder):
    frames = read(folder / "v.mp4", colours=4, most=2)
    assert torch.equal(frames[..., :3], read(folder / "v.mp4", most=2))
    assert (frames[..., 3] == 1).all()
    with pytest.raises(FrameError, match="have 7 colours"):
        read(folder / "v.mp4", colours=7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vp9.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", "1"]),
        ("vp9.mkv", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", "1"]),
        ("vp8.webm", ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-b:v", "2M"]),
        ("ffv1.mkv", ["-c:v", "ffv1", "-pix_fmt", "bgra"]),
        ("prores.mov", ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"]),
    ],
)
def test_alpha_is_read_by_a_vae_that_has_it_and_told_by_one_that_has_not(tmp_path, caplog, name, options):
    # Red, less and less opaque to the left.
    source = "color=black:s=64x48:r=16:d=0.25,format=rgba,geq=r=255:g=0:b=0:a='X*4'"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, *options]
    subprocess.run([*command, str(tmp_path / name)], check=True)
    frames = read(tmp_path / name, colours=4)
    assert frames.shape == (4, 48, 64, 4)
    assert (frames[..., 3] - torch.arange(64) * 4 / 255).abs().max() < 0.03
    assert (frames[..., :3] - torch.tensor([1.0, 0, 0])).abs().max() < 0.03
    assert not caplog.text
    plain = read(tmp_path / name)
    assert (plain - frames[..., :3]).abs().max() < 0.02
    assert f"{name} has alpha, which is left out" in caplog.text


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67", "bt709"])
def test_hdr_is_taken_as_it_is_and_told(tmp_path, caplog, transfer):
    options = ["-vf", f"setparams=color_trc={transfer}", "-pix_fmt", "yuv420p10le", "-c:v", "ffv1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "color=gray:s=64x48:d=0.2"]
    subprocess.run([*command, *options, str(tmp_path / "v.mkv")], check=True)
    assert (read(tmp_path / "v.mkv") - 0.5).abs().max() < 0.01
    assert (f"v.mkv is HDR ({transfer})" in caplog.text) == (transfer != "bt709")


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("h264", "libx264"), ("webm", "libvpx-vp9")])
def test_a_size_that_changes_is_an_error_behind_the_frames_of_the_first(tmp_path, suffix, codec):
    program, parts = imageio_ffmpeg.get_ffmpeg_exe(), []
    for number, size in enumerate(("64x48", "96x32", "64x48")):
        parts.append(tmp_path / f"{number}.{suffix}")
        source = ["-f", "lavfi", "-i", f"testsrc=s={size}:r=25:d=0.12", "-pix_fmt", "yuv420p", "-c:v", codec]
        # Without frames in another order, which would be waited for at the end of each part.
        subprocess.run([program, "-v", "error", *source, "-bf", "0", str(parts[-1])], check=True)
    path = tmp_path / f"v.{suffix}"
    if suffix == "webm":
        (tmp_path / "list").write_text("".join(f"file '{part}'\n" for part in parts))
        command = [program, "-v", "error", "-f", "concat", "-safe", "0", "-i", str(tmp_path / "list"), "-c", "copy"]
        subprocess.run([*command, str(path)], check=True)
    else:
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    before, frames = children(), []
    words = r"changes its size: 3 frames have 64x48 pixels, and frame 4 96x32; .* take the first 3 frames alone"
    with VideoInput(path, colours=3) as video, pytest.raises(FrameError, match=words):
        frames.extend(video)
    assert len(frames) == 3
    assert children() == before
    # The way out that it names.
    assert torch.equal(read(path, most=3), torch.cat(frames))


def test_a_video_that_lies_on_its_side_has_one_size(folder, tmp_path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(folder / "v.mp4")]
    subprocess.run([*command, "-c", "copy", str(tmp_path / "v.mp4")], check=True)
    assert read(tmp_path / "v.mp4").shape == (17, 48, 32, 3)


def test_without_a_folder_for_temporary_files_the_error_says_so(folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    with pytest.raises(FrameError, match="folder for temporary files"):
        read(folder / "v.mp4")


def test_no_process_stays_wherever_reading_ends(folder):
    before = children()
    with VideoInput(folder / "v.mp4", colours=3):
        pass
    with VideoInput(folder / "v.mp4", colours=3) as video:
        next(iter(video))
    with pytest.raises(RuntimeError, match="elsewhere"), VideoInput(folder / "v.mp4", colours=3):
        raise RuntimeError("elsewhere")
    assert children() == before


def cut(source, target, share):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


@pytest.mark.parametrize(("name", "reason"), [("v.mp4", "partial file|Invalid NAL"), ("v.mkv", "ended prematurely")])
def test_a_video_that_is_cut_short_is_an_error_behind_the_frames_that_it_has(folder, tmp_path, name, reason):
    path = cut(folder / name, tmp_path / name, 0.9)
    before = children()
    words = rf"cut short behind frame (\d+) \(ffmpeg: .*({reason}).*\); .* take the first \1 frames alone"
    with pytest.raises(FrameError, match=words):
        read(path)
    assert children() == before
    # What is whole may be had.
    assert read(path, most=2).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sound.wav", "has no video stream"),
        ("text.mp4", r"can't be read as a video \(ffmpeg: .*\); name a video, pictures or a .safetensors"),
        ("empty.mp4", "can't be read as a video"),
        ("head.mp4", "can't be read as a video"),
    ],
)
def test_what_is_no_video_is_told_in_a_line(folder, name, words):
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "empty.mp4").touch()
    cut(folder / "v.mp4", folder / "head.mp4", 0.01)
    with pytest.raises(FrameError, match=words) as raised:
        read(folder / name)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_missing_imageio_ffmpeg_is_told_with_what_brings_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(FrameError, match=r"imageio-ffmpeg, which videos need, is missing .*; pip install"):
        read(folder / "v.mp4")
    with pytest.raises(OutputError, match="pip install imageio-ffmpeg brings it"):
        plan_output(folder / "w.mp4", (1, 5, 64, 64, 3), OutputSettings())


def test_an_ffmpeg_that_does_not_start_is_told(folder, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "/nowhere/ffmpeg")
    with pytest.raises(FrameError, match="ffmpeg does not start"):
        read(folder / "v.mp4")
