"""Every format, there and back: colours by two decoders, tags, qualities, odd sides and rates."""

import re
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest
import torch

from tests.files.clips import COUNT, FRAMES, HEIGHT, NAMES, WIDTH, by_ffmpeg, write
from wan_vae_parallel.files.ffmpeg import describe_video, find_ffmpeg
from wan_vae_parallel.files.formats import FORMATS, choose_format
from wan_vae_parallel.files.video_in import VideoInput
from wan_vae_parallel.files.video_out import encode_again, tag_as_alpha, tag_as_hvc1

# The largest error of a channel at the best quality, in 255ths: on ramps, and inside of patches of saturated colours.
# Of the wrong matrix red would be off by 24 and green by 39.
BOUNDS = {"h264": (2.5, 3.5), "h265": (2.5, 2.5), "vp9": (2.5, 3), "prores": (1.6, 1.6), "ffv1": (0.01, 0.01)}


def errors(decoded):
    """The largest error of any channel on the ramps and inside the patches, in 255ths."""
    assert decoded.shape == FRAMES[0].shape
    error = (decoded - FRAMES[0]).abs() * 255
    # Away from where colours meet, which halved chroma blurs.
    inside = [x for i in range(8) for x in range(i * 12 + 4, i * 12 + 8)]
    ramps = [*range(2, 13), *range(19, 29)]
    return float(error[:, ramps, 2:-2].max()), float(error[:, 36:, inside].max())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of each format at its best quality."""
    folder = tmp_path_factory.mktemp("formats")
    files = {}
    for name, file in NAMES.items():
        files[name] = folder / name / file
        files[name].parent.mkdir()
        write(files[name], format=name, quality="best")
    return files


@pytest.mark.parametrize("name", NAMES)
def test_colours_come_back_by_ffmpeg(written, name):
    ramps, patches = errors(by_ffmpeg(written[name]))
    assert ramps <= BOUNDS[name][0]
    assert patches <= BOUNDS[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_colours_and_tags_come_back_by_pyav(written, name):
    av = pytest.importorskip("av", reason="PyAV is not installed: the second decoder")
    with av.open(str(written[name])) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        frames = []
        for frame in container.decode(stream):
            # As ComfyUI's Get Video Components does.
            frames.append(torch.from_numpy(frame.to_ndarray(format="gbrpf32le")))
            assert frame.color_primaries == 1
            lossless = name == "ffv1"
            assert (frame.colorspace, frame.color_range, frame.color_trc) == ((0, 2, 13) if lossless else (1, 1, 1))
        assert frame.format.name == FORMATS[name].pixels.name
    ramps, patches = errors(torch.stack(frames))
    # PyAV's converter takes chroma to lie half a pixel farther right, and rounds 16 bits to somewhat fewer.
    assert ramps <= BOUNDS[name][0] + (0.2 if lossless else 2)
    assert patches <= BOUNDS[name][1] + 0.2


def test_tags_are_in_the_bitstream_too(written, tmp_path):
    for name, suffix in (("h264", "h264"), ("h265", "hevc"), ("vp9", "ivf")):
        bare = tmp_path / f"bare.{suffix}"
        command = [find_ffmpeg(), "-v", "error", "-i", str(written[name]), "-c", "copy"]
        command += ["-bsf:v", "hevc_mp4toannexb"] if name == "h265" else []
        subprocess.run([*command, str(bare)], check=True)
        said = subprocess.run([find_ffmpeg(), "-i", str(bare)], capture_output=True, text=True, check=False).stderr
        assert "(tv, bt709" in said, name


@pytest.mark.parametrize("name", ["h264", "h265", "vp9"])
def test_what_ffmpeg_gets_is_what_it_encodes(tmp_path, name, monkeypatch):
    # Without loss the planes are the same bits: nothing converts them on the way.
    chosen = FORMATS[name]
    options = {"h264": ["-qp", "0"], "h265": ["-x265-params", "lossless=1:log-level=error"], "vp9": ["-lossless", "1"]}
    monkeypatch.setattr(type(chosen), "quality_arguments", lambda *_: options[name])
    write(tmp_path / NAMES[name], format=name)
    command = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / NAMES[name]), "-f", "rawvideo", "-"]
    planes = subprocess.run(command, capture_output=True, check=True).stdout
    assert planes == chosen.pixels.convert(FRAMES).numpy().tobytes()


def test_lossless_is_equal_to_rounding(tmp_path):
    frames = torch.rand(1, 3, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "v.mkv", frames, format="ffv1")
    assert (by_ffmpeg(tmp_path / "v.mkv") - frames[0]).abs().max() <= 0.5 / 65535 + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_qualities_differ_in_size_where_there_are_some(tmp_path, name):
    frames = torch.rand(1, 3, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    sizes = []
    for quality in ("low", "best"):
        write(tmp_path / NAMES[name], frames, format=name, quality=quality)
        sizes.append((tmp_path / NAMES[name]).stat().st_size)
    assert sizes[0] < sizes[1] if FORMATS[name].crf else sizes[0] == sizes[1]


def test_hev1_becomes_hvc1_and_nothing_else_changes(tmp_path):
    write(tmp_path / "v.mp4", format="h265", metadata={"prompt": "p=1;"})
    assert not tag_as_hvc1(tmp_path / "v.mp4")
    for suffix, container in ((".mp4", "mp4"), (".mov", "mov")):
        file = tmp_path / f"copy{suffix}"
        command = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "v.mp4"), "-c", "copy", "-tag:v", "hev1"]
        subprocess.run([*command, "-movflags", "use_metadata_tags", "-f", container, str(file)], check=True)
        assert tag_as_hvc1(file)
        said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
        assert "(hvc1 / 0x" in said
        assert re.search(r"prompt +: p=1;", said)
        assert torch.equal(by_ffmpeg(file), by_ffmpeg(tmp_path / "v.mp4"))
    write(tmp_path / "other.mp4")
    assert not tag_as_hvc1(tmp_path / "other.mp4")


@pytest.mark.parametrize(
    ("name", "odd", "size"),
    [
        ("h264", "pad", (66, 68)),
        ("h264", "crop", (64, 66)),
        ("h265", "pad", (66, 68)),
        ("vp9", "pad", (65, 67)),
        ("prores", "pad", (66, 68)),  # of an odd width prores_ks gets the last chroma wrong
        ("ffv1", "crop", (65, 67)),
    ],
)
def test_odd_sides_are_padded_or_cropped_where_a_format_has_even_ones_only(tmp_path, caplog, name, odd, size):
    frames = torch.zeros(1, 3, 67, 65, 3)
    frames[..., -1, 0] = 1  # the last column is red
    with caplog.at_level("INFO"):
        write(tmp_path / NAMES[name], frames, format=name, odd=odd, quality="best")
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / NAMES[name])))
    assert meta["size"] == size
    kept = size == (65, 67)
    assert (f"are {size[0]}x{size[1]} there" in caplog.text) != kept
    command = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / NAMES[name])]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    shown = numpy.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, dtype="u1")
    red = shown.reshape(3, size[1], size[0], 3)[0, -1, -1, 0]
    # One column of red alone has its chroma halved.
    assert red > 100 if odd == "pad" or kept else red < 60


def test_a_rate_is_kept_exactly(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    for name in NAMES:
        write(tmp_path / NAMES[name], format=name, fps=Fraction(24000, 1001))
        with av.open(str(tmp_path / NAMES[name])) as container:
            assert abs(container.streams.video[0].average_rate - Fraction(24000, 1001)) < Fraction(1, 100)


def test_the_usual_format_of_each_suffix():
    usual = {".mp4": "h264", ".mkv": "h264", ".mov": "h264", ".webm": "vp9"}
    assert {suffix: choose_format(Path(f"v{suffix}"), None).name for suffix in usual} == usual


@pytest.mark.parametrize(
    ("name", "format", "bound"),
    [("v.webm", "vp9", 3), ("v.mkv", "vp9", 3), ("v.mov", "prores", 1), ("v.mkv", "ffv1", 0.01)],
)
@pytest.mark.parametrize("odd", [0, 1], ids=["even", "odd"])
def test_formats_that_have_alpha_keep_it(tmp_path, caplog, name, format, bound, odd):
    frames = FRAMES[:, :, : HEIGHT - odd, : WIDTH - odd]
    alpha = torch.linspace(1, 0, WIDTH - odd)[None, None, None, :, None].expand(*frames.shape[:4], 1)
    write(tmp_path / name, torch.cat([frames, alpha], dim=-1), format=format, quality="best")
    with VideoInput(tmp_path / name, colours=4) as video:
        found = torch.cat(list(video))[:, : HEIGHT - odd, : WIDTH - odd]
    assert found.shape == (COUNT, HEIGHT - odd, WIDTH - odd, 4)
    assert (found[..., 3:] - alpha[0]).abs().max() <= bound / 255
    # Straight colours, as they were: neither multiplied with alpha nor mixed with a background.
    patch = found[:, 40:-8, 4:8, :3]  # red
    assert (patch - torch.tensor([1.0, 0, 0])).abs().max() <= 4 / 255
    assert not caplog.text
    # And without alpha there is none.
    write(tmp_path / name, frames, format=format)
    assert "yuva" not in (streams := describe(tmp_path / name)), streams
    assert "gbrap" not in streams


def describe(path):
    """What ffmpeg says of a file."""
    return subprocess.run([find_ffmpeg(), "-i", str(path)], capture_output=True, text=True, check=False).stderr


def test_prores_with_alpha_is_4444(tmp_path):
    write(tmp_path / "v.mov", torch.cat([FRAMES, FRAMES[..., :1]], dim=-1), format="prores")
    assert re.search(r"prores \(4444\) .*yuva444p", describe(tmp_path / "v.mov"))


def test_a_copy_that_says_nothing_of_alpha_is_made_to(tmp_path):
    write(tmp_path / "v.webm", torch.cat([FRAMES, FRAMES[..., :1]], dim=-1), format="vp9")
    assert not tag_as_alpha(tmp_path / "v.webm")
    for suffix, container in ((".webm", "webm"), (".mkv", "matroska")):
        file = tmp_path / f"copy{suffix}"
        command = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "v.webm"), "-map_metadata:s", "-1", "-c", "copy"]
        subprocess.run([*command, "-f", container, str(file)], check=True)
        assert not describe_video(find_ffmpeg(), file).alpha
        assert tag_as_alpha(file)
        assert describe_video(find_ffmpeg(), file).alpha
        with VideoInput(file, colours=4) as again, VideoInput(tmp_path / "v.webm", colours=4) as made:
            assert torch.equal(torch.cat(list(again)), torch.cat(list(made)))


def test_encoded_again_for_another_encoder_only_the_colours_change(tmp_path):
    write(tmp_path / "v.mkv", format="ffv1")
    encode_again(tmp_path / "v.mkv", tmp_path / "again.mkv", lossless=True)
    assert re.search(r"ffv1.*yuv420p10le\(tv, bt709", describe(tmp_path / "again.mkv"))
    assert errors(by_ffmpeg(tmp_path / "again.mkv"))[1] <= 2


def test_a_video_with_alpha_is_encoded_again_without(tmp_path):
    write(tmp_path / "v.mkv", torch.cat([FRAMES, FRAMES[..., :1]], dim=-1), format="ffv1")
    encode_again(tmp_path / "v.mkv", tmp_path / "v.mp4")
    assert errors(by_ffmpeg(tmp_path / "v.mp4"))[1] <= 6
