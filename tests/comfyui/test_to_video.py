"""Latents to a video file and back in a real ComfyUI server, by POST /prompt."""

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request

import pytest
import torch

from tests.comfyui.server import node, saves
from tests.processes import patience
from wan_vae_parallel.files.ffmpeg import find_ffmpeg
from wan_vae_parallel.files.frames_in import open_frames

FORMATS = {
    "MP4 H.264 8 bit": ".mp4",
    "MP4 H.265 10 bit": ".mp4",
    "WebM VP9 8 bit": ".webm",
    "MOV ProRes 422 HQ 10 bit": ".mov",
    "MKV FFV1 lossless 16 bit": ".mkv",
    "PNG pictures 16 bit": ".png",
}
LOSSLESS = "MKV FFV1 lossless 16 bit"


def latents(*, frames=3, batch=1, seed=1, rows=4, columns=6):
    return torch.randn((batch, 16, frames, rows, columns), generator=torch.Generator().manual_seed(seed))


def to_video(samples, *, loader=None, **inputs):
    """A graph whose node "v" makes a video, with a loader and what gives the latents."""
    given = {"format": LOSSLESS, "fps": 16.0, "quality": "high", "filename_prefix": "v", "save": False, **inputs}
    return {
        "l": loader or node("WanVAEParallelLoader", vae_name="wan21.safetensors", devices="cpu", chunk=1),
        "s": samples,
        "v": node("WanVAEParallelDecodeToVideo", samples=["s", 0], vae=["l", 0], **given),
    }


def components(of="v", name="frames.safetensors"):
    """Nodes that take the VIDEO apart and hand its frames out."""
    return {
        f"c{name}": node("GetVideoComponents", video=[of, 0]),
        f"o{name}": node("ProbeSaveTensor", name=name, image=[f"c{name}", 0]),
    }


def decoded(samples="s"):
    return {
        "d": node("WanVAEParallelDecode", samples=[samples, 0], vae=["l", 0]),
        "do": node("ProbeSaveTensor", name="decoded.safetensors", image=["d", 0]),
    }


def equal_to_rounding(frames, expected):
    """Whether frames of a lossless file are what was decoded; a core before 0.33 reads 8 bits of any file."""
    eight_bits = (frames * 255 - (frames * 255).round()).abs().max() < 1e-3
    return frames.shape == expected.shape and (frames - expected).abs().max() < (0.008 if eight_bits else 0.001)


@pytest.mark.parametrize(
    "format",
    # Of those for MP4 and WebM the file tests have the rest.
    [pytest.param(name, marks=pytest.mark.slow) if "H.265" in name or "VP9" in name else name for name in FORMATS],
)
def test_every_format_is_a_video_for_cores_nodes_and_shown(server, send, received, format):
    graph = {
        **to_video(send("l.safetensors", latents(rows=8, columns=9)), format=format, quality="best"),
        **components(),
        **decoded(),
        "save": node("SaveVideo", video=["v", 0], filename_prefix="saved", format="auto", codec="auto"),
    }
    run = server.run(graph).check()
    frames, expected = received("frames.safetensors"), received("decoded.safetensors")
    assert frames.shape == expected.shape == (9, 64, 72, 3)
    exact = format == LOSSLESS or format.startswith("PNG")
    # Random latents make pictures of noise, whose chroma a video halves.
    assert equal_to_rounding(frames, expected) if exact else (frames - expected).abs().mean() < 0.1
    assert (frames.mean((0, 1, 2)) - expected.mean((0, 1, 2))).abs().max() < 0.02
    # What the frontend shows is a file that it can fetch and play.
    shown = run.outputs("v")
    assert shown["animated"] == [True]
    (file,) = shown["images"]
    assert file["filename"].endswith((".mp4", ".webm"))
    assert file["type"] == "temp"
    query = "&".join(f"{key}={value}" for key, value in file.items())
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/view?{query}", timeout=30) as response:
        assert response.headers["Content-Type"] in ("video/mp4", "video/webm")
        assert len(response.read()) > 500
    saved = run.outputs("save")["images"][0]
    file = server.output / saved["subfolder"] / saved["filename"]
    assert file.suffix == ".mp4"
    said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
    assert re.search(r"Video: (h264|hevc|vp9).*yuv4\d\dp(10le)?\(tv, bt709", said), said
    # The same colours again, read by the tags.
    with open_frames(file, colours=3, most=None) as frames_again:
        again = torch.cat(list(frames_again))
    assert again.shape == expected.shape
    assert (again.mean((0, 1, 2)) - expected.mean((0, 1, 2))).abs().max() < 0.02


def test_h265_that_core_copies_stays_what_apples_players_take(server, send):
    source = send("l.safetensors", latents(rows=8, columns=9))
    graph = {
        **to_video(source, format="MP4 H.265 10 bit", audio=["a", 0]),
        "a": node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        "save": node("SaveVideo", video=["v", 0], filename_prefix="hvc1", format="auto", codec="auto"),
        "again": node("ProbeSaveVideo", video=["v", 0], name="hvc1"),
    }
    run = server.run(graph).check()
    saved = run.outputs("save")["images"][0]
    files = [server.output / saved["subfolder"] / saved["filename"]]
    files += [server.output / name for name in ("hvc1.mp4", "hvc1.mov", "buffer hvc1.mp4")]
    before = None
    for file in files:
        said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
        assert re.search(r"Video: hevc.*\(hvc1 / 0x.*yuv420p10le\(tv, bt709", said), said
        assert "Audio: aac" in said
        # This server's Save Video adds no texts.
        assert file == files[0] or re.search(r"asked +: for", said), said
        command = [find_ffmpeg(), "-v", "error", "-i", str(file), "-map", "0:v", "-c", "copy", "-f", "md5", "-"]
        streams = subprocess.run(command, capture_output=True, check=True).stdout
        assert streams == (before or streams)
        before = streams
        with open_frames(file, colours=3, most=None) as frames:
            assert len(list(frames)) == 9


@pytest.mark.parametrize("format", ["MP4 H.265 10 bit", "WebM VP9 8 bit"])
def test_h264_that_is_asked_for_has_tags_and_the_sound_whole(server, send, format):
    graph = {
        **to_video(send("l.safetensors", latents(rows=8, columns=9)), format=format, audio=["a", 0]),
        "a": node("EmptyAudio", duration=3.0, sample_rate=44100, channels=2),
        "save": node("SaveVideo", video=["v", 0], filename_prefix="asked", format="mp4", codec="h264"),
    }
    saved = server.run(graph).check().outputs("save")["images"][0]
    file = server.output / saved["subfolder"] / saved["filename"]
    said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
    assert re.search(r"Video: h264.*yuv420p(10le)?\(tv, bt709", said), said
    assert re.search(r"Duration: 00:00:00\.5.*Audio: aac", said, re.DOTALL), said


@pytest.mark.parametrize(
    ("format", "container", "codec", "stream"),
    [
        (LOSSLESS, "mkv", "auto", r"ffv1.*gbrp16le\(pc, gbr/"),
        (LOSSLESS, "mkv", "h264", r"h264.*yuv420p10le\(tv, bt709"),
        (LOSSLESS, "webm", "auto", r"av1.*yuv420p10le\(tv, bt709"),
        (LOSSLESS, "mp4", "av1", r"av1.*yuv420p10le\(tv, bt709"),
        ("PNG pictures 16 bit", "mkv", "auto", r"h264.*yuv420p10le\(tv, bt709"),
        ("PNG pictures 16 bit", "webm", "auto", r"av1.*yuv420p10le\(tv, bt709"),
        ("MOV ProRes 422 HQ 10 bit", "mkv", "auto", r"h264.*yuv420p10le\(tv, bt709"),
        ("MP4 H.265 10 bit", "webm", "auto", r"av1.*yuv420p10le\(tv, bt709"),
    ],
)
def test_other_containers_have_the_colours_that_their_tags_say(
    server, send, received, format, container, codec, stream
):
    if not saves(server, container, codec):
        pytest.skip(f"this ComfyUI does not save {codec} in {container}")
    graph = {
        **to_video(send("l.safetensors", latents(rows=12, columns=16)), format=format),
        **decoded(),
        "save": node("SaveVideo", video=["v", 0], filename_prefix="other", format=container, codec=codec),
    }
    saved = server.run(graph).check().outputs("save")["images"][0]
    file = server.output / saved["subfolder"] / saved["filename"]
    assert file.suffix == f".{container}"
    said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
    assert re.search(rf"Video: {stream}", said), said
    expected = received("decoded.safetensors")
    with open_frames(file, colours=3, most=None) as frames:
        again = torch.cat(list(frames))
    assert again.shape == expected.shape
    assert (again.mean((0, 1, 2)) - expected.mean((0, 1, 2))).abs().max() < 0.02


def test_what_was_trimmed_is_saved_as_the_whole_is(server, send):
    if "Video Slice" not in server.get("/object_info"):
        pytest.skip("this ComfyUI does not trim videos")
    graph = {
        **to_video(send("l.safetensors", latents())),
        "trimmed": node("Video Slice", video=["v", 0], start_time=0.0, duration=0.25, strict_duration=False),
        "save": node("SaveVideo", video=["trimmed", 0], filename_prefix="trimmed", format="auto", codec="auto"),
    }
    saved = server.run(graph).check().outputs("save")["images"][0]
    file = server.output / saved["subfolder"] / saved["filename"]
    said = subprocess.run([find_ffmpeg(), "-i", str(file)], capture_output=True, text=True, check=False).stderr
    assert re.search(r"Video: h264.*yuv420p\(tv, bt709", said), said
    with open_frames(file, colours=3, most=None) as frames:
        assert len(list(frames)) == 4


def test_a_saved_file_lies_in_output_and_the_next_one_has_the_next_number(server, send):
    source = send("l.safetensors", latents())
    names = []
    for quality in ("low", "high"):
        graph = to_video(source, format="MP4 H.264 8 bit", save=True, filename_prefix="sub/w%width%", quality=quality)
        (file,) = server.run(graph).check().outputs("v")["images"]
        assert file["type"] == "output"
        assert (server.output / file["subfolder"] / file["filename"]).is_file()
        names.append(f"{file['subfolder']}/{file['filename']}")
    assert names == ["sub/w48_00001_.mp4", "sub/w48_00002_.mp4"]


@pytest.mark.parametrize("format", [name for name in FORMATS if "H.264" not in name and "VP9" not in name])
def test_what_was_saved_is_named_in_the_history_beside_what_browsers_play(server, send, format):
    prefix = f"named/{format.split()[1]}"
    source = send("l.safetensors", latents(batch=2, frames=2, rows=8, columns=8))
    run = server.run(to_video(source, format=format, save=True, filename_prefix=prefix)).check()
    shown = run.outputs("v")
    saved = {f"{file['subfolder']}/{file['filename']}" for file in shown["images"] if file["type"] == "output"}
    assert saved == {str(file.relative_to(server.output)) for file in server.output.glob(f"{prefix}*/*.png")} | {
        str(file.relative_to(server.output)) for file in server.output.glob(f"{prefix}*") if file.is_file()
    }
    if format.startswith("PNG"):
        # Browsers show pictures, and the editor takes no output for a video in which there is one.
        assert len(saved) == 2 * 5
        assert shown["animated"] == [False]
        assert all(file["type"] == "output" for file in shown["images"])
    else:
        assert len(saved) == 2
        assert shown["animated"] == [True]
        # The first of each is what the editor plays.
        assert [file["type"] for file in shown["images"]] == ["temp", "output"] * 2
    for file in shown["images"]:
        query = "&".join(f"{key}={value}" for key, value in file.items())
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/view?{query}", timeout=30).close()


@pytest.mark.parametrize("join", [True, False])
def test_a_batch_is_consecutive_parts_or_several_videos(server, send, received, join):
    batch = latents(batch=2, frames=2)
    graph = {**to_video(send("l.safetensors", batch), join=join), **components()}
    together = torch.cat(list(batch), dim=1)[None]
    graph["s2"] = send("l2.safetensors", together if join else batch[1:])
    run = server.run({**graph, **decoded("s2")}).check()
    assert len(run.outputs("v")["images"]) == (1 if join else 2)
    # Of several videos the last one's frames are the ones that the probe wrote last.
    assert equal_to_rounding(received("frames.safetensors"), received("decoded.safetensors"))


# Of a second video: other channels, NaN, and a size that the format can't have.
@pytest.mark.parametrize(
    ("second", "words"),
    [
        (torch.zeros(1, 48, 2, 4, 6), "48 channels"),
        (torch.full((1, 16, 2, 4, 6), torch.nan), "NaN"),
        (torch.zeros(1, 16, 2, 4, 6), "takes 64 to 16384 pixels a side"),
    ],
)
def test_nothing_is_decoded_before_an_error_in_a_later_video_of_a_list(server, send, second, words):
    graph = {
        **to_video(["both", 0], format="MP4 H.265 10 bit", save=True, filename_prefix="list"),
        "one": send("one.safetensors", latents(rows=8, columns=9)),
        "other": send("other.safetensors", second),
        "both": node("ProbeLatentList", one=["one", 0], other=["other", 0]),
    }
    graph["v"]["inputs"]["samples"] = ["both", 0]
    del graph["s"]
    run = server.run(graph)
    assert run.ended == "execution_error"
    assert words in run.detail["exception_message"]
    assert not run.progress("v")
    assert not list(server.output.glob("list*"))


def test_each_video_of_a_list_has_a_name_and_a_size_of_its_own(server, send):
    graph = {
        **to_video(["both", 0], format="MP4 H.264 8 bit", save=True, filename_prefix="each/v"),
        "one": send("one.safetensors", latents()),
        "other": send("other.safetensors", latents(batch=2, columns=8)),
        "both": node("ProbeLatentList", one=["one", 0], other=["other", 0]),
    }
    graph["v"]["inputs"]["samples"] = ["both", 0]
    del graph["s"]
    shown = server.run(graph).check().outputs("v")["images"]
    assert [file["filename"] for file in shown] == [f"v_0000{number}_.mp4" for number in (1, 2, 3)]
    widths = []
    for file in shown:
        with open_frames(server.output / "each" / file["filename"], colours=3, most=None) as frames:
            widths.append(next(iter(frames)).shape[2])
    assert widths == [48, 64, 64]


def test_images_become_pictures_of_one_folder(server, send, received):
    batch = latents(batch=5, frames=1)
    graph = {
        **to_video(send("l.safetensors", batch), format="PNG pictures 16 bit", save=True, filename_prefix="images"),
        **components(),
        **decoded(),
    }
    run = server.run(graph).check()
    names = [(file["subfolder"], file["filename"]) for file in run.outputs("v")["images"]]
    assert names == [("images_00001_", f"{number:05d}.png") for number in range(5)]
    assert equal_to_rounding(received("frames.safetensors"), received("decoded.safetensors"))
    # Of another size, or a video: a folder of its own.
    graph |= {
        "other": send("other.safetensors", latents(batch=2, frames=1, columns=4)),
        "both": node("ProbeLatentList", one=["s", 0], other=["other", 0]),
    }
    graph["v"]["inputs"]["samples"] = ["both", 0]
    run = server.run(graph).check()
    folders = [file["subfolder"] for file in run.outputs("v")["images"]]
    assert folders == ["images_00002_"] * 5 + ["images_00003_"] * 2


def words(words):
    """Puts into the LATENT what WanVideoWrapper's sampler says beside its latents."""
    return node("ProbeAddWords", latent=["raw", 0], words=words)


def test_what_the_wrappers_sampler_says_is_followed_or_refused(server, send, received):
    raw = send("l.safetensors", latents(frames=5))
    graph = {**to_video(words('{"has_ref": true, "drop_last": true}')), "raw": raw, **components(), **decoded()}
    server.run(graph).check()
    assert len(received("frames.safetensors")) == 9
    assert equal_to_rounding(received("frames.safetensors"), received("decoded.safetensors"))
    run = server.run({**to_video(words('{"looped": true, "has_ref": false}')), "raw": raw})
    assert run.ended == "execution_error"
    assert "connect Wan VAE Decode (Parallel) and Create Video" in run.detail["exception_message"]


def test_sound_is_muxed_and_trims_and_components_work(server, send, received):
    graph = {
        **to_video(send("l.safetensors", latents()), format="MP4 H.264 8 bit", audio=["a", 0]),
        "a": node("EmptyAudio", duration=3.0, sample_rate=44100, channels=2),
        "t": node("Video Slice", video=["v", 0], start_time=0.0, duration=0.25, strict_duration=False),
        **components("t"),
        "cv": node("GetVideoComponents", video=["v", 0]),
        "sa": node("SaveAudio", audio=["cv", 1], filename_prefix="sound"),
    }
    if "Video Slice" not in server.get("/object_info"):
        del graph["t"]
        graph.update(components("v"))
    run = server.run(graph).check()
    assert run.outputs("sa")["audio"]
    assert len(received("frames.safetensors")) == (4 if "t" in graph else 9)


# Of no samples, and of no channels.
@pytest.mark.parametrize(("channels", "sound"), [(2, True), (0, False)])
def test_sound_of_no_length_is_silence_or_none(server, send, channels, sound):
    graph = to_video(
        send("l.safetensors", latents()),
        format="MP4 H.264 8 bit",
        audio=["a", 0],
        save=True,
        filename_prefix=f"silent{channels}",
    )
    graph["a"] = node("ProbeEmptyAudio", channels=channels)
    (file,) = server.run(graph).check().outputs("v")["images"]
    path = server.output / file["filename"]
    said = subprocess.run([find_ffmpeg(), "-i", str(path)], capture_output=True, text=True, check=False).stderr
    assert "Duration: 00:00:00.5" in said
    assert ("Audio: aac" in said) == sound


def test_two_workers_make_the_same_video_with_progress_and_previews(server, send, received):
    loader = node("WanVAEParallelLoader", vae_name="wan21.safetensors", devices="cpu,cpu", chunk=1)
    graph = {**to_video(send("l.safetensors", latents(frames=5)), loader=loader), **components(), **decoded()}
    run = server.run(graph).check()
    assert run.progress("v")[-1] == (17, 17)
    assert len(run.progress("v")) >= 4
    (said,) = [text for name, text in run.texts if name == "v"]
    assert re.fullmatch(r"17 frames of \d+x\d+, \d+\.\d+ s on 2 processes", said), said
    assert equal_to_rounding(received("frames.safetensors"), received("decoded.safetensors"))


def leftovers(server):
    return [path for path in server.folder.rglob("*") if ".partial" in path.name]


def test_an_interrupt_leaves_no_file_and_the_next_decode_works(server, send):
    source = send("long.safetensors", latents(frames=60, rows=8, columns=8))
    done = []

    def interrupt(message):
        if message["type"] == "progress" and message["data"]["node"] == "v" and not done:
            done.append(True)
            server.post("/interrupt")

    run = server.run(to_video(source, filename_prefix="cut", save=True), on_message=interrupt)
    assert run.ended == "execution_interrupted"
    assert done
    assert not list(server.output.rglob("cut*"))
    assert not leftovers(server)
    server.run(to_video(send("l.safetensors", latents()), filename_prefix="next")).check()


def ffmpegs(server):
    """Command lines of the server's."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
            command = file.read()
            with open(f"/proc/{entry}/stat") as state:
                parent = int(state.read().rpartition(")")[2].split()[1])
            if b"ffmpeg" in command and parent == server.process.pid:
                found.append(command)
    return found


def test_an_interrupt_ends_what_ffmpeg_tries_before_the_decode(server, send):
    # 10000x12000 in VP9, of which it tries one frame for many seconds.
    source = send("large.safetensors", torch.zeros(1, 16, 1, 1250, 1500))
    times = []

    def interrupt():
        # Once it is at it.
        deadline = time.monotonic() + patience(60)
        while not ffmpegs(server) and time.monotonic() < deadline:
            time.sleep(0.02)
        times.append(time.monotonic())
        server.post("/interrupt")

    thread = threading.Thread(target=interrupt)
    thread.start()
    run = server.run(to_video(source, format="WebM VP9 8 bit", filename_prefix="tried", save=True))
    times.append(time.monotonic())
    thread.join()
    assert run.ended == "execution_interrupted"
    assert times[1] - times[0] < patience(1)
    assert not ffmpegs(server)
    assert not list(server.output.rglob("tried*"))
    assert not leftovers(server)


def test_an_ffmpeg_that_is_killed_is_an_error_that_says_so(server, send):
    source = send("long.safetensors", latents(frames=60, rows=8, columns=8, seed=2))

    def kill():
        deadline = time.monotonic() + patience(60)
        while time.monotonic() < deadline:
            listed = [entry for entry in os.listdir("/proc") if entry.isdigit()]
            for pid in listed:
                try:
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        if b"pipe:0" in (command := file.read()) and str(server.output).encode() in command:
                            os.kill(int(pid), signal.SIGKILL)
                            return
                except OSError:
                    continue
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    run = server.run(to_video(source, filename_prefix="killed", save=True))
    killer.join()
    assert run.ended == "execution_error"
    assert "ffmpeg was killed by signal 9" in run.detail["exception_message"]
    assert not list(server.output.rglob("killed*"))
    assert not leftovers(server)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"format": "MP4 H.264 8 bit", "crf": 60}, "CRF from 0 (best) to 51, not 60"),
        ({"format": LOSSLESS, "crf": 3}, "has no CRF"),
        ({"fps": math.nan}, "can't have nan frames a second"),
        ({"format": "PNG pictures 16 bit", "audio": ["a", 0]}, "can't hold sound"),
    ],
)
def test_what_can_not_work_is_an_error_before_the_decode(server, send, inputs, words):
    graph = to_video(send("l.safetensors", latents()), **inputs)
    graph["a"] = node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2)
    run = server.run(graph)
    assert run.ended == "execution_error"
    assert words in run.detail["exception_message"]
    assert not run.progress("v")


def test_of_a_video_as_people_have_them_the_latents_are_those_of_cores_frames(server, send, received):
    # H.264 of 4:2:0, whose colours have to be interpolated. Core takes them to lie in the middle of their pixels.
    if "WanAnimate2ToVideo" not in server.get("/object_info"):
        pytest.skip("a core before 0.33 reads colours otherwise")
    source = ["-f", "lavfi", "-i", "testsrc2=s=96x80:r=16:d=0.3125", "-pix_fmt", "yuv420p"]
    source += ["-chroma_sample_location", "center", str(server.input / "h.mp4")]
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", *source], check=True)
    loader = {"l": to_video(send("l.safetensors", latents(rows=6)))["l"]}
    run = server.run({
        **loader,
        "file": node("LoadVideo", file="h.mp4"),
        "parts": node("GetVideoComponents", video=["file", 0]),
        "e": node("WanVAEParallelEncode", pixels=["parts", 0], vae=["l", 0]),
        "eo": node("ProbeSaveTensor", name="encoded.safetensors", latent=["e", 0]),
        "v": node("WanVAEParallelLoadVideoToLatent", file="h.mp4", vae=["l", 0]),
        "vo": node("ProbeSaveTensor", name="own.safetensors", latent=["v", 0]),
    })  # fmt: skip
    run.check()
    own, expected = received("own.safetensors"), received("encoded.safetensors")
    assert own.shape == expected.shape == (1, 16, 2, 10, 12)
    assert (own - expected).abs().max() < 1e-3 * expected.std()


def test_a_videos_file_becomes_the_latents_that_its_frames_encode_to(server, send, received):
    source = send("l.safetensors", latents(rows=6))
    graph = {**to_video(source, save=True, filename_prefix="round"), **components()}
    graph |= {
        "e": node("WanVAEParallelEncode", pixels=["cframes.safetensors", 0], vae=["l", 0]),
        "eo": node("ProbeSaveTensor", name="encoded.safetensors", latent=["e", 0]),
    }
    server.run(graph).check()
    (path,) = server.output.glob("round_*.mkv")
    path.rename(server.input / "round.mkv")
    loader = {"l": graph["l"]}
    load = node("WanVAEParallelLoadVideoToLatent", file="round.mkv", vae=["l", 0], width=0, height=0, frames=0)
    out = node("ProbeSaveTensor", name="own.safetensors", latent=["v", 0])
    run = server.run({**loader, "v": load, "o": out}).check()
    own, expected = received("own.safetensors"), received("encoded.safetensors")
    assert own.shape == expected.shape == (1, 16, 3, 6, 6)
    # A core before 0.33 has read the file as 8 bits, and has encoded those.
    assert (own - expected).abs().mean() < 0.02 * expected.std()
    assert run.progress("v")[-1][0] == 3
    (said,) = [text for name, text in run.texts if name == "v"]
    assert re.fullmatch(r"9 frames of 48x48, \d+\.\d+ s on cpu", said), said
    small = {**load, "inputs": {**load["inputs"], "width": 7, "height": 64}}
    run = server.run({**loader, "v": small, "o": out})
    assert run.ended == "execution_error"
    assert "frames of 7x64 are smaller than a latent voxel" in run.detail["exception_message"]
    load["inputs"] |= {"width": 24, "frames": 6}
    server.run({**loader, "v": load, "o": out}).check()
    assert received("own.safetensors").shape == (1, 16, 2, 3, 3)
    refused = {**loader, "v": {**load, "inputs": {**load["inputs"], "file": "none.mkv"}}, "o": out}
    for name in ("", ".", 3):  # a folder's pictures are no video
        with pytest.raises(AssertionError, match=r"file names no video|there is no video"):
            server.run({**loader, "v": {**load, "inputs": {**load["inputs"], "file": name}}, "o": out})
    (server.input / "empty.mp4").touch()
    run = server.run({**loader, "v": {**load, "inputs": {**load["inputs"], "file": "empty.mp4"}}, "o": out})
    assert "empty.mp4 is empty; choose another video" in run.detail["exception_message"]
    with pytest.raises(AssertionError, match=r"none.mkv"):
        server.run(refused)
