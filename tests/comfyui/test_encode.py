"""Encoding in a real ComfyUI server, by POST /prompt; core's own VAE in float32 is what it is compared with."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import node
from tests.processes import patience

# Core's nodes that encode and need no model, as far as they take a VAE of 16 channels, from 0.33 on.
CONDITIONERS = [
    "BerniniConditioning",
    "CosmosImageToVideoLatent",
    "CosmosPredict2ImageToVideoLatent",
    "HunyuanImageToVideo",
    "InpaintModelConditioning",
    "InstructPixToPixConditioning",
    "Kandinsky5ImageToVideo",
    "LTXVImgToVideoInplace",
    "StableCascade_SuperResolutionControlnet",
    "VAEEncode",
    "VAEEncodeForInpaint",
    "VAEEncodeTiled",
    "VOIDInpaintConditioning",
    "Wan22FunControlToVideo",
    "WanAnimate2ToVideo",
    "WanAnimateToVideo",
    "WanCameraImageToVideo",
    "WanDancerVideo",
    "WanFirstLastFrameToVideo",
    "WanFunControlToVideo",
    "WanFunInpaintToVideo",
    "WanHuMoImageToVideo",
    "WanImageToVideo",
    "WanMoveTrackToVideo",
    "WanPhantomSubjectToVideo",
    "WanSCAILToVideo",
    "WanSoundImageToVideo",
    "WanSoundImageToVideoExtend",
    "WanTrackToVideo",
    "WanVaceToVideo",
]
SOME_CONDITIONERS = [
    "CosmosPredict2ImageToVideoLatent",
    "VAEEncodeForInpaint",
    "Wan22FunControlToVideo",
    "WanFirstLastFrameToVideo",
    "WanImageToVideo",
    "WanPhantomSubjectToVideo",
    "WanVaceToVideo",
]
TILES = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}


def pictures(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def narrow(server):
    """A VAE of half the width that other tests have: these encode often."""
    random_checkpoint(server.folder / "models" / "vae" / "narrow.safetensors", width=8)


class Devices:
    """What the nodes are asked to work on, in the test that runs."""

    asked = "cpu"


@pytest.fixture(params=["cpu", "cpu,cpu"], autouse=True)
def devices(request):
    """Every check on one device in the server's process, and on two workers."""
    Devices.asked = request.param
    return request.param


one_device = pytest.mark.parametrize("devices", ["cpu"], indirect=True)
two_devices = pytest.mark.parametrize("devices", ["cpu,cpu"], indirect=True)


def load(name="narrow.safetensors", **options):
    return node("WanVAEParallelLoader", vae_name=name, devices=Devices.asked, **options)


def apply(vae="core", **options):
    return node("WanVAEParallelApply", vae=[vae, 0], devices=Devices.asked, **options)


CORE = {"core": node("VAELoader", vae_name="narrow.safetensors")}


def encoded(name, pixels, vae, encoder="VAEEncode", slot=0, **more):
    """An encode whose latents are saved under ``name``."""
    return {
        f"encode {name}": node(encoder, pixels=[pixels, 1], vae=[vae, 0], **more),
        f"save {name}": node("ProbeSaveTensor", name=name, latent=[f"encode {name}", slot]),
    }


def close_to_core(latents, core, bound=1e-4):
    assert latents.shape == core.shape
    assert latents.dtype == core.dtype == torch.float32
    assert core.std() > 0.05  # else nothing is compared
    assert (latents - core).abs().max() <= bound


def workers(server):
    return sorted(pid for pid, command in server.children() if "workers/bootstrap.py" in command)


def without_workers(server):
    """Other tests' workers may be warm still: with them gone, those that are there are this test's."""
    server.free(lambda: not workers(server))


def test_every_way_to_encode_equals_cores_vae_encode(server, send, received):
    graph = {
        **CORE,
        "pixels": send("pixels", pictures(9, 32, 48, 3)),
        "parallel": load(),
        "applied": apply(chunk=1),
        **encoded("core", "pixels", "core"),
        **encoded("loaded", "pixels", "parallel"),
        **encoded("applied", "pixels", "applied"),
        **encoded("tiled", "pixels", "applied", "VAEEncodeTiled", **TILES),
        **encoded("ours", "pixels", "parallel", "WanVAEParallelEncode"),
        **encoded("small chunks", "pixels", "parallel", "WanVAEParallelEncode", chunk=1),
        # a VAE that was never made parallel, and one that was twice
        **encoded("on the way", "pixels", "core", "WanVAEParallelEncode"),
        "twice": apply("applied"),
        **encoded("twice", "pixels", "twice"),
    }
    server.run(graph).check()
    core = received("core")
    assert core.shape == (1, 16, 3, 4, 6)
    for name in ("loaded", "applied", "tiled", "ours", "small chunks", "on the way", "twice"):
        close_to_core(received(name), core)


def test_frames_of_any_number_size_and_kind_are_taken_as_core_takes_them(server, send, received):
    cases = {
        "one": pictures(1, 24, 32, 3),
        "seven": pictures(7, 24, 32, 3),  # of which five are encoded
        "odd sides": pictures(5, 27, 34, 3),
        "with alpha": pictures(5, 24, 32, 4),
        "grey": pictures(1, 24, 32, 1),  # which core fills up with ones
        "halves": pictures(5, 24, 32, 3).half(),
        "two videos": pictures(2, 9, 27, 32, 3),  # of which core cuts the time to a multiple of eight as well
    }
    graph = {**CORE, "vae": load()}
    for name, frames in cases.items():
        graph |= {name: send(name, frames), **encoded(f"{name} core", name, "core")}
        graph |= encoded(f"{name} ours", name, "vae")
    server.run(graph).check()
    for name in cases:
        # Core brings pixels to [-1, 1] in their own dtype, and rounds them there.
        bound = 1e-3 if name == "halves" else 1e-4
        close_to_core(received(f"{name} ours"), received(f"{name} core"), bound)
    for name in ("seven", "odd sides"):
        assert received(f"{name} ours").shape == (1, 16, 2, 3, 4)
    assert received("two videos ours").shape == (2, 16, 2, 3, 4)
    assert "frames of 34x27 are cut to 32x24, the middle of them" in server.log()
    assert "frames of 32x27x9 are cut to 32x24x8, the middle of them" in server.log()


@one_device  # the same whatever encodes
def test_short_videos_of_five_axes_which_core_makes_nothing_of_are_encoded_whole(server, send, received):
    videos = pictures(2, 5, 32, 48, 3)
    graph = {**CORE, "videos": send("short", videos), "vae": load(), **encoded("short ours", "videos", "vae")}
    for i in range(2):
        graph |= {f"video {i}": send(f"short {i}", videos[i]), **encoded(f"short core {i}", f"video {i}", "core")}
    server.run(graph).check()
    close_to_core(received("short ours"), torch.cat([received("short core 0"), received("short core 1")]))


@one_device
def test_arguments_of_later_cores_are_taken_and_pictures_may_be_no_video(server, send, received):
    later = "ProbeEncodeAsLaterCores"
    server.run(
        {
            **CORE,
            "pixels": send("later", pictures(3, 32, 48, 3)),
            "vae": load(),
            **encoded("expected", "pixels", "core"),
            **encoded("whole", "pixels", "vae", later),
            "save tiled": node("ProbeSaveTensor", name="tiled", latent=["encode whole", 1]),
            "save pictures": node("ProbeSaveTensor", name="pictures", latent=["encode whole", 2]),
            **encoded("core's pictures", "pixels", "core", "ProbeEncodePictures"),
            **encoded("our pictures", "pixels", "vae", "ProbeEncodePictures"),
        }
    ).check()
    close_to_core(received("whole"), received("expected"))
    assert torch.equal(received("tiled"), received("whole"))
    assert received("core's pictures").shape == (3, 16, 1, 4, 6)
    for name in ("pictures", "our pictures"):
        close_to_core(received(name), received("core's pictures"))


def test_wan22_of_other_widths_which_core_has_no_model_for(server, send, received):
    server.run(
        {
            "core": node("ProbeSmallCoreVAE", vae_name="wan22.safetensors"),
            "pixels": send("pixels22", pictures(5, 50, 64, 3)),
            "vae": load("wan22.safetensors"),
            "applied": apply(),
            **encoded("core22", "pixels", "core"),
            **encoded("loaded22", "pixels", "vae"),
            **encoded("applied22", "pixels", "applied", "WanVAEParallelEncode"),
        }
    ).check()
    assert received("core22").shape == (1, 48, 2, 3, 4)
    for name in ("loaded22", "applied22"):
        close_to_core(received(name), received("core22"))


@one_device
def test_weight_patches_are_applied_to_the_encoder(server, send, received):
    server.run(
        {
            **CORE,
            "pixels": send("patched", pictures(5, 32, 48, 3)),
            **encoded("plain", "pixels", "core"),
            "altered": node("ProbeAlterVAE", vae=["core", 0], how="lora of the encoder"),
            **encoded("expected", "pixels", "altered"),
            "applied": apply("altered"),
            **encoded("before", "pixels", "applied"),
            "parallel": apply(),
            "altered later": node("ProbeAlterVAE", vae=["parallel", 0], how="lora of the encoder"),
            **encoded("after", "pixels", "altered later"),
        }
    ).check()
    assert (received("plain") - received("expected")).abs().max() > 0.01
    for name in ("before", "after"):
        close_to_core(received(name), received("expected"))


@one_device
def test_encode_dtype_is_of_encodes_alone_and_dtype_of_both(server, send, received):
    before = len(server.log())
    server.run(
        {
            "pixels": send("dtypes", pictures(1, 32, 48, 3)),
            "plain": load(),
            "both": load(dtype="bfloat16"),
            "decoding": load(dtype="bfloat16", encode_dtype="float32"),
            "encoding": load(encode_dtype="bfloat16"),
            **encoded("in float32", "pixels", "plain"),
            **encoded("both", "pixels", "both"),
            **encoded("decoding", "pixels", "decoding"),
            **encoded("encoding", "pixels", "encoding"),
            "applied": node("WanVAEParallelApply", vae=["plain", 0], devices="cpu", encode_dtype="bfloat16"),
            **encoded("applied", "pixels", "applied"),
            "decode": node("VAEDecode", samples=["encode decoding", 0], vae=["decoding", 0]),
            "save": node("ProbeSaveTensor", name="frames", image=["decode", 0]),
        }
    ).check()
    expected = received("in float32")
    assert torch.equal(received("decoding"), expected)
    for name in ("both", "encoding", "applied"):
        difference = (received(name) - expected).abs().max()
        assert 1e-4 < difference < 0.1, name
        assert received(name).dtype == torch.float32
    log = server.log()[before:]
    for dtype, count in (("float32", 2), ("bfloat16", 3)):
        assert log.count(f"encoded 1 frames of 48x32 on cpu, in {dtype}, chunk 1, in ") == count
    assert "decoded 1 frames of 48x32 on cpu, in bfloat16" in log


@pytest.mark.parametrize(
    ("devices", "encoder"), [("cpu", "WanVAEParallelEncode"), ("cpu,cpu", "VAEEncode")], indirect=["devices"]
)
def test_progress_comes_with_each_chunk_and_no_previews(server, send, encoder):
    frames = send("progress", pictures(41, 32, 48, 3))
    graph = {"pixels": frames, "vae": load(chunk=1), **encoded("progress", "pixels", "vae", encoder)}
    run = server.run(graph).check()
    progress = run.progress("encode progress")
    values = [value for value, _ in progress]
    assert {most for _, most in progress} == {11}
    assert values == sorted(set(values))
    assert (values[0], values[-1]) == (1, 11)
    assert len(values) >= 3  # the bar sends no more than ten a second
    assert not run.previews


def test_interrupt_ends_an_encode_within_seconds_and_the_next_one_works(server, send, received):
    (server.output / "interrupted encode").unlink(missing_ok=True)
    asked_at = []

    def interrupt(message):
        if message["type"] == "progress" and not asked_at:
            server.post("/interrupt")
            asked_at.append(time.monotonic())

    graph = {
        "pixels": send("long", pictures(81, 96, 128, 3)),
        "vae": load(chunk=1),
        **encoded("interrupted encode", "pixels", "vae"),
    }
    run = server.run(graph, on_message=interrupt)
    assert run.ended == "execution_interrupted"
    assert time.monotonic() - asked_at[0] < patience(5)
    assert len(run.progress("encode interrupted encode")) <= 4
    assert not (server.output / "interrupted encode").exists()
    graph |= {"pixels": send("short after long", pictures(5, 32, 48, 3))}
    server.run(graph).check()
    assert received("interrupted encode").shape == (1, 16, 2, 4, 6)


@two_devices
@pytest.mark.parametrize("applied", [False, True])
def test_encodes_and_decodes_have_the_same_workers(server, send, received, applied):
    without_workers(server)
    vae = {**CORE, "vae": apply()} if applied else {"vae": load()}
    seen = []
    for seed in (1, 2):
        pixels = send("kept", pictures(5, 32, 48, 3, seed=seed))
        server.run({**vae, "pixels": pixels, **encoded("kept", "pixels", "vae")}).check()
        seen.append(workers(server))
    latent = send("kept latents", received("kept"))
    decode = {"decode": node("VAEDecode", samples=["latent", 0], vae=["vae", 0])}
    save = {"save": node("ProbeSaveTensor", name="kept frames", image=["decode", 0])}
    server.run({**vae, "latent": latent, **decode, **save}).check()
    seen.append(workers(server))
    assert received("kept frames").shape == (5, 32, 48, 3)
    assert len(seen[0]) == 2
    assert seen[1] == seen[2] == seen[0]


def test_free_gives_an_encoders_memory_back_and_the_next_prompt_works(server, send, received):
    vae = {"vae": load()}

    def loaded(call):
        state = {"state": node("ProbeEngineState", vae=["vae", 0], call=call)}
        return server.run({**vae, **state}).check().outputs("state")["loaded"] == [True]

    def encode(seed):
        pixels = send("freed", pictures(1, 32, 48, 3, seed=seed))
        server.run({**vae, "pixels": pixels, **encoded("freed", "pixels", "vae")}).check()

    encode(1)
    assert loaded(1)
    before = received("freed")
    without_workers(server)
    assert not loaded(2)
    encode(2)
    assert (received("freed") - before).abs().max() > 0.01


@two_devices
def test_a_killed_worker_is_an_error_and_the_next_prompt_works(server, send, received):
    without_workers(server)
    killed = []

    def kill(message):
        if message["type"] == "progress" and not killed:
            killed.append(workers(server)[0])
            os.kill(killed[0], signal.SIGKILL)

    graph = {
        "pixels": send("doomed", pictures(81, 96, 128, 3)),
        "vae": load(chunk=1),
        **encoded("doomed", "pixels", "vae"),
    }
    run = server.run(graph, on_message=kill)
    assert run.ended == "execution_error"
    assert "died with exit code -9" in run.detail["exception_message"]
    assert not workers(server)
    server.run(graph | {"pixels": send("saved", pictures(5, 32, 48, 3))}).check()
    assert received("doomed").shape == (1, 16, 2, 4, 6)


@one_device
@pytest.mark.parametrize("encoder", ["WanVAEParallelEncode", "VAEEncode"])
@pytest.mark.parametrize(("family", "channels"), [("wan2.1", 16), ("wan2.2", 48)])
def test_a_file_without_an_encoder_decodes_and_is_named_when_it_is_to_encode(
    server, send, received, encoder, family, channels
):
    path = server.folder / "models" / "vae" / f"{family}_decoder_only.safetensors"
    random_checkpoint(path, family=family, width=16)
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(("encoder.", "conv1."))}, path)
    vae = {"vae": load(path.name)}
    pixels = {"pixels": send("for nobody", pictures(1, 32, 48, 3))}
    run = server.run({**vae, **pixels, **encoded("never", "pixels", "vae", encoder)})
    assert run.ended == "execution_error"
    assert f"{path.name} has no encoder, so that this VAE can only decode" in run.detail["exception_message"]
    latent = {"latent": send("alone", torch.randn(1, channels, 1, 2, 3))}
    decode = {"decode": node("VAEDecode", samples=["latent", 0], vae=["vae", 0])}
    server.run({**vae, **latent, **decode, "save": node("ProbeSaveTensor", name="alone", image=["decode", 0])}).check()
    assert received("alone").shape[0] == 1


@one_device
@pytest.mark.parametrize(
    ("name", "frames", "words"),
    [
        ("tiny", pictures(1, 7, 64, 3), "64x7 are smaller than a latent voxel of Wan 2.1"),
        ("broken", torch.full((1, 32, 48, 3), torch.nan), "NaN or infinite"),
    ],
)
def test_bad_frames_fail_in_words(server, send, name, frames, words):
    run = server.run({"pixels": send(name, frames), "vae": load(), **encoded(name, "pixels", "vae")})
    assert run.ended == "execution_error"
    assert words in run.detail["exception_message"]


def compare(server, core, ours, *only):
    """How far the results of core's nodes, or of some, with one VAE and with the other are apart, by their names."""
    compared = node("ProbeCompareNodes", vae=["core", 0], other=["ours", 0], only=",".join(only))
    run = server.run({"core": core, "ours": ours, "compared": compared}, timeout=600).check()
    return json.loads(run.outputs("compared")["found"][0])


@two_devices  # so that each of the many encodes goes the long way
@pytest.mark.parametrize("names", [SOME_CONDITIONERS, pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_cores_conditioning_nodes_make_the_same_of_it(server, names):
    found = compare(server, CORE["core"], load(), *names)
    assert all(difference <= 1e-4 for difference, _ in found.values()), found
    assert all(encodes >= 1 for _, encodes in found.values())
    there = set(server.get("/object_info"))
    if "WanAnimate2ToVideo" not in there:  # of cores before 0.33 this one fails with core's own video VAE
        there.remove("VAEEncodeForInpaint")
    assert set(found) >= there.intersection(names or CONDITIONERS)


@one_device
def test_cores_conditioning_nodes_of_wan22_do_so_too(server):
    core = node("ProbeSmallCoreVAE", vae_name="wan22.safetensors")
    found = compare(server, core, load("wan22.safetensors"), "Wan22ImageToVideoLatent")
    assert all(difference <= 1e-4 for difference, _ in found.values()), found
    assert set(found) == {"Wan22ImageToVideoLatent"}
