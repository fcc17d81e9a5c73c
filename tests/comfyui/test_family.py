"""The family in a real ComfyUI: images, alpha, doubled size, and WanVideoWrapper's VAE and latents."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.server import node, saves
from wan_vae_parallel import Architecture, vae_from_state_dict
from wan_vae_parallel.bench import random_weights
from wan_vae_parallel.files.ffmpeg import describe_video, find_ffmpeg
from wan_vae_parallel.files.latents import denormalize, normalize
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.files.video_in import VideoInput

pytestmark = pytest.mark.usefixtures("files")

WAN21 = Architecture.published("wan2.1", width=16)
# Weights of the relatives' files by their names.
MADE: dict[str, dict[str, torch.Tensor]] = {}
LATENTS = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(server):
    """Relatives' files in models/vae; their weights."""
    small = dataclasses.replace(WAN21, width=8, encoder_width=8)
    made = {
        "rgb.safetensors": random_weights(WAN21, seed=1),
        "alpha.safetensors": random_weights(WAN21, seed=2),
        "layered.safetensors": random_weights(dataclasses.replace(small, output_channels=4, input_channels=4)),
        "upscale2x.safetensors": random_weights(dataclasses.replace(small, upscale=2)),
        "qwen21.safetensors": random_weights(
            dataclasses.replace(Architecture.published("qwen-image-2.1", width=16), encoder_width=16)
        ),
        "bf16.safetensors": {key: t.bfloat16() for key, t in random_weights(small).items()},
    }
    for name, tensors in made.items():
        save_file(tensors, server.output.parent / "models" / "vae" / name)
    MADE.update(made)
    return made


def loader(name, devices="cpu"):
    return node("WanVAEParallelLoader", vae_name=name, devices=devices, dtype="auto", chunk=0)


def apply(vae, dtype="auto"):
    return node("WanVAEParallelApply", vae=[vae, 0], devices="cpu", dtype=dtype, chunk=0)


def decode(samples="latent", vae="vae", decoder="WanVAEParallelDecode", **inputs):
    return node(decoder, samples=[samples, 0], vae=[vae, 0], **inputs)


def save(name, image, slot=0):
    return node("ProbeSaveTensor", name=name, image=[image, slot])


def close(frames, expected, bound=1e-4):
    assert frames.shape == expected.shape
    assert expected.std() > 0.05
    assert (frames - expected).abs().max() <= bound


@functools.cache
def engine(name):
    """The engine with a file's weights, which `files` has made."""
    return vae_from_state_dict(MADE[name], "cpu")


def engine_frames(name, latents):
    return engine(name).decode(latents).flatten(0, 1)


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_rgba_is_cores_template_of_two_decodes_joined(server, send, received, devices):
    graph = {"latent": send("rgba", LATENTS)}
    for kind in ("rgb", "alpha"):
        graph |= {
            f"core {kind}": node("VAELoader", vae_name=f"{kind}.safetensors"),
            f"decoded {kind}": decode(vae=f"core {kind}", decoder="VAEDecode"),
            kind: loader(f"{kind}.safetensors", devices),
        }
    # As the official template for Wan-Alpha has it.
    graph |= {
        "mask": node("ImageToMask", image=["decoded alpha", 0], channel="red"),
        "inverted": node("InvertMask", mask=["mask", 0]),
        "joined": node("JoinImageWithAlpha", image=["decoded rgb", 0], alpha=["inverted", 0]),
        "ours": node("WanVAEParallelDecodeRGBA", samples=["latent", 0], vae_rgb=["rgb", 0], vae_alpha=["alpha", 0]),
    }
    others = {
        # Of VAEs that were not parallel, too.
        "made so": node(
            "WanVAEParallelDecodeRGBA", samples=["latent", 0], vae_rgb=["core rgb", 0], vae_alpha=["core alpha", 0]
        ),
        "webm": node("SaveWEBM", images=["ours", 0], filename_prefix="alpha", codec="vp9", fps=16.0, crf=32.0),
    }
    graph |= others if devices == "cpu" else {}
    names = ["joined", "ours", *(["made so"] if devices == "cpu" else [])]
    for name in names:
        graph[f"save {name}"] = save(name, name)
    run = server.run(graph).check()
    # Of a node that decodes twice the last line stays, which is of both.
    said = [text for node_id, text in run.texts if node_id == "ours"]
    seconds = [float(re.search(r", (\d+\.\d+) s", text)[1]) for text in said]
    assert seconds[-1] >= 0.99 * sum(seconds[:2]) - 0.02  # rounded to three digits
    assert len({text.partition(", ")[0] for text in said}) == 1
    assert received("ours").shape == (17, 32, 48, 4)
    assert received("ours")[..., 3].std() > 0.05
    for name in names[1:]:
        close(received(name), received("joined"))
    assert list(server.output.glob("alpha*.webm"))
    if devices == "cpu":
        return
    # The workers have the weights of both from now on.
    before = len(server.log())
    again = LATENTS.flip(0, 2)
    sent = {**graph, "latent": send("rgba again", again)}
    server.run({name: sent[name] for name in ("latent", "rgb", "alpha", "ours", "save ours")}).check()
    close(received("ours")[..., :3], engine_frames("rgb.safetensors", again))
    said = [line for line in server.log()[before:].splitlines() if "decoded 17 frames" in line]
    assert len(said) == 2
    assert all(line.endswith("(warm)") for line in said), said


def test_two_vaes_that_make_other_frames_are_refused_before_a_decode(server, send):
    graph = {
        "latent": send("rgba", LATENTS),
        "rgb": loader("rgb.safetensors", "cpu"),
        "alpha": loader("upscale2x.safetensors", "cpu"),
        "ours": node("WanVAEParallelDecodeRGBA", samples=["latent", 0], vae_rgb=["rgb", 0], vae_alpha=["alpha", 0]),
        "saved": save("ours", "ours"),
    }
    run = server.run(graph)
    assert run.ended == "execution_error"
    assert "don't make the same frames" in run.detail["exception_message"]
    assert not run.progress("ours")


def test_a_video_of_frames_with_alpha_is_made_without_it_and_the_log_says_so(server, send):
    graph = {
        "latent": send("layers", LATENTS[:, :, :2]),
        "vae": loader("layered.safetensors"),
        "video": node("WanVAEParallelDecodeToVideo", samples=["latent", 0], vae=["vae", 0]),
    }
    before = len(server.log())
    server.run(graph).check()
    assert server.log()[before:].count("has no alpha: the fourth colour is left out") == 1


def test_a_video_of_a_format_with_alpha_keeps_it(server, send):
    latents = LATENTS[:, :, :2]
    graph = {
        "latent": send("layers", latents),
        "vae": loader("layered.safetensors"),
        "video": node(
            "WanVAEParallelDecodeToVideo", samples=["latent", 0], vae=["vae", 0], format="MKV FFV1 lossless 16 bit",
            filename_prefix="layers", save=True,
        ),
    }  # fmt: skip
    server.run(graph).check()
    (file,) = server.output.rglob("layers*.mkv")
    with VideoInput(file, colours=4) as video:
        close(torch.cat(list(video)).flatten(0, -4), engine_frames("layered.safetensors", latents))


def alpha_to_video(send, latents, *, devices="cpu", **inputs):
    """A graph whose node "video" makes a video of two VAEs'."""
    return {
        "latent": send("alpha video", latents),
        "rgb": loader("rgb.safetensors", devices),
        "alpha": loader("alpha.safetensors", devices),
        "video": node(
            "WanVAEParallelDecodeToVideo", samples=["latent", 0], vae=["rgb", 0], vae_alpha=["alpha", 0], **inputs
        ),
    }


@pytest.mark.parametrize(
    ("format", "devices", "bound"),
    [
        ("MKV FFV1 lossless 16 bit", "cpu", 1e-4),
        ("MKV FFV1 lossless 16 bit", "cpu,cpu", 1e-4),
        ("PNG pictures 8 bit", "cpu", 0.5 / 255 + 1e-4),
        ("MOV ProRes 422 HQ 10 bit", "cpu", 0.01),
        ("WebM VP9 8 bit", "cpu", 0.1),
    ],
)
def test_two_vaes_make_a_video_with_alpha(server, send, format, devices, bound):
    latents = LATENTS[:, :, :2]
    prefix = f"two/{format.split()[1]}{len(devices)}"
    graph = alpha_to_video(
        send, latents, devices=devices, format=format, quality="best", filename_prefix=prefix, save=True
    )
    graph |= {"taken": node("GetVideoComponents", video=["video", 0]), "saved": save("taken", "components")}
    run = server.run(graph).check()
    files = sorted(file for file in server.output.glob(f"{prefix}*/*.png")) or list(server.output.glob(f"{prefix}*"))
    found = []
    for file in files:
        with VideoInput(file, colours=4) as video:
            found += list(video)
    expected = engine_frames("alpha.safetensors", latents)[..., 0]
    difference = (torch.cat(found)[..., 3] - expected).abs()
    # Noise is what VP9 is worst at; a wrong plane would be off by a third in the mean.
    assert (difference.mean() if "VP9" in format else difference.max()) < bound
    if "FFV1" in format:
        close(torch.cat(found)[..., :3], engine_frames("rgb.safetensors", latents))
    frames = 2 * len(expected)
    assert run.progress("video")[-1] == (frames, frames)
    (said,) = [text for name, text in run.texts if name == "video"]
    assert said.startswith(f"{len(expected)} frames of 48x32")


@pytest.mark.parametrize(("container", "kept"), [("webm", True), ("mkv", True), ("mp4", False)])
def test_a_copy_of_vp9_says_that_it_has_alpha(server, send, container, kept):
    if not saves(server, container, "auto"):
        pytest.skip(f"this ComfyUI does not save {container}")
    graph = alpha_to_video(send, LATENTS[:, :, :2], format="WebM VP9 8 bit")
    graph["save"] = node("SaveVideo", video=["video", 0], filename_prefix="copy", format=container, codec="auto")
    before = len(server.log())
    saved = server.run(graph).check().outputs("save")["images"][0]
    file = server.output / saved["subfolder"] / saved["filename"]
    assert describe_video(find_ffmpeg(), file).alpha == kept
    assert ("this video has alpha" in server.log()[before:]) == (not kept)
    if kept:
        with VideoInput(file, colours=4) as video:
            alpha = torch.cat(list(video))[..., 3]
        expected = engine_frames("alpha.safetensors", LATENTS[:, :, :2])[..., 0]
        assert (alpha - expected).abs().mean() < 0.1


@pytest.mark.parametrize(("format", "told"), [("WebM VP9 8 bit", 1), ("MKV FFV1 lossless 16 bit", 1), (None, 0)])
def test_alpha_that_an_mp4_loses_is_told(server, send, format, told):
    graph = alpha_to_video(send, LATENTS[:, :, :2], **({"format": format} if format else {}))
    if format is None:
        del graph["video"]["inputs"]["vae_alpha"]
    graph["mp4"] = node("SaveVideo", video=["video", 0], filename_prefix="told", format="mp4", codec="auto")
    before = len(server.log())
    server.run(graph).check()
    assert server.log()[before:].count("this video has alpha, and what is saved of it has no place for that") == told


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"format": "MP4 H.264 8 bit"}, "can't hold alpha as H.264"),
        ({"format": "WebM VP9 8 bit", "vae_alpha": ["upscale", 0]}, "don't make the same frames"),
    ],
)
def test_a_video_of_two_vaes_that_can_not_be_is_refused_before_a_decode(server, send, inputs, words):
    graph = alpha_to_video(send, LATENTS[:, :, :2], filename_prefix="refused", save=True)
    graph["video"]["inputs"] |= inputs
    graph["upscale"] = loader("upscale2x.safetensors", "cpu")
    run = server.run(graph)
    assert run.ended == "execution_error"
    assert words in run.detail["exception_message"]
    assert not run.progress("video")
    assert not list(server.output.glob("refused*"))


def test_layered_images_decode_and_encode_as_cores(server, send, received):
    pixels = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    graph = {
        "latent": send("layers", LATENTS[:, :, :2]),
        "pixels": send("opaque pixels", pixels),
        "core": node("VAELoader", vae_name="layered.safetensors"),
        "ours": loader("layered.safetensors"),
    }
    for kind in ("core", "ours"):
        graph |= {
            f"decoded {kind}": decode(vae=kind, decoder="VAEDecode"),
            f"encoded {kind}": node("VAEEncode", pixels=["pixels", 1], vae=[kind, 0]),
            f"save {kind}": save(f"layers of {kind}", f"decoded {kind}"),
            f"save latents of {kind}": node(
                "ProbeSaveTensor", name=f"latents of {kind}", latent=[f"encoded {kind}", 0]
            ),
        }
    server.run(graph).check()
    assert received("layers of ours").shape == (5, 32, 48, 4)
    close(received("layers of ours"), received("layers of core"))
    close(received("latents of ours"), received("latents of core"))


def test_upscale2x_gives_frames_that_others_take(server, send, received):
    graph = {
        "latent": send("to double", LATENTS[:, :, :2]),
        "vae": loader("upscale2x.safetensors"),
        "ours": decode(),
        "cores": decode(decoder="VAEDecode"),
        "preview": node("PreviewImage", images=["ours", 0]),
        "pixels": send("ordinary", torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(2))),
        "encoded": node("VAEEncode", pixels=["pixels", 1], vae=["vae", 0]),
        "save latents": node("ProbeSaveTensor", name="ordinary latents", latent=["encoded", 0]),
    } | {f"save {name}": save(f"doubled {name}", name) for name in ("ours", "cores")}
    server.run(graph).check()
    assert received("doubled ours").shape == (5, 64, 96, 3)
    close(received("doubled ours"), engine_frames("upscale2x.safetensors", LATENTS[:, :, :2]))
    assert torch.equal(received("doubled ours"), received("doubled cores"))
    assert received("ordinary latents").shape == (1, 16, 1, 4, 6)


def test_qwen_image_21_decodes_and_encodes_images(server, send, received):
    latents = torch.randn(3, 64, 1, 2, 3, generator=torch.Generator().manual_seed(3))
    graph = {
        "latent": send("qwen21", latents),
        "flat": send("qwen21 flat", latents[:, :, 0]),
        "vae": loader("qwen21.safetensors"),
        "ours": decode(),
        "of flat": decode(samples="flat", decoder="VAEDecode"),
        "encoded": node("VAEEncode", pixels=["ours", 0], vae=["vae", 0]),
        "save latents": node("ProbeSaveTensor", name="qwen21 latents", latent=["encoded", 0]),
    } | {f"save {name}": save(f"qwen21 {name}", name) for name in ("ours", "of flat")}
    server.run(graph).check()
    images = received("qwen21 ours")
    assert images.shape == (3, 32, 48, 4)
    close(images, engine_frames("qwen21.safetensors", latents))
    close(received("qwen21 of flat"), images)
    close(received("qwen21 latents"), engine("qwen21.safetensors").encode(images[:, None]))


def test_of_a_videos_file_qwen_image_21_makes_a_latent_of_each_frame(server, send, received):
    frames = torch.rand(1, 5, 32, 48, 3, generator=torch.Generator().manual_seed(5))
    with open_output(server.input / "qwen21.mkv", shape=frames.shape, fps=16, format="ffv1") as write:
        write(frames)
    graph = {
        "vae": loader("qwen21.safetensors"),
        "loaded": node("WanVAEParallelLoadVideoToLatent", file="qwen21.mkv", vae=["vae", 0]),
        "save": node("ProbeSaveTensor", name="qwen21 video", latent=["loaded", 0]),
    }
    run = server.run(graph).check()
    assert received("qwen21 video").shape == (5, 64, 1, 2, 3)
    close(received("qwen21 video"), engine("qwen21.safetensors").encode(frames[0][:, None]), bound=2e-3)
    assert run.progress("loaded")[-1] == (5, 5)
    # Latents of a video are refused in the words of a graph.
    graph = {"latent": send("video", torch.zeros(1, 64, 2, 2, 3)), "vae": graph["vae"], "ours": decode()}
    run = server.run({**graph, "save": save("qwen21 none", "ours")})
    assert run.detail["exception_message"].strip().endswith("knows no time; take the VAE of the model that made them")


def test_what_workflows_leave_is_what_cores_loader_can_not_use(server, send):
    # By these files' names, as they are published.
    latents = {"upscale2x": LATENTS[:, :, :1], "qwen21": torch.zeros(1, 64, 1, 2, 2)}
    for file, samples in latents.items():
        graph = {
            "latent": send(f"core {file}", samples),
            "vae": node("VAELoader", vae_name=f"{file}.safetensors"),
            "core": decode(decoder="VAEDecode"),
            "save": node("SaveImage", images=["core", 0], filename_prefix=file),
        }
        assert server.run(graph).ended == "execution_error"


def test_a_batch_of_images_is_cores(server, send, received):
    graph = {
        "latent": send("pictures", torch.randn(5, 16, 1, 4, 6, generator=torch.Generator().manual_seed(4))),
        "core": node("VAELoader", vae_name="rgb.safetensors"),
        "vae": loader("rgb.safetensors"),
        "cores": decode(vae="core", decoder="VAEDecode"),
        "ours": decode(),
    } | {f"save {name}": save(f"pictures {name}", name) for name in ("ours", "cores")}
    server.run(graph).check()
    assert len(received("pictures ours")) == 5
    close(received("pictures ours"), received("pictures cores"))


# WanVideoWrapper.


def test_wanvideowrappers_vae_speaks_normalised_latents(server, send, received):
    pixels = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    graph = {
        "latent": send("wrapper's", normalize(LATENTS, WAN21)),
        "pixels": send("wrapper's pixels", pixels),
        "wrapper": node("ProbeWrapperVAE", vae_name="rgb.safetensors"),
        "vae": apply("wrapper"),
        "decode0": decode(),
        "decode1": decode(decoder="VAEDecode"),
        "decode2": decode(vae="wrapper"),  # without Apply
        "encode0": node("WanVAEParallelEncode", pixels=["pixels", 1], vae=["vae", 0], chunk=0),
        "encode1": node("VAEEncode", pixels=["pixels", 1], vae=["vae", 0]),
    }
    for i in range(3):
        graph[f"save{i}"] = save(f"wrapper's {i}", f"decode{i}")
    for i in range(2):
        graph[f"save latents {i}"] = node("ProbeSaveTensor", name=f"wrapper's latents {i}", latent=[f"encode{i}", 0])
    server.run(graph).check()
    expected = engine_frames("rgb.safetensors", LATENTS)
    for i in range(3):
        close(received(f"wrapper's {i}"), expected)
    latents = engine("rgb.safetensors").encode(pixels[None], normalized=True)
    for i in range(2):
        close(received(f"wrapper's latents {i}"), latents)


@pytest.mark.parametrize("wrapped", ["rgb", "alpha"])
def test_one_latent_is_normalised_for_both_vaes_if_one_is_wanvideowrappers(server, send, received, wrapped):
    graph = {
        "latent": send("normalised", normalize(LATENTS, WAN21)),
        "rgb": loader("rgb.safetensors"),
        "alpha": loader("alpha.safetensors"),
        "ours": node("WanVAEParallelDecodeRGBA", samples=["latent", 0], vae_rgb=["rgb", 0], vae_alpha=["alpha", 0]),
        "save": save("both", "ours"),
        wrapped: node("ProbeWrapperVAE", vae_name=f"{wrapped}.safetensors"),
    }
    server.run(graph).check()
    close(received("both")[..., :3], engine_frames("rgb.safetensors", LATENTS))
    close(received("both")[..., 3], engine_frames("alpha.safetensors", LATENTS)[..., 0])


def test_wanvideowrappers_preview_network_is_refused_by_name(server, send):
    run = server.run(
        {
            "latent": send("never", LATENTS),
            "wrapper": node("ProbeWrapperVAE", vae_name="taew2_1"),
            "decode": decode(vae="wrapper"),
            "save": save("never", "decode"),
        }
    )
    assert run.ended == "execution_error"
    assert "the connected VAE is a TAEHV, a small network for previews" in run.detail["exception_message"]


WORDS = {
    "has_ref": ({"has_ref": True, "drop_last": False, "looped": False}, slice(1, None)),
    "drop_last": ({"has_ref": False, "drop_last": True}, slice(0, -1)),
    "both": ({"has_ref": True, "drop_last": True}, slice(1, -1)),
    "end_image": ({"has_ref": False, "end_image": [0.0]}, slice(0, -1)),
    "neither": ({"has_ref": False, "drop_last": False, "looped": False, "end_image": None}, slice(0, None)),
    # Core's own, which decoding does not look at.
    "noise_mask": ({"noise_mask": [[1.0]], "batch_index": [0], "downscale_ratio_spacial": 8}, None),
}


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "rescaled"])
def test_what_a_sampler_says_beside_its_latents_is_followed(server, send, received, normalised):
    """WanVideoWrapper's with its own node for the formula; a node of its rescales latents and leaves the words."""
    as_made = torch.randn(1, 16, 3, 2, 3, generator=torch.Generator().manual_seed(6))
    given = as_made if normalised else denormalize(as_made, WAN21)
    graph = {"latent": send(f"said {normalised}", given), "vae": loader("rgb.safetensors")}
    for name, (words, _) in WORDS.items():
        graph |= {
            f"{name} said": node("ProbeAddWords", latent=["latent", 0], words=json.dumps(words)),
            f"{name} decoded": decode(samples=f"{name} said"),
            f"{name} saved": save(f"said {name}", f"{name} decoded"),
        }
    server.run(graph).check()
    for name, (_, kept) in WORDS.items():
        latents = given if kept is None or not normalised else denormalize(given, WAN21)
        expected = engine_frames("rgb.safetensors", latents[:, :, kept or slice(None)])
        close(received(f"said {name}"), expected)


def test_a_loop_is_closed_and_frames_that_are_there_are_passed_on(server, send, received):
    frames = torch.rand(5, 16, 24, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    graph = {
        "latent": send("loop", normalize(LATENTS, WAN21)),
        "loop": node("ProbeAddWords", latent=["latent", 0], words='{"looped": true, "has_ref": false}'),
        "vae": loader("rgb.safetensors"),
        "decoded": decode(samples="loop"),
        "video": node("ProbeAddWords", latent=["frames", 0], words='{"as_video": true}'),
        "frames": send("decoded before", frames),
        "passed": decode(samples="video"),
        "save loop": save("loop frames", "decoded"),
        "save passed": save("passed", "passed"),
    }
    server.run(graph).check()
    # The wrapper's formula: the end and the beginning once more, joined; 8 frames of that, and all from the fifth on.
    turn = torch.cat([LATENTS[:, :, -3:], LATENTS[:, :, :2]], dim=2)
    expected = torch.cat([engine_frames("rgb.safetensors", turn)[9:], engine_frames("rgb.safetensors", LATENTS)[5:]])
    close(received("loop frames"), expected)
    torch.testing.assert_close(received("passed"), (frames + 1) / 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"samples": None}, "the LATENT has no samples, but samples"),
        ({"looped": True, "end_image": [0.0]}, "is of a loop .looped., which takes 5 latent frames and no end picture"),
    ],
)
def test_what_cant_be_followed_is_told(server, send, words, expected):
    run = server.run(
        {
            "latent": send("unfollowed", LATENTS),
            "said": node("ProbeAddWords", latent=["latent", 0], words=json.dumps(words)),
            "vae": loader("rgb.safetensors"),
            "decode": decode(samples="said"),
            "save": save("never", "decode"),
        }
    )
    assert run.ended == "execution_error"
    assert expected.replace(".looped.", "(looped)") in run.detail["exception_message"]


def test_what_leaves_nothing_is_told_with_the_way_out(server, send):
    graph = {
        "latent": send("one frame", LATENTS[:, :, :1]),
        "said": node("ProbeAddWords", latent=["latent", 0], words='{"has_ref": true}'),
        "vae": loader("rgb.safetensors"),
        "decode": decode(samples="said"),
        "save": save("never", "decode"),
    }
    run = server.run(graph)
    assert "leave out 1 of them (has_ref), so that none is left; have the" in run.detail["exception_message"]
    for encoder in ("WanVAEParallelEncode", "VAEEncode"):
        graph = {
            "nothing": node("ProbeNothing"),
            "vae": loader("rgb.safetensors"),
            "encode": node(encoder, pixels=["nothing", 0], vae=["vae", 0]),
            "save": node("ProbeSaveTensor", name="never", latent=["encode", 0]),
        }
        run = server.run(graph)
        assert run.ended == "execution_error"
        assert "the pixels are a NoneType; connect a node's IMAGE" in run.detail["exception_message"]


def test_weights_that_a_loader_rounded_are_said(server, send):
    server.run(
        {
            "latent": send("rounded", LATENTS[:, :, :1]),
            "core": node("VAELoader", vae_name="wan21.safetensors"),
            "halved": node("ProbeAlterVAE", vae=["core", 0], how="bf16"),
            "vae": apply("halved", dtype="float32"),
            "decode": decode(),
            "save": save("rounded", "decode"),
        }
    ).check()
    assert "dtype float32 is asked for, and the connected VAE holds its weights in bfloat16" in server.log()


def test_the_nodes_are_found_by_the_models_names(server):
    info = server.get("/object_info")
    aliases = [info[name].get("search_aliases") for name in ("WanVAEParallelLoader", "WanVAEParallelApply")]
    if None in aliases:
        pytest.skip("this ComfyUI's schema knows no search aliases")
    for name in ("WanVAEParallelLoader", "WanVAEParallelApply"):
        assert {"qwen image vae", "krea vae", "anima vae", "wan alpha vae"} <= set(info[name]["search_aliases"])
        assert "Qwen-Image" in info[name]["description"]


def test_a_random_checkpoint_is_what_the_server_reads(server, files):
    """That the tests above compare with the weights that the nodes load."""
    read = load_file(server.output.parent / "models" / "vae" / "rgb.safetensors")
    assert torch.equal(read["conv2.weight"], files["rgb.safetensors"]["conv2.weight"])
