"""Sound beside a video, and texts: what comes along, what stays behind, and how long it is."""

import json
import re
import subprocess
import wave

import numpy
import pytest
import torch

from tests.files.clips import COUNT, FRAMES, SHAPE, write
from wan_vae_parallel import OutputError
from wan_vae_parallel.files.audio import Audio
from wan_vae_parallel.files.ffmpeg import find_ffmpeg
from wan_vae_parallel.files.formats import FORMATS
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.files.video import plan_output
from wan_vae_parallel.files.video_out import encode_again


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


# Where each channel is found again: in Opus some kinds are carried within larger ones.
@pytest.mark.parametrize(
    ("name", "file", "channels", "found"),
    [
        ("h264", "v.mp4", 5, [0, 1, 2, 3, 4]),
        ("h264", "v.mp4", 6, [0, 1, 2, 3, 4, 5]),
        ("prores", "v.mov", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("vp9", "v.webm", 1, [0]),
        ("vp9", "v.webm", 2, [0, 1]),
        ("vp9", "v.webm", 3, [0, 1, 3]),
        ("vp9", "v.webm", 4, [0, 1, 2, 3]),
        ("vp9", "v.webm", 5, [0, 1, 2, 4, 5]),
        ("vp9", "v.webm", 6, [0, 1, 2, 3, 4, 5]),
        ("vp9", "v.webm", 7, [0, 1, 2, 3, 4, 6, 7]),
        ("vp9", "v.webm", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_every_channel_stays_where_it_is(tmp_path, name, file, channels, found):
    places = []
    tone = torch.sin(torch.arange(24000) / 48000 * 2 * torch.pi * 60) / 2  # deep enough for a subwoofer
    for channel in range(channels):
        waveform = torch.zeros(channels, 24000)
        waveform[channel] = tone
        write(tmp_path / file, format=name, fps=10, audio=Audio(waveform, 48000))
        command = [find_ffmpeg(), "-i", str(tmp_path / file), "-map", "0:a", "-f", "f32le", "-"]
        done = subprocess.run(command, capture_output=True, check=True)
        kind = re.search(r"Audio: .* Hz, ([^,]+),", done.stderr.decode())[1]
        count = {"mono": 1, "stereo": 2, "quad": 4, "5.0": 5, "5.1": 6, "7.1": 8}[kind]
        samples = numpy.frombuffer(done.stdout, dtype="<f4").reshape(-1, count)
        places.append(int(abs(samples[5000:15000]).max(axis=0).argmax()))
    assert places == found


def known_layouts():
    """Channels by the name of their layout, as ffmpeg knows them."""
    said = subprocess.run([find_ffmpeg(), "-v", "error", "-layouts"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\S+) +((?:[A-Z0-9]+\+)*[A-Z0-9]+)$", said.partition("DECOMPOSITION")[2], re.MULTILINE)
    return {name: channels.split("+") for name, channels in found}


def file_with_tones(folder, layout, frequencies):
    """A file with sound of a layout, in whose channels are tones; None if no container says such a layout."""
    samples = torch.arange(48000) / 48000
    tones = torch.stack([torch.sin(2 * torch.pi * one * samples) / 4 for one in frequencies])
    (folder / "tones").write_bytes(tones.t().contiguous().numpy().tobytes())
    for suffix in (".wav", ".caf"):
        source = ["-f", "f32le", "-ar", "48000", "-ch_layout", layout, "-i", str(folder / "tones")]
        path = folder / f"sound{suffix}"
        subprocess.run([find_ffmpeg(), "-y", "-v", "quiet", *source, "-c:a", "pcm_f32le", str(path)], check=False)
        said = subprocess.run([find_ffmpeg(), "-i", str(path)], capture_output=True, text=True, check=False).stderr
        if f" Hz, {layout}, " in said:
            return path
    return None


def heard(path, frequencies):
    """How loud each tone is in a video's sound, where it is loudest; of all of it 1."""
    command = [find_ffmpeg(), "-i", str(path), "-map", "0:a", "-f", "wav", "-c:a", "pcm_f32le", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    channels = int.from_bytes(data[22:24], "little")
    samples = numpy.frombuffer(data[data.index(b"data") + 8 :], dtype="<f4")
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels)[4000:44000]
    window = numpy.hanning(len(samples))
    waves = numpy.exp(-2j * numpy.pi * numpy.outer(frequencies, numpy.arange(len(samples)) / 48000))
    return abs((waves * window) @ samples).max(axis=1) / window.sum() * 2 / 0.25


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("h264", "v.mp4"),
        ("vp9", "v.webm"),
        ("ffv1", "v.mkv"),
    ],
)
@pytest.mark.slow
def test_of_every_layout_each_channel_is_heard_or_it_is_refused(tmp_path, name, file):
    refused, kept = {}, set()
    for layout, channels in known_layouts().items():
        # The deepest for subwoofers, of which codecs keep no others.
        order = sorted(range(len(channels)), key=lambda i: not channels[i].startswith("LFE"))
        frequencies = [40 + 8 * order.index(i) for i in range(len(channels))]
        sound = file_with_tones(tmp_path, layout, frequencies)
        if sound is None:
            continue
        try:
            write(tmp_path / file, FRAMES[:, :4], fps=4, format=name, audio=sound)
        except OutputError as error:
            refused[layout] = str(error)
            continue
        kept.add(layout)
        loud = heard(tmp_path / file, frequencies)
        assert loud.min() > 0.15, (layout, dict(zip(channels, loud, strict=True)))
        (tmp_path / file).unlink()
    assert {"mono", "stereo", "2.1", "3.0", "3.1", "quad", "5.0", "5.1", "5.1(side)", "6.1", "7.1", "7.1(wide)"} <= kept
    assert bool(refused) == (name != "ffv1")
    assert all(re.search(r"mix (it|the sound) to", error) for error in refused.values()), refused
    assert not (tmp_path / file).exists()


def test_sound_whose_channels_opus_has_no_place_for_is_refused_with_the_way_out(tmp_path):
    sound = file_with_tones(tmp_path, "5.1.4", [50] * 10)
    with pytest.raises(OutputError, match=r"the channels TFL TFR TBL TBR, which Opus has no place for; mix it to 7\.1"):
        plan_output(tmp_path / "v.webm", SHAPE, OutputSettings(audio=sound))
    with pytest.raises(OutputError, match=r"or mix the sound to 5\.1 or stereo .*channel layout"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(audio=sound))


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


@pytest.mark.parametrize(("name", "file"), [("vp9", "v.webm"), ("prores", "v.mov"), ("ffv1", "v.mkv")])
def test_what_is_encoded_again_has_all_tags_of_its_colours(tmp_path, name, file):
    write(tmp_path / file, format=name)
    encode_again(tmp_path / file, tmp_path / "again.mp4")
    command = [find_ffmpeg(), "-i", str(tmp_path / "again.mp4")]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "yuv420p(tv, bt709, progressive)" in said  # of matrix, primaries and transfer


@pytest.mark.parametrize(("name", "file"), [("prores", "v.mov"), ("ffv1", "v.mkv")])
def test_texts_are_kept_and_none_added_by_encoding_again(tmp_path, name, file):
    write(tmp_path / file, format=name, metadata={"prompt": "p=1;", "workflow": "日本"})
    encode_again(tmp_path / file, tmp_path / "again.mp4")
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "again.mp4")) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert (found["prompt"], found["workflow"]) == ("p=1;", "日本")
    assert (found["major_brand"], found["minor_version"]) == ("isom", "512")


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


@pytest.mark.parametrize(("name", "words"), [("silent.mp4", "matches no streams"), ("text.wav", "Invalid data")])
def test_a_file_without_sound_is_refused_before_the_start(tmp_path, name, words):
    write(tmp_path / "silent.mp4")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(OutputError, match=rf"{name} has no sound .*leave the audio away .*{words}.*{name}\)"):
        plan_output(tmp_path / "v.mp4", SHAPE, OutputSettings(audio=tmp_path / name))
    with pytest.raises(OutputError, match="no audio file"):
        OutputSettings(audio=tmp_path / "none.wav")
