"""Every format, there and back: colours by two decoders, tags, sound, texts, odd sides, and what is refused."""

import json
import re
import shutil
import stat
import subprocess
import time
import wave
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image

from wan_vae_parallel import OutputError
from wan_vae_parallel.files.audio import Audio
from wan_vae_parallel.files.ffmpeg import FedProcess, find_ffmpeg
from wan_vae_parallel.files.formats import FORMATS, choose_format
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.files.video import open_output, plan_output
from wan_vae_parallel.files.video_out import encode_again, tag_as_hvc1

WIDTH, HEIGHT, COUNT = 96, 64, 5
COLOURS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1)]
NAMES = {"h264": "v.mp4", "h265": "v.mp4", "vp9": "v.webm", "prores": "v.mov", "ffv1": "v.mkv"}
# The largest error of a channel at the best quality, in 255ths: on ramps, and inside of patches of saturated colours.
# Of the wrong matrix red would be off by 24 and green by 39.
BOUNDS = {"h264": (2.5, 3.5), "h265": (2.5, 2.5), "vp9": (2.5, 3), "prores": (1.6, 1.6), "ffv1": (0.01, 0.01)}


def picture():
    """Grey and coloured ramps above, patches of saturated colours below."""
    frame = torch.zeros(HEIGHT, WIDTH, 3)
    ramp = torch.linspace(0, 1, WIDTH)
    frame[:16] = ramp[None, :, None]
    frame[16:32] = torch.stack([ramp, 1 - ramp, ramp / 2 + 0.25], dim=-1)
    for i, colour in enumerate(COLOURS):
        frame[32:, i * 12 : (i + 1) * 12] = torch.tensor(colour, dtype=torch.float32)
    return frame


FRAMES = picture().expand(1, COUNT, HEIGHT, WIDTH, 3)


def errors(decoded):
    """The largest error of any channel on the ramps and inside the patches, in 255ths."""
    assert decoded.shape == FRAMES[0].shape
    error = (decoded - FRAMES[0]).abs() * 255
    # Away from where colours meet, which halved chroma blurs.
    inside = [x for i in range(8) for x in range(i * 12 + 4, i * 12 + 8)]
    ramps = [*range(2, 13), *range(19, 29)]
    return float(error[:, ramps, 2:-2].max()), float(error[:, 36:, inside].max())


def write(path, frames=FRAMES, **options):
    with open_output(path, shape=frames.shape, **{"fps": 16, **options}) as put:
        for step in frames.split(2, dim=1):
            put(step)


def by_ffmpeg(path):
    """Frames as ffmpeg's own decoder and converter make them, by the file's tags."""
    done = subprocess.run(
        [
            *(find_ffmpeg(), "-v", "error", "-i", str(path)),
            # Left, in the middle of two rows, as players take it; by itself this converter takes the middle of both.
            *("-vf", "scale=in_h_chr_pos=0:in_v_chr_pos=128:flags=accurate_rnd+full_chroma_int+bicubic"),
            *("-f", "rawvideo", "-pix_fmt", "rgb48le", "-"),
        ],
        capture_output=True, check=True,
    )  # fmt: skip
    values = numpy.frombuffer(done.stdout, dtype="<u2").reshape(-1, HEIGHT, WIDTH, 3)
    return torch.from_numpy(values.astype("float32") / 65535)


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


def test_pictures_of_16_bits_are_equal_to_rounding(tmp_path):
    frames = torch.rand(2, 3, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "%03d.png", frames, format="png16", metadata={"prompt": '{"a": 1}', "wörd": "日本"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:03d}.png" for i in range(6)]
    assert Image.open(tmp_path / "005.png").text["prompt"] == '{"a": 1}'
    assert Image.open(tmp_path / "005.png").text["wörd"] == "日本"
    for index in (0, 5):
        found = by_ffmpeg(tmp_path / f"{index:03d}.png")[0]
        assert (found - frames.flatten(0, 1)[index]).abs().max() <= 0.5 / 65535 + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_qualities_differ_in_size_where_there_are_some(tmp_path, name):
    frames = torch.rand(1, 3, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    sizes = []
    for quality in ("low", "best"):
        write(tmp_path / NAMES[name], frames, format=name, quality=quality)
        sizes.append((tmp_path / NAMES[name]).stat().st_size)
    assert sizes[0] < sizes[1] if FORMATS[name].crf else sizes[0] == sizes[1]


# Sound.


@pytest.mark.parametrize(
    ("name", "file", "codec"),
    [
        ("h264", "v.mp4", "aac"),
        ("h265", "v.mov", "aac"),
        ("h264", "v.mkv", "aac"),
        ("vp9", "v.webm", "opus"),
        ("prores", "v.mov", "pcm_s24le"),
        ("ffv1", "v.mkv", "pcm_s24le"),
    ],
)
@pytest.mark.parametrize("seconds", [0.0, 0.1, 3.0])
def test_sound_is_cut_or_filled_to_the_videos_length(tmp_path, name, file, codec, seconds):
    time_ = torch.arange(int(48000 * seconds)) / 48000
    # Of no samples it is silence.
    audio = Audio(torch.stack([torch.sin(2765 * time_), torch.zeros_like(time_)]) * 0.5, 48000)
    frames = FRAMES[:, :1].expand(1, 16, -1, -1, -1)  # one second
    write(tmp_path / file, frames, format=name, audio=audio)
    program = find_ffmpeg()
    said = subprocess.run([program, "-i", str(tmp_path / file)], capture_output=True, text=True, check=False).stderr
    assert f"Audio: {codec}" in said
    command = [program, "-v", "error", "-i", str(tmp_path / file), "-map", "0:a", "-f", "f32le", "-ac", "2", "-"]
    samples = numpy.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, dtype="<f4")
    samples = samples.reshape(-1, 2)
    exact = codec.startswith("pcm")
    assert abs(len(samples) - 48000) <= (
        0 if exact else 2100
    )  # codecs have frames of up to 1024, and a first one to start with
    assert abs(samples[2000:4000, 0].max() - (0.5 if seconds else 0)) < 0.05
    assert abs(samples[:, 1]).max() < 0.05
    assert (abs(samples[20000:, 0]).max() < 0.01) == (seconds < 1)


def test_sound_may_come_from_a_file(tmp_path):
    write(tmp_path / "a.mp4", audio=Audio(torch.rand(1, 48000) - 0.5, 48000))
    write(tmp_path / "b.webm", audio=tmp_path / "a.mp4")
    said = subprocess.run([find_ffmpeg(), "-i", str(tmp_path / "b.webm")], capture_output=True, text=True, check=False)
    assert "Audio: opus" in said.stderr


@pytest.mark.parametrize(
    ("name", "file"), [("h264", "v.mp4"), ("h264", "v.mkv"), ("vp9", "v.webm"), ("prores", "v.mov"), ("ffv1", "v.mkv")]
)
@pytest.mark.parametrize("metadata", [{}, {"prompt": "ours"}])
def test_of_a_file_with_sound_nothing_else_comes_along(tmp_path, name, file, metadata):
    (tmp_path / "texts").write_text(
        ";FFMETADATA1\ntitle=secret\nartist=secret\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=100\ntitle=secret\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=100\nEND=250\ntitle=secret\n"
    )
    source = ["-f", "lavfi", "-i", "sine=d=1", "-f", "ffmetadata", "-i", str(tmp_path / "texts")]
    source += ["-attach", str(tmp_path / "texts"), "-metadata:s:t", "mimetype=text/secret", "-map", "0:a"]
    source += ["-map_metadata", "1", "-map_chapters", "1", "-metadata:s:a", "title=secret"]
    source += ["-metadata:s:a", "language=deu", "-disposition:a", "comment"]
    subprocess.run([find_ffmpeg(), "-v", "error", *source, str(tmp_path / "sound.mkv")], check=True)

    def said(path):
        return subprocess.run([find_ffmpeg(), "-i", path], capture_output=True, text=True, check=False).stderr

    assert all(word in said(tmp_path / "sound.mkv") for word in ("secret", "Chapter", "Attachment", "deu", "comment"))
    made = tmp_path / "made"
    made.mkdir()
    preview = {} if FORMATS[name].browsers else {"preview": made / "preview.mp4"}
    write(made / file, format=name, audio=tmp_path / "sound.mkv", metadata=metadata, **preview)
    if name in ("prores", "ffv1"):
        encode_again(made / file, made / "again.mp4")
    for path in made.iterdir():
        text = said(path).partition(path.name)[2]
        assert "Audio" in text, path
        assert ("ours" in text) == (bool(metadata) and path.name != "preview.mp4"), path
        assert not any(word in text for word in ("secret", "Chapter", "Attachment", "deu", "comment", "Data:")), text


def test_a_file_with_an_empty_sound_is_silence(tmp_path):
    with wave.open(str(tmp_path / "empty.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 0, "NONE", ""))
    write(tmp_path / "v.mkv", format="ffv1", audio=tmp_path / "empty.wav")
    command = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "v.mkv"), "-map", "0:a", "-f", "f32le", "-"]
    samples = numpy.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, dtype="<f4")
    assert len(samples) == 2 * 48000 * COUNT // 16
    assert not samples.any()


# Texts, previews, sides.


@pytest.mark.parametrize(
    ("name", "file"), [("h264", "v.mp4"), ("prores", "v.mov"), ("vp9", "v.webm"), ("ffv1", "v.mkv")]
)
def test_texts_come_back_however_long_they_are(tmp_path, name, file):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    texts = {"prompt": json.dumps({"1": {"a": "x=1;#\\ \n" * 30000}}), "workflow": json.dumps({"nodes": ["日本"]})}
    write(tmp_path / file, format=name, metadata=texts)
    with av.open(str(tmp_path / file)) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert {key: found[key] for key in texts} == texts


@pytest.mark.parametrize(("name", "file"), [("prores", "v.mov"), ("ffv1", "v.mkv")])
def test_texts_are_kept_and_none_added_by_encoding_again(tmp_path, name, file):
    write(tmp_path / file, format=name, metadata={"prompt": "p=1;", "workflow": "日本"})
    encode_again(tmp_path / file, tmp_path / "again.mp4")
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "again.mp4")) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert (found["prompt"], found["workflow"]) == ("p=1;", "日本")
    assert (found["major_brand"], found["minor_version"]) == ("isom", "512")


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


def test_what_browsers_can_not_play_gets_a_preview(tmp_path):
    for name in ("v.mkv", "p/%d.png"):
        write(tmp_path / name, format="ffv1" if name == "v.mkv" else None, preview=tmp_path / "preview.mp4")
        found = by_ffmpeg(tmp_path / "preview.mp4")
        assert found.shape == FRAMES[0].shape
        for i, colour in enumerate(COLOURS):
            patch = found[:, 36:, i * 12 + 4 : i * 12 + 8].mean(dim=(0, 1, 2)) * 255
            assert (patch - torch.tensor(colour) * 255).abs().max() < 6


@pytest.mark.parametrize("name", ["v.mkv", "p/%d.png"])
@pytest.mark.parametrize(
    "fault",
    ["it does not start", "it ends in the middle", "it fails at the end", "its place goes", "no place", "no encoder"],
)
def test_a_preview_that_fails_is_told_and_the_video_stays(tmp_path, caplog, name, fault):
    expected, place, real = tmp_path / "expected", tmp_path / "place", find_ffmpeg()
    options = {"format": "ffv1"} if name == "v.mkv" else {}
    expected.mkdir()
    write(expected / name, **options)
    previewed = {
        "it does not start": 'case "$*" in *veryfast*) exit 3;; esac',
        "it ends in the middle": 'case "$*" in *veryfast*) head -c 100000 >/dev/null; kill -9 $$;; esac',
        "it fails at the end": f'case "$*" in *veryfast*) {real} "$@"; exit 3;; esac',
        "no encoder": 'case "$*" in *encoder=libx264) exit 0;; esac',
    }
    ffmpeg = program(tmp_path / "ffmpeg", f'{previewed.get(fault, "")}\nexec {real} "$@"')
    if fault != "no place":
        place.mkdir()
    (tmp_path / "made").mkdir()
    with open_output(
        tmp_path / "made" / name, shape=SHAPE, fps=16, preview=place / "preview.mp4", ffmpeg=ffmpeg, **options
    ) as put:
        put(FRAMES[:, :2])
        if fault == "its place goes":
            shutil.rmtree(place)
        put(FRAMES[:, 2:])
    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (expected, tmp_path / "made")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == (1 if name == "v.mkv" else COUNT)
    assert "preview.mp4 could not be made" in caplog.text
    assert not place.exists() or not list(place.iterdir())


@pytest.fixture
def processes(monkeypatch):
    """How many ffmpegs were fed, and how many at a time at the most."""
    alive, counts = set(), {"all": 0, "at once": 0}
    begin, close = FedProcess.__init__, FedProcess.close

    def begun(self, command):
        begin(self, command)
        alive.add(self)
        counts["all"] += 1
        counts["at once"] = max(counts["at once"], len(alive))

    def closed(self):
        close(self)
        alive.discard(self)

    monkeypatch.setattr(FedProcess, "__init__", begun)
    monkeypatch.setattr(FedProcess, "close", closed)
    return counts


@pytest.mark.parametrize("frames", [1, 3])
def test_one_process_writes_all_pictures_of_a_batch_each_as_by_itself(tmp_path, processes, frames):
    batch = torch.rand(12, frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    (tmp_path / "all").mkdir()
    write(tmp_path / "all" / "%d.png", batch, format="png16", metadata={"prompt": "p"})
    assert processes == {"all": 1, "at once": 1}
    for video in (0, 5, 11):
        alone = tmp_path / f"{video}"
        alone.mkdir()
        write(alone / "%d.png", batch[video : video + 1], format="png16", metadata={"prompt": "p"})
        for frame in range(frames):
            together = (tmp_path / "all" / f"{video * frames + frame}.png").read_bytes()
            assert together == (alone / f"{frame}.png").read_bytes()


def test_videos_of_one_frame_are_encoded_one_after_the_other(tmp_path, processes):
    batch = torch.rand(6, 1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "v.mkv", batch, format="ffv1")
    assert processes == {"all": 6, "at once": 1}
    for video in range(6):
        found = by_ffmpeg(tmp_path / f"v_{video + 1}.mkv")
        assert (found - batch[video]).abs().max() <= 0.5 / 65535 + 1e-7


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


# What can't work is refused before the start.

SHAPE = FRAMES.shape


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("v.mp4", (1, 5, 64, 16400, 3), {}, "takes 2 to 16384 pixels a side, and frames of 16400x64 are 16400 wide"),
        ("v.mp4", (1, 5, 8, 8, 3), {"format": "h265"}, "takes 64 to 16384 pixels a side"),
        ("v.mov", (1, 5, 64, 65536, 3), {"format": "prores"}, "65536 wide; choose another format"),
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


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        (torch.zeros(9, 5), 48000, "has 9 channels; it must have 1 to 8"),
        (torch.zeros(0, 5), 48000, "has 0 channels"),
        (torch.zeros(5), 48000, "must be a tensor of floats"),
        (torch.zeros(2, 5), 0, "has 0 samples a second"),
        (torch.zeros(2, 5), 48000.0, "a whole number"),
        (torch.full((1, 5), torch.nan), 48000, "NaN"),
    ],
)
def test_bad_sound_is_refused(waveform, rate, words):
    with pytest.raises(OutputError, match=words):
        Audio(waveform, rate)


def test_a_file_without_sound_is_refused_before_the_start(tmp_path):
    write(tmp_path / "silent.mp4")
    with pytest.raises(OutputError, match=r"with sound: ffmpeg says .*matches no streams"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(audio=tmp_path / "silent.mp4"))
    with pytest.raises(OutputError, match="no audio file"):
        OutputSettings(audio=tmp_path / "none.wav")


def program(path, text):
    """A script in ffmpeg's place."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


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


# Pictures of an older video.


def test_an_older_longer_videos_pictures_are_refused_or_cleared(tmp_path):
    pattern = tmp_path / "f_%03d.png"
    write(pattern, FRAMES)
    others = ["f_abc.png", "f_7.png", "g_009.png", "f_004.txt"]
    for name in others:
        (tmp_path / name).touch()
    short = FRAMES[:, :3]
    with pytest.raises(OutputError, match=r"f_003.png to f_004.png of an older video, .* 3 new pictures"):
        write(pattern, short)
    assert len(list(tmp_path.iterdir())) == 9
    write(pattern, short, old_pictures="clear")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, *(f"f_00{i}.png" for i in range(3))])
    write(pattern, short)  # as many: they are written over


def test_a_video_that_is_not_finished_clears_nothing(tmp_path):
    write(tmp_path / "%d.png", FRAMES)
    with (
        pytest.raises(OutputError, match="1 of 3 frames"),
        open_output(tmp_path / "%d.png", shape=FRAMES[:, :3].shape, fps=16, old_pictures="clear") as put,
    ):
        put(FRAMES[:, :1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(5)]


def test_older_pictures_come_back_if_the_new_ones_can_not_take_their_names(tmp_path, monkeypatch):
    write(tmp_path / "%d.png", FRAMES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, count = Path.replace, []

    def replace(path, target):
        count.append(target)
        if len(count) == 4:
            raise OSError(5, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match="Input/output error"):
            write(tmp_path / "%d.png", FRAMES[:, :3].flip(1), old_pictures="clear")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


def test_a_rate_is_kept_exactly(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    for name in NAMES:
        write(tmp_path / NAMES[name], format=name, fps=Fraction(24000, 1001))
        with av.open(str(tmp_path / NAMES[name])) as container:
            assert abs(container.streams.video[0].average_rate - Fraction(24000, 1001)) < Fraction(1, 100)


def test_the_usual_format_of_each_suffix():
    usual = {".mp4": "h264", ".mkv": "h264", ".mov": "h264", ".webm": "vp9"}
    assert {suffix: choose_format(Path(f"v{suffix}"), None).name for suffix in usual} == usual
