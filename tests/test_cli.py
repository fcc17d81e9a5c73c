"""The command line, run as users run it."""

import dataclasses
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.processes import MARK, children, patience, strays, wait_until
from wan_vae_parallel import cli, memory
from wan_vae_parallel.bench import random_weights
from wan_vae_parallel.cli import main
from wan_vae_parallel.cli.shared import Progress
from wan_vae_parallel.files.ffmpeg import FedProcess, find_ffmpeg
from wan_vae_parallel.files.latents import read_latents, save_latents
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.files.video_in import VideoInput
from wan_vae_parallel.vae import VAE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small demo checkpoint and its latents."""
    folder = tmp_path_factory.mktemp("cli")
    described = wvp.save_demo_checkpoint(folder / "vae.safetensors", "wan2.1", 8)
    latents = wvp.demo_latents(described, frames=3, rows=4, columns=6)
    save_latents(folder / "video.latent", latents)
    with wvp.load_vae(folder / "vae.safetensors", devices="cpu") as vae:
        frames = vae.decode(latents)
    return folder, latents, frames


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "wan_vae_parallel", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_demo_makes_everything_and_says_where(tmp_path):
    done = run("demo", "-o", tmp_path / "demo", "--size", "64x32", "--latent-frames", "2", "--devices", "cpu")
    assert done.returncode == 0, done.stderr
    for name in ("demo.mp4", "demo.png", "demo_roundtrip.png", "demo_vae.safetensors", "demo.latent"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
        assert name in done.stdout
    assert re.search(r"decoded 5 frames of 64x32 on cpu, in float32, chunk \d, in [\d.]+ s \(first\)", done.stderr)
    assert re.search(r"encoded 5 frames of 64x32 on cpu, in float32, chunk \d, in [\d.]+ s", done.stderr)
    assert "\r" not in done.stdout + done.stderr  # no progress bar in a pipe
    # In a pipe, too, it is told what is being done, before it is.
    steps = ["making a small VAE", "decoding it on cpu", "decoded 5", "encoding its first 5", "encoded 5", "decoded 5"]
    assert [line.startswith(step) for line, step in zip(done.stderr.splitlines(), steps, strict=True)] == [True] * 6
    # What to do next is what can be done.
    program, command = re.search(r"^  (.*) (decode .* -o again.mp4)", done.stdout, flags=re.MULTILINE).groups()
    assert program in ("wan-vae-parallel", f"{sys.executable} -m wan_vae_parallel")
    assert "ComfyUI/models/vae/" in done.stdout
    again = run(*command.replace("again.mp4", str(tmp_path / "again.safetensors")).split(), "--devices", "cpu")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("total", [9, None])
def test_in_a_pipe_progress_is_a_line_now_and_then(monkeypatch, capsys, total):
    now = [100.0]
    monkeypatch.setattr("wan_vae_parallel.cli.shared.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    bar = Progress()
    for done in range(1, 10):
        now[0] += 0.5
        bar.show(done, total)
    bar.close()
    of = f"/{total}" if total else ""
    assert capsys.readouterr().err == f"4{of} frames\n8{of} frames\n"


def test_the_demo_is_of_the_smallest_width_of_each_family(tmp_path, monkeypatch):
    for family, width in (("wan2.1", 8), ("wan2.2", 16)):
        made = []
        monkeypatch.setattr("wan_vae_parallel.cli.demo.save_demo_checkpoint", lambda *args, m=made: m.append(args))
        # It is not made, so that there is none to load.
        assert main(["demo", "-o", str(tmp_path / family), "--architecture", family, "--size", "64x64"]) == 1
        assert [args[1:] for args in made] == [(family, width)]


@pytest.mark.parametrize("options", [[], ["--chunk", "1"], ["--dtype", "float64"]])
def test_decode_writes_the_frames(files, tmp_path, options):
    folder, _, frames = files
    output = tmp_path / "out.safetensors"
    arguments = ["decode", folder / "video.latent", "--vae", folder / "vae.safetensors", "-o", output, *options]
    assert main([str(argument) for argument in [*arguments, "--devices", "cpu"]]) == 0
    assert (load_file(output)["frames"] - frames).abs().max() < 1e-5


def test_decode_takes_plain_safetensors_and_normalized_latents(files, tmp_path):
    folder, latents, frames = files
    architecture = wvp.Architecture.published("wan2.1")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (architecture.latents_mean, architecture.latents_std))
    save_file({"anything": (latents - mean) / std, "other": torch.zeros(3)}, tmp_path / "latents.safetensors")
    arguments = ["decode", tmp_path / "latents.safetensors", "--vae", folder / "vae.safetensors", "--normalized"]
    assert main([*map(str, arguments), "-o", str(tmp_path / "out.safetensors"), "--devices", "cpu"]) == 0
    assert (load_file(tmp_path / "out.safetensors")["frames"] - frames).abs().max() < 1e-4


def test_decode_to_a_video_says_what_it_wrote(files, tmp_path, capsys, caplog):
    folder = files[0]
    arguments = ["decode", folder / "video.latent", "--vae", folder / "vae.safetensors", "-o", tmp_path / "out.mp4"]
    with caplog.at_level(logging.INFO):
        assert main([*map(str, arguments), "--devices", "cpu"]) == 0
    printed = capsys.readouterr()
    assert caplog.text.count("decoded 9 frames of 48x32 on cpu, in float32, chunk ") == 1
    assert f"written: {tmp_path / 'out.mp4'}" in printed.out


@pytest.fixture(scope="module")
def shown(files, tmp_path_factory):
    """The same frames as files of every kind, those that must be encoded exactly, and their latents."""
    _, _, frames = files
    folder = tmp_path_factory.mktemp("frames")
    for name in ("v.mp4", "p/%04d.png", "f.safetensors"):
        with open_output(folder / name, shape=frames.shape, fps=16.0) as write:
            write(frames)
    with wvp.load_vae(files[0] / "vae.safetensors", devices="cpu") as vae:
        rounded = (frames * 255).round() / 255
        return folder, vae.encode(frames), vae.encode(rounded)


def encode(files, source, output, *options):
    arguments = ["encode", source, "--vae", files[0] / "vae.safetensors", "-o", output, "--devices", "cpu", *options]
    return main([str(argument) for argument in arguments])


def test_encode_of_a_tensor_and_of_pictures_is_vae_encodes(files, shown, tmp_path, capsys):
    folder, exact, rounded = shown
    for source, expected in (("f.safetensors", exact), ("p/%04d.png", rounded), ("p", rounded)):
        assert encode(files, folder / source, tmp_path / "out.latent") == 0
        torch.testing.assert_close(read_latents(tmp_path / "out.latent"), expected)
        assert f"written: {tmp_path / 'out.latent'}, 3 latent frames of 9 frames\n" in capsys.readouterr().out
    # ComfyUI's SaveLatent writes these two.
    assert set(load_file(tmp_path / "out.latent")) == {"latent_tensor", "latent_format_version_0"}


def test_encode_of_a_video_is_near_the_tensors(files, shown, tmp_path, caplog):
    folder, exact, _ = shown
    with caplog.at_level(logging.INFO):
        assert encode(files, folder / "v.mp4", tmp_path / "out.safetensors", "--chunk", "2") == 0
    assert caplog.text.count("encoded 9 frames of 48x32 on cpu, in float32, chunk 2, ") == 1
    tensors = load_file(tmp_path / "out.safetensors")
    assert set(tensors) == {"latents"}
    assert tensors["latents"].shape == exact.shape
    assert (tensors["latents"] - exact).abs().mean() < 0.1 * exact.std()


def test_encode_takes_the_first_frames_at_another_size_normalized(files, shown, tmp_path, capsys):
    folder, _, _ = shown
    options = ["--frames", "6", "--size", "32x16"]
    results = []
    for source in ("v.mp4", "p", "f.safetensors"):
        assert encode(files, folder / source, tmp_path / "o.latent", *options) == 0
        assert "2 latent frames of 6 frames, of which the last 1 make no whole latent frame" in capsys.readouterr().out
        results.append(read_latents(tmp_path / "o.latent"))
        assert results[-1].shape == (1, 16, 2, 2, 4)
    assert (results[1] - results[2]).abs().max() < 0.1 * results[2].std()
    assert encode(files, folder / "p", tmp_path / "n.latent", *options, "--normalized") == 0
    architecture = wvp.Architecture.published("wan2.1")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (architecture.latents_mean, architecture.latents_std))
    torch.testing.assert_close(read_latents(tmp_path / "n.latent") * std + mean, results[1], rtol=1e-4, atol=1e-4)


def test_encode_of_images_makes_a_latent_of_each(files, shown, tmp_path, capsys, monkeypatch):
    folder, _, _ = shown
    # Some groups, of which the last is smaller.
    monkeypatch.setattr("wan_vae_parallel.images.images_that_pay", lambda *_: 4)
    exact = load_file(folder / "f.safetensors")["frames"]
    with wvp.load_vae(files[0] / "vae.safetensors", devices="cpu") as vae:
        expected = {
            "f.safetensors": vae.encode(exact[0][:, None]),
            "p": vae.encode((exact[0][:, None] * 255).round() / 255),
        }
        expected["p/%04d.png"] = expected["p"]
    for source, latents in expected.items():
        assert encode(files, folder / source, tmp_path / "o.latent", "--images") == 0
        assert "9 latents of 9 pictures\n" in capsys.readouterr().out
        assert latents.shape == (9, 16, 1, 4, 6)
        torch.testing.assert_close(read_latents(tmp_path / "o.latent"), latents)
    assert encode(files, folder / "p", tmp_path / "o.latent", "--images", "--frames", "3", "--size", "32x16") == 0
    assert read_latents(tmp_path / "o.latent").shape == (3, 16, 1, 2, 4)
    # A video's frames, too.
    assert encode(files, folder / "v.mp4", tmp_path / "o.latent", "--images") == 0
    assert read_latents(tmp_path / "o.latent").shape == (9, 16, 1, 4, 6)


def test_a_vae_that_knows_no_time_takes_pictures_and_speaks_in_the_words_of_a_shell(shown, tmp_path, capsys):
    folder = tmp_path / "qwen"
    folder.mkdir()
    architecture = wvp.Architecture.published("qwen-image-2.1", width=8)
    weights = random_weights(dataclasses.replace(architecture, encoder_width=8))
    save_file(weights, folder / "vae.safetensors")
    for source in ("p", "v.mp4", "f.safetensors"):
        assert encode([folder], shown[0] / source, tmp_path / "o.latent") == 0
        assert "9 latents of 9 pictures\n" in capsys.readouterr().out
        latents = read_latents(tmp_path / "o.latent")
        assert latents.shape == (9, 64, 1, 2, 3)
    save_latents(tmp_path / "video.latent", latents.transpose(0, 2))
    arguments = ["decode", tmp_path / "video.latent", "--vae", folder / "vae.safetensors", "-o", tmp_path / "v.mp4"]
    assert main([*map(str, arguments), "--devices", "cpu"]) == 1
    assert "knows no time; take the VAE of the model that made them\n" in capsys.readouterr().err


def test_encode_of_one_picture_makes_one_latent_frame(files, shown, tmp_path):
    folder, _, rounded = shown
    assert encode(files, folder / "p" / "0000.png", tmp_path / "o.latent") == 0
    torch.testing.assert_close(read_latents(tmp_path / "o.latent"), rounded[:, :, :1])


def test_encode_of_a_batch_of_videos(files, shown, tmp_path):
    folder, exact, _ = shown
    frames = load_file(folder / "f.safetensors")["frames"]
    save_file({"frames": torch.cat([frames, frames.flip(1)])}, tmp_path / "batch.safetensors")
    assert encode(files, tmp_path / "batch.safetensors", tmp_path / "o.latent") == 0
    latents = read_latents(tmp_path / "o.latent")
    assert latents.shape == (2, *exact.shape[1:])
    torch.testing.assert_close(latents[:1], exact)


def test_encode_shows_how_far_it_is_on_a_terminal(files, shown, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for source in ("v.mp4", "p", "f.safetensors"):
        assert encode(files, shown[0] / source, tmp_path / "o.latent", "--chunk", "1") == 0
        printed = capsys.readouterr().err
        assert "] 1/9 frames" in printed
        assert "] 5/9 frames" in printed
        assert "\r[" + 32 * "#" + "] 9/9 frames\n" in printed
    save_file({"frames": torch.rand(2, 6, 16, 16, 3)}, tmp_path / "two.safetensors")
    assert encode(files, tmp_path / "two.safetensors", tmp_path / "o.latent", "--chunk", "1") == 0
    printed = capsys.readouterr().err
    for done in (1, 5, 6, 10):  # of each five make whole latent frames
        assert f"] {done}/10 frames" in printed


def test_encode_says_what_is_wrong_and_leaves_nothing(files, shown, tmp_path, capsys):
    folder = shown[0]
    (tmp_path / "cut.mkv").write_bytes(b"")
    with open_output(tmp_path / "whole.mkv", shape=(1, 9, 32, 48, 3), fps=16.0) as write:
        write(torch.rand(1, 9, 32, 48, 3))
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 3 // 4])
    decoder = {k: v for k, v in load_file(files[0] / "vae.safetensors").items() if k.startswith(("decoder", "conv2"))}
    save_file(decoder, tmp_path / "decoder.safetensors")
    save_file({"frames": torch.rand(1, 4, 32, 3)}, tmp_path / "flat.safetensors")
    save_file({"frames": torch.full((1, 16, 16, 3), math.nan)}, tmp_path / "nan.safetensors")
    before = sorted(tmp_path.rglob("*"))
    wrong = [
        ([folder / "none.mp4"], "none.mp4 does not exist; name a video"),
        ([tmp_path / "cut.mkv"], "cut short behind frame"),
        (
            [tmp_path / "flat.safetensors"],
            "flat.safetensors: frames of 32x4 are smaller than a latent voxel of Wan 2.1",
        ),
        ([tmp_path / "nan.safetensors"], "nan.safetensors: frames have NaN"),
        ([files[0] / "video.latent"], "has latents in it"),
        ([files[0] / "vae.safetensors"], "it must have one named frames"),
        ([folder / "p", "--size", "50x32"], "multiple of 8 pixels a side, not 50x32"),
        ([folder / "p", "--vae", tmp_path / "decoder.safetensors"], "decoder.safetensors has no encoder, so that this"),
        ([folder / "v.mp4", "--vae", tmp_path / "decoder.safetensors"], "decoder.safetensors has no encoder"),
        ([folder / "p", "-o", tmp_path / "o.mp4"], "o.mp4 is no kind of file that latents are written to"),
        ([folder / "p", "-o", tmp_path / "none" / "o.latent"], "there is no folder"),
    ]
    for (source, *options), words in wrong:
        assert encode(files, source, tmp_path / "o.latent", *options) == 1, words
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert words in printed
        assert printed.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        assert not children()


def test_what_is_read_is_never_written_over(files, tmp_path, capsys):
    for name in ("vae.safetensors", "video.latent"):
        (tmp_path / name).write_bytes((files[0] / name).read_bytes())
    save_file({"frames": torch.rand(1, 1, 8, 8, 3)}, tmp_path / "f.safetensors")
    save_file({"latents": read_latents(tmp_path / "video.latent")}, tmp_path / "l.safetensors")
    (tmp_path / "link.safetensors").symlink_to("vae.safetensors")
    vae = ["--vae", tmp_path / "vae.safetensors"]
    wrong = [
        ("encode", "f.safetensors", "vae.safetensors", []),
        ("encode", "f.safetensors", "link.safetensors", []),
        ("encode", "f.safetensors", "f.safetensors", []),
        ("decode", "video.latent", "vae.safetensors", []),
        ("decode", "l.safetensors", "l.safetensors", []),
        ("decode", "video.latent", "f.safetensors", ["--vae-alpha", tmp_path / "f.safetensors"]),
        ("decode", "video.latent", "f.safetensors", ["--audio", tmp_path / "f.safetensors"]),
    ]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command, source, output, options in wrong:
        arguments = [command, tmp_path / source, *vae, "-o", tmp_path / output, *options, "--devices", "cpu"]
        assert main(list(map(str, arguments))) == 1, arguments
        assert f"{output} would take the place of " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_info_tells_what_the_file_is_and_what_it_takes(files, capsys):
    folder = files[0]
    assert (
        main(["info", str(folder / "vae.safetensors"), "--size", "832x480", "--frames", "80", "--devices", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    for words in ("Wan 2.1, width 8, 16 latent channels", "million parameters, float32, with encoder", "original"):
        assert words in out
    # Rounded up, and down: the fewest that are enough, and all that make whole latent frames.
    for words in ("decode 832x480, 81 frames: ", "encode 832x480, 77 frames: "):
        (line,) = [line for line in out.splitlines() if line.startswith(words)]
        assert "with chunk 1" in line
    architecture = wvp.Architecture.published("wan2.1", width=8)
    count = memory.encoder_parameter_count(architecture)
    assert re.search(rf"^encoder: +{count / 1e6:.1f} million parameters, width 8$", out, re.MULTILINE)


@pytest.mark.parametrize(("devices", "rows"), [("cpu", 60), ("cpu,cpu", 53)])
def test_info_tells_the_memory_that_an_encode_plans_with(files, capsys, devices, rows):
    # 104 columns by two: 52, and one of the neighbour's; 60 rows then are columns.
    arguments = ["info", str(files[0] / "vae.safetensors"), "--size", "832x480", "--chunk", "3", "--devices", devices]
    assert main(arguments) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("encode ")]
    size = (rows, 104) if devices == "cpu" else (rows, 60)
    for chunk in (3, 1):
        needed = memory.encode_memory(
            wvp.Architecture.published("wan2.1", width=8), size, chunk=chunk, image=False, dtype=torch.float32,
            kernels=False,
        )  # fmt: skip
        assert f"{memory.gibibytes(needed.total)} {'a device with chunk 3' if chunk == 3 else 'with chunk 1'}" in line


def test_info_of_a_decoder_alone_says_that_it_can_not_encode(files, tmp_path, capsys):
    tensors = load_file(files[0] / "vae.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith(("decoder", "conv2"))}, tmp_path / "d.safetensors")
    assert main(["info", str(tmp_path / "d.safetensors"), "--devices", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^encoder: +none: it can only decode$", out, re.MULTILINE)
    assert "encode 1280x720" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "missing.safetensors"], "missing.safetensors does not exist"),
        (["decode", "missing.latent", "--vae", "{vae}", "-o", "{tmp}/out.mp4"], "missing.latent does not exist"),
        (["decode", "{latent}", "--vae", "{latent}", "-o", "{tmp}/out.mp4"], "not a Wan VAE"),
        (["decode", "{latent}", "--vae", "{vae}", "-o", "{tmp}/out.gif"], "no kind of file"),
        (["decode", "{latent}", "--vae", "{vae}", "-o", "{tmp}/none/out.mp4"], "there is no folder"),
        (
            ["decode", "{latent}", "--vae", "{vae}", "-o", "{tmp}/o.mp4", "--devices", "cuda:99"],
            "'cuda:99' is not there",
        ),
        (
            ["decode", "{latent}", "--vae", "{vae}", "-o", "{tmp}/o.mp4", "--devices", "cpu,tpu"],
            "there is no device 'tpu'",
        ),
        (["info", "{vae}", "--size", "100x100"], "multiple of 8 pixels a side"),
        (["demo", "-o", "{tmp}/demo", "--width", "4"], "needs at least 8"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(files, tmp_path, capsys, arguments, words):
    folder = files[0]
    names = {"vae": folder / "vae.safetensors", "latent": folder / "video.latent", "tmp": tmp_path}
    assert main([argument.format(**names) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert words in printed
    assert printed.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "x", "--vae", "y", "-o", "z", "--chunk", "-1"],
        ["decode", "x", "--vae", "y", "-o", "z", "--fps", "-1"],
        ["decode", "x", "--vae", "y", "-o", "z", "--dtype", "int8"],
        ["decode", "x", "--vae", "y", "-o", "z", "--quality", "fine"],
        ["decode", "x", "--vae", "y", "-o", "z", "--format", "gif"],
        ["info", "x", "--size", "huge"],
        [],
    ],
)
def test_bad_options_are_told_by_the_parser(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_latent_of_the_wrong_model_names_the_way_out(files, tmp_path, capsys):
    save_latents(tmp_path / "other.latent", torch.zeros(1, 48, 2, 2, 2))
    arguments = ["decode", tmp_path / "other.latent", "--vae", files[0] / "vae.safetensors", "-o", tmp_path / "o.mp4"]
    assert main([*map(str, arguments), "--devices", "cpu"]) == 1
    assert "Wan 2.2 5B" in capsys.readouterr().err


def test_a_polite_kill_leaves_nothing_half_written(files, tmp_path):
    folder = files[0]
    big = tmp_path / "big.latent"
    save_latents(big, torch.randn(1, 16, 41, 16, 16))
    (tmp_path / "out").mkdir()
    arguments = [
        "decode",
        big,
        "--vae",
        folder / "vae.safetensors",
        "-o",
        tmp_path / "out" / "v.mp4",
        "--devices",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "wan_vae_parallel", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + patience(60)
    while not list((tmp_path / "out").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 130
    assert "nothing was left half-written" in errors
    assert not list((tmp_path / "out").iterdir())


def test_a_polite_kill_of_an_encode_leaves_no_file_and_no_ffmpeg(files, tmp_path):
    with open_output(tmp_path / "v.mp4", shape=(1, 161, 96, 96, 3), fps=16.0) as write:
        write(torch.rand(1, 161, 1, 1, 3).expand(1, 161, 96, 96, 3))
    mark = f"encode of {os.getpid()}"
    arguments = ["encode", tmp_path / "v.mp4", "--vae", files[0] / "vae.safetensors", "-o", tmp_path / "o.latent"]
    process = subprocess.Popen(
        [sys.executable, "-m", "wan_vae_parallel", *map(str, arguments), "--devices", "cpu"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark},
    )  # fmt: skip
    wait_until(lambda: len(strays(mark)) > 1 or process.poll() is not None, patience(60))  # itself, and ffmpeg
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 130, errors
    assert "nothing was left half-written" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    wait_until(lambda: not strays(mark), 10)
    assert not strays(mark)


@pytest.fixture
def handlers():
    """Puts back the signals' handlers that the command line took over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("when", ["opening", "writing", "closing", "writing, and ffmpeg is gone too"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_while_files_are_at_work(files, tmp_path, monkeypatch, capsys, when, number):
    went_on = []

    def told(real, now):
        def function(self, *arguments):
            result = real(self, *arguments) if now != "writing" else None
            if when.startswith(now) and not went_on:
                if when != now:
                    os.kill(self.pid, signal.SIGKILL)
                os.kill(os.getpid(), number)
                went_on.append(now)
            return real(self, *arguments) if now == "writing" else result

        return function

    monkeypatch.setattr(FedProcess, "__init__", told(FedProcess.__init__, "opening"))
    monkeypatch.setattr(FedProcess, "put", told(FedProcess.put, "writing"))
    monkeypatch.setattr(FedProcess, "finish", told(FedProcess.finish, "closing"))
    out = tmp_path / "v.mp4"
    arguments = ["decode", files[0] / "video.latent", "--vae", files[0] / "vae.safetensors", "-o", out]
    assert main([*map(str, arguments), "--devices", "cpu"]) == 130
    assert went_on
    assert capsys.readouterr().err.endswith("nothing was left half-written\n")
    # All of it was written when the signal came.
    assert [file.name for file in tmp_path.iterdir()] == (["v.mp4"] if when == "closing" else [])
    assert not children()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("when", ["opening", "reading", "closing", "writing"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_an_encode_leaves_no_ffmpeg_and_no_half_a_file(
    files, shown, tmp_path, monkeypatch, capsys, when, number
):
    went_on = []

    def told(real, now):
        def function(*arguments, **options):
            result = real(*arguments, **options) if now == "opening" else None
            if now == when and not went_on:
                os.kill(os.getpid(), number)
                went_on.append(now)
            return result if now == "opening" else real(*arguments, **options)

        return function

    monkeypatch.setattr(VideoInput, "_start", told(VideoInput._start, "opening"))
    monkeypatch.setattr(VideoInput, "_next", told(VideoInput._next, "reading"))
    monkeypatch.setattr(VideoInput, "close", told(VideoInput.close, "closing"))
    monkeypatch.setattr(cli.encode, "save_latents", told(cli.encode.save_latents, "writing"))
    assert encode(files, shown[0] / "v.mp4", tmp_path / "o.latent") == 130
    assert capsys.readouterr().err.endswith("nothing was left half-written\n")
    # A process that is being started or ended, or a file that is being written, is no place to stop.
    assert bool(went_on) == (when != "reading")
    assert [file.name for file in tmp_path.iterdir()] == (["o.latent"] if when == "writing" else [])
    assert not children()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_drops_ends_the_decode_too(files, tmp_path, monkeypatch, capsys, number):
    # As an error in a handler of forks would be, or in a finalizer.
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(1)

    stream = VAE.pixel_stream

    def pixel_stream(*arguments, **options):
        Dropping()
        dropped.append(True)
        return stream(*arguments, **options)

    dropped = []
    monkeypatch.setattr(VAE, "pixel_stream", pixel_stream)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    out = tmp_path / "v.mp4"
    arguments = ["decode", files[0] / "video.latent", "--vae", files[0] / "vae.safetensors", "-o", out]
    assert main([*map(str, arguments), "--devices", "cpu"]) == 130
    assert dropped  # Python did drop it
    assert "nothing was left half-written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rates_may_be_fractions(files, tmp_path, capsys):
    folder = files[0]
    arguments = ["decode", folder / "video.latent", "--vae", folder / "vae.safetensors", "-o", tmp_path / "out.mp4"]
    assert main([*map(str, arguments), "--devices", "cpu", "--fps", "30000/1001"]) == 0
    assert "written" in capsys.readouterr().out


def decode(files, output, *options, latents=None):
    arguments = [
        "decode",
        *(latents or [files[0] / "video.latent"]),
        "--vae",
        files[0] / "vae.safetensors",
        "-o",
        output,
    ]
    return main([str(argument) for argument in [*arguments, "--devices", "cpu", *options]])


def test_decode_writes_the_format_that_is_asked_for_with_sound(files, tmp_path, capsys):
    assert decode(files, tmp_path / "sound.mp4") == 0
    options = ["--format", "prores", "--quality", "high", "--audio", tmp_path / "sound.mp4"]
    assert decode(files, tmp_path / "v.mov", *options) == 1  # a video without sound
    assert "sound.mp4 has no sound that ffmpeg can read; name a file with sound" in capsys.readouterr().err
    assert decode(files, tmp_path / "v.mov", *options[:4]) == 0
    assert "prores (HQ)" in said_of(tmp_path / "v.mov")
    assert decode(files, tmp_path / "v.webm", "--quality", "30") == 0
    assert "vp9 (Profile 0), yuv420p(tv, bt709" in said_of(tmp_path / "v.webm")


def said_of(path):
    command = [find_ffmpeg(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_decode_with_a_second_vae_for_the_alpha(files, tmp_path):
    folder, latents, frames = files
    weights = random_weights(wvp.Architecture.published("wan2.1", width=8), seed=3)
    save_file(weights, tmp_path / "alpha.safetensors")
    arguments = ["decode", folder / "video.latent", "--vae", folder / "vae.safetensors", "--devices", "cpu"]
    arguments += ["--vae-alpha", tmp_path / "alpha.safetensors"]
    assert main([*map(str, arguments), "-o", str(tmp_path / "v.mkv"), "--format", "ffv1"]) == 0
    with VideoInput(tmp_path / "v.mkv", colours=4) as video:
        found = torch.cat(list(video))
    with wvp.load_vae(tmp_path / "alpha.safetensors", devices="cpu") as vae:
        alpha = vae.decode(latents)[0, ..., :1]
    assert (found - torch.cat([frames[0], alpha], dim=-1)).abs().max() < 1e-4


def test_decode_joins_latents_in_time(files, tmp_path):
    _, latents, frames = files
    for name, part in (("a", latents[:, :, :1]), ("b", latents[:, :, 1:])):
        save_latents(tmp_path / f"{name}.latent", part)
    both = [tmp_path / "a.latent", tmp_path / "b.latent"]
    assert decode(files, tmp_path / "out.safetensors", latents=both) == 0
    assert (load_file(tmp_path / "out.safetensors")["frames"] - frames).abs().max() < 1e-5
    save_latents(tmp_path / "c.latent", latents[..., :2])
    assert decode(files, tmp_path / "no.mp4", latents=[*both, tmp_path / "c.latent"]) == 1


def test_an_older_videos_pictures_are_refused_or_cleared(files, tmp_path, capsys):
    assert decode(files, tmp_path / "%03d.png") == 0
    save_latents(tmp_path / "short.latent", files[1][:, :, :2])
    short = [tmp_path / "short.latent"]
    assert decode(files, tmp_path / "%03d.png", latents=short) == 1
    assert "005.png to 008.png of an older video" in capsys.readouterr().err
    assert decode(files, tmp_path / "%03d.png", "--clear", "--format", "png16", latents=short) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i:03d}.png" for i in range(5)]


def test_a_demo_larger_than_memory_is_refused(capsys):
    assert main(["demo", "--size", "8000000x8000000"]) == 1
    assert "more than is free" in capsys.readouterr().err


def test_a_full_host_is_no_reason_to_write_python(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wan_vae_parallel.memory.free_memory", lambda _device: 1000)
    assert main(["demo", "-o", str(tmp_path / "demo"), "--width", "8", "--size", "64x64", "--latent-frames", "2"]) == 1
    printed = capsys.readouterr().err
    assert "5 frames of 64x64 take" in printed
    assert printed.endswith("free some of it, or decode fewer or smaller frames at once\n")
