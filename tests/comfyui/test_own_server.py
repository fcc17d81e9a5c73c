"""What needs a ComfyUI server of its own: another option, an ffmpeg that fails, its end. The last test kills it."""

import os
import re
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import Server, node
from tests.processes import gone, patience
from wan_vae_parallel.files.ffmpeg import find_ffmpeg

LATENTS = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
# The shell's pattern of arguments with which the ffmpeg of the PATH fails: of previews, and of pictures' VIDEO.
FAULT = "*veryfast*|*matroska*"


@pytest.fixture(scope="module")
def half(comfyui):
    """ComfyUI's option that images are float16, if it has that."""
    name = "--fp16-intermediates"
    return [name] if name[2:] in (comfyui[0] / "comfy" / "cli_args.py").read_text() else []


@pytest.fixture(scope="module")
def own(comfyui, half, tmp_path_factory):
    """The server."""
    folder = tmp_path_factory.mktemp("own")
    ffmpeg = folder / "bin" / "ffmpeg"
    ffmpeg.parent.mkdir()
    ffmpeg.write_text(f'#!/bin/sh\ncase "$*" in {FAULT}) exit 3;; esac\nexec {find_ffmpeg()} "$@"\n')
    ffmpeg.chmod(0o755)
    (folder / "models" / "vae").mkdir(parents=True)
    random_checkpoint(folder / "models" / "vae" / "wan21.safetensors", width=8)
    environment = {"PATH": f"{ffmpeg.parent}:{os.environ['PATH']}"}
    running = Server(*comfyui, folder, "--cpu", *half, environment=environment)
    save_file({"tensor": LATENTS}, running.input / "latent")
    yield running
    running.stop()


def graph_of(devices="cpu", **nodes):
    """Nodes with latents and a loader before them."""
    loader = node("WanVAEParallelLoader", vae_name="wan21.safetensors", devices=devices, dtype="auto", chunk=1)
    return {"latent": node("ProbeLoadTensor", name="latent"), "loaded": loader, **nodes}


def decoded(name, vae, decoder="VAEDecode", **inputs):
    """A decode whose frames are saved under ``name``."""
    return {
        f"decode {name}": node(decoder, samples=["latent", 0], vae=[vae, 0], **inputs),
        f"save {name}": node("ProbeSaveTensor", name=name, image=[f"decode {name}", 0]),
    }


def test_frames_have_the_dtype_that_core_is_told_to_return(own, half):
    if not half:
        pytest.skip("this ComfyUI has no --fp16-intermediates")
    tiled = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    nodes = {
        "core": node("VAELoader", vae_name="wan21.safetensors"),
        **decoded("expected", "core"),
        **decoded("applied", "loaded"),
        **decoded("ours", "core", "WanVAEParallelDecode", normalized_latents=False),
        **decoded("tiled", "loaded", "VAEDecodeTiled", **tiled),
    }
    own.run(graph_of(**nodes)).check()
    expected = load_file(own.output / "expected")["tensor"]
    assert expected.float().std() > 0.05  # else nothing is compared
    assert expected.dtype == torch.float16
    for name in ("applied", "ours", "tiled"):
        frames = load_file(own.output / name)["tensor"]
        assert (frames.dtype, frames.shape) == (expected.dtype, expected.shape), name
        assert (frames.float() - expected.float()).abs().max() <= 2e-3, name


def to_video(**inputs):
    given = {"fps": 16.0, "quality": "high", "save": True, "ffmpeg": "of the PATH", **inputs}
    return graph_of(v=node("WanVAEParallelDecodeToVideo", samples=["latent", 0], vae=["loaded", 0], **given))


def test_a_saved_file_stays_whatever_becomes_of_its_preview_and_its_video(own):
    run = own.run(to_video(format="MOV ProRes 422 HQ 10 bit", filename_prefix="a")).check()
    assert [file["filename"] for file in run.outputs("v")["images"]] == ["a_00001_.mov"]
    assert (own.output / "a_00001_.mov").is_file()
    graph = to_video(format="PNG pictures 8 bit", filename_prefix="p")
    run = own.run(graph).check()
    assert len(run.outputs("v")["images"]) == 9
    assert len(list(own.output.glob("p_00001_/*.png"))) == 9
    log = own.log()
    assert re.search(r"preview .*mp4 could not be made", log)
    assert re.search(r"pictures in .*p_00001_ make no VIDEO", log)
    # Who takes the VIDEO hears why there is none.
    graph["save"] = node("SaveVideo", video=["v", 0], filename_prefix="s", format="auto", codec="auto")
    messages = []
    own.run(graph, on_message=messages.append)
    assert any("make no VIDEO" in str(message) for message in messages if message["type"] == "execution_error")


def test_workers_end_with_a_server_that_is_killed(own):
    nodes = decoded("x", "loaded", "WanVAEParallelDecode", normalized_latents=False)
    own.run(graph_of("cpu,cpu", **nodes)).check()
    living = [pid for pid, command in own.children() if "workers/bootstrap.py" in command]
    assert len(living) == 2
    own.process.kill()
    own.process.wait()
    deadline = time.monotonic() + patience(5)
    while not all(map(gone, living)):
        assert time.monotonic() < deadline, "workers live on without their server"
        time.sleep(0.1)
