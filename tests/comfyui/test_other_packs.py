"""VAEs that other packs' nodes, or core's newer ones, have wrapped, patched, copied or put elsewhere."""

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.server import node

LATENTS = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def graph(send):
    return {"latent": send("latent", LATENTS), "core": node("VAELoader", vae_name="wan21.safetensors")}


def alter(how, vae="core"):
    return node("ProbeAlterVAE", vae=[vae, 0], how=how)


def apply(vae="core", devices="auto"):
    return node("WanVAEParallelApply", vae=[vae, 0], devices=devices, dtype="auto", chunk=0)


def load(name="wan21.safetensors"):
    return node("WanVAEParallelLoader", vae_name=name, devices="auto", dtype="auto", chunk=0)


def decoded(name, vae, decoder="VAEDecode", slot=0):
    """A decode whose frames are saved under ``name``."""
    ours = {"normalized_latents": False} if decoder == "WanVAEParallelDecode" else {}
    decode = node(decoder, samples=["latent", 0], vae=[vae, 0], **ours)
    return {
        f"decode {name}": decode,
        f"save {name}": node("ProbeSaveTensor", name=name, image=[f"decode {name}", slot]),
    }


def close(frames, expected, bound=1e-3):
    assert frames.shape == expected.shape
    assert frames.dtype == expected.dtype
    assert expected.float().std() > 0.05  # else nothing is compared
    return bool((frames.float() - expected.float()).abs().max() <= bound)


@pytest.mark.parametrize(
    "how",
    [
        "copy",
        "compile parts",
        "compile layers",
        "compile all",
        "hold",
        "patch objects",
        "patch objects later",
        "normalise weights",
    ],
)
def test_weights_are_read_through_what_others_have_put_around_them(server, received, graph, how):
    server.run(
        {
            **graph,
            **decoded("expected", "core"),
            # before Apply, within our decode, and after it
            "altered": alter(how),
            "applied": apply("altered"),
            **decoded("before", "applied"),
            **decoded("within", "altered", "WanVAEParallelDecode"),
            "parallel": apply(),
            **decoded("warm", "parallel"),
            "altered later": alter(how, "parallel"),
            **decoded("after", "altered later"),
        }
    ).check()
    for name in ("before", "within", "warm", "after"):
        assert close(received(name), received("expected")), name


def test_weight_patches_are_applied_as_core_applies_them(server, received, graph):
    server.run(
        {
            **graph,
            **decoded("plain", "core"),
            "altered": alter("lora"),
            **decoded("expected", "altered"),
            "applied": apply("altered"),
            **decoded("before", "applied"),
            "parallel": apply(),
            "altered later": alter("lora", "parallel"),
            **decoded("after", "altered later"),
        }
    ).check()
    assert not close(received("plain"), received("expected"), 0.02)
    for name in ("before", "after"):
        assert close(received(name), received("expected")), name


def test_modules_that_others_have_replaced_are_named(server, graph):
    run = server.run(
        {**graph, "altered": alter("replace norms"), **decoded("never", "altered", "WanVAEParallelDecode")}
    )
    assert run.ended == "execution_error"
    said = run.detail["exception_message"]
    assert "another node has replaced modules of the connected VAE: decoder.head.0 is a FastNorm" in said
    assert "connect the VAE as its loader gives it" in said


def test_an_image_vae_is_told_from_a_wan_vae(server, graph):
    # The least that core takes for a VAE of Stable Diffusion; its weights stay as they are initialised.
    tensors = {"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}
    save_file(tensors, server.folder / "models" / "vae" / "image.safetensors")
    run = server.run({**graph, "vae": load("image.safetensors"), **decoded("never", "vae")})
    assert run.ended == "execution_error"
    assert "decoder.conv_in.weight has four axes (512, 4, 3, 3)" in run.detail["exception_message"]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("circular", "decoder.conv1 has padding_mode circular, decoder.middle.0.residual.2 has"),
        ("tile asymmetrically", "decoder.conv1 has a _conv_forward of its own"),
    ],
)
def test_padding_that_others_have_changed_has_no_effect_and_the_log_says_so_once(server, received, graph, how, what):
    before = server.log().count("has changed how this VAE pads")
    server.run(
        {
            **graph,
            "parallel": apply(),
            **decoded("expected", "parallel"),
            "altered": alter(how, "parallel"),
            **decoded("changed", "altered"),
            **decoded("again", "altered", "WanVAEParallelDecode"),
        }
    ).check()
    assert torch.equal(received("changed"), received("expected"))
    said = [line for line in server.log().splitlines() if "has changed how this VAE pads" in line][before:]
    assert len(said) == 1
    assert what in said[0]
    assert "use a VAE that was not made parallel" in said[0]


def test_a_device_that_a_node_chose_is_followed_if_devices_is_auto(server, graph):
    server.run(
        {
            **graph,
            "here": alter("put on the cpu"),
            "applied": apply("here"),
            **decoded("here", "applied"),
            "there": alter("put on cuda:1"),
            "applied there": apply("there"),
            **decoded("there", "applied there"),
            "parallel": apply(devices="cpu"),
            "there later": alter("put on cuda:1", "parallel"),
            **decoded("later", "there later"),
        }
    ).check()
    log = server.log()
    assert "using cpu, where a node has put the VAE" in log
    assert "cuda:1 is not supported; using the CPU" in log
    assert "a node has put the VAE on cuda:1, but devices says cpu; using these" in log


@pytest.mark.parametrize("name", ["wan21.safetensors", "wan22.safetensors"])  # with core's model, and without
def test_cores_device_selector_may_stand_behind_our_loader(server, received, send, name):
    if "SelectVAEDevice" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no SelectVAEDevice")
    latents = LATENTS if "21" in name else torch.randn(1, 48, 2, 3, 4, generator=torch.Generator().manual_seed(4))
    server.run(
        {
            "latent": send("selected " + name, latents),
            "vae": load(name),
            **decoded("expected", "vae"),
            "selected": node("SelectVAEDevice", vae=["vae", 0], device="default"),
            **decoded("selected", "selected"),
            "applied": apply("selected"),
            **decoded("applied", "applied"),
        }
    ).check()
    for frames in ("selected", "applied"):
        assert torch.equal(received(frames), received("expected"))


@pytest.mark.parametrize("name", ["wan21.safetensors", "wan22.safetensors"])
def test_cores_device_selector_moves_our_loaders_vae(server, received, send, name):
    if "SelectVAEDevice" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no SelectVAEDevice")
    latents = LATENTS if "21" in name else torch.randn(1, 48, 2, 3, 4, generator=torch.Generator().manual_seed(4))
    before = len(server.log())
    server.run(
        {
            "latent": send("moved " + name, latents),
            "vae": load(name),
            **decoded("expected", "vae"),
            "selected": alter("select gpu:1", "vae"),
            **decoded("selected", "selected"),
            "applied": apply("selected"),
            **decoded("applied", "applied"),
        }
    ).check()
    log = server.log()[before:]
    assert "cuda:1 is not supported; using the CPU" in log  # as there is none here
    assert "cannot retarget" not in log
    for frames in ("selected", "applied"):
        assert torch.equal(received(frames), received("expected"))


@pytest.mark.parametrize(
    ("devices", "put_on", "chosen"),
    [
        ("auto", "", ["cuda:0", "cuda:1"]),
        ("auto", "cuda:1", ["cuda:1"]),
        ("Default", "cpu", ["cpu"]),
        ("GPU:0,gpu:1", "", ["cuda:0", "cuda:1"]),
        ("cuda:0", "cuda:1", ["cuda:0"]),
        ("gpu:7", "cuda:1", ["cuda:1"]),  # made elsewhere
        ("gpu:7", "", ["cuda:0", "cuda:1"]),
        ("all but the first", "", ["cuda:1"]),
        ("all but the first", "cuda:0", ["cuda:1"]),
        ("cuda:1,cuda:7", "", ["cuda:1"]),
        (" ", "cuda:1", ["cuda:1"]),
    ],
)
def test_which_devices_are_taken_on_a_machine_with_two_gpus(server, devices, put_on, chosen):
    probe = node("ProbeChosenDevices", devices=devices, put_on=put_on)
    told = server.run({"probe": probe}).check().outputs("probe")
    assert told["devices"] == chosen
    assert told["listed"] == ["auto ", "cuda:0 GPU 0", "cuda:1 GPU 1", "all but the first ", "cpu "]


def test_arguments_of_later_cores_are_taken(server, received, graph):
    decode = decoded("whole", "parallel", "ProbeDecodeAsLaterCores")
    tiled = node("ProbeSaveTensor", name="tiled", image=["decode whole", 1])
    server.run({**graph, **decoded("expected", "core"), "parallel": apply(), **decode, "tiled": tiled}).check()
    assert close(received("whole"), received("expected"))
    assert torch.equal(received("tiled"), received("whole"))


def test_a_full_host_is_no_reason_to_write_python(server, graph):
    short = node("ProbeDecodeWithoutRoom", samples=["latent", 0], vae=["parallel", 0])
    (said,) = server.run({**graph, "parallel": apply(), "short": short}).check().outputs("short")["error"]
    assert "free some of it, or decode fewer or smaller frames" in said
    assert "decode_stream" not in said


@pytest.mark.parametrize("devices", ["missing", None, "CPU", "Auto", "default", "gpu:7", "GPU"])
def test_inputs_with_a_default_may_be_missing_and_devices_have_their_usual_names(server, received, graph, devices):
    named = {} if devices == "missing" else {"devices": devices}
    server.run(
        {
            **graph,
            "loaded": node("WanVAEParallelLoader", vae_name="wan21.safetensors", **named),
            "applied": node("WanVAEParallelApply", vae=["core", 0], **named),
            **decoded("expected", "core"),
            **decoded("loaded", "loaded"),
            "decode loaded": node("WanVAEParallelDecode", samples=["latent", 0], vae=["loaded", 0]),
            **decoded("applied", "applied"),
        }
    ).check()
    for frames in ("loaded", "applied"):
        assert close(received(frames), received("expected"))
