"""The workflows that come with the pack, against a real server's nodes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.comfyui.server import REPOSITORY
from wan_vae_parallel import demo_latents, save_demo_checkpoint
from wan_vae_parallel.files.latents import save_latents
from wan_vae_parallel.files.video import open_output

NAMES = ["decode_latent", "decode_to_video", "encode_video", "text_to_video", "video_to_latent"]


def workflow(name):
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text())


def api_workflow(name):
    return json.loads((REPOSITORY / "workflows" / "api" / f"{name}.json").read_text())


def test_the_template_browser_lists_just_the_editors_workflows(server):
    assert sorted(server.get("/workflow_templates")["wan-vae-parallel"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_input_exists(server, name):
    info = server.get("/object_info")
    for node in api_workflow(name).values():
        inputs = info[node["class_type"]]["input"]
        known = {**inputs.get("required", {}), **inputs.get("optional", {})}
        assert set(node["inputs"]) <= set(known), node
        assert set(inputs.get("required", {})) <= set(node["inputs"]), node


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_workflow_is_the_same_graph(name):
    editor, api = workflow(name), api_workflow(name)
    assert {str(node["id"]): node["type"] for node in editor["nodes"]} == {k: v["class_type"] for k, v in api.items()}
    inputs_of = {node["id"]: node["inputs"] for node in editor["nodes"]}
    linked = {
        (str(target), inputs_of[target][slot]["name"], str(origin), origin_slot)
        for _, origin, origin_slot, target, slot, _ in editor["links"]
    }
    assert linked == {
        (key, name, *value)
        for key, node in api.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    for node in editor["nodes"]:
        values = [v for v in api[str(node["id"])]["inputs"].values() if not isinstance(v, list)]
        # the editor adds widgets of its own, such as what a seed does after a run
        assert all(value in node["widgets_values"] for value in values), node["type"]


@pytest.mark.parametrize(("name", "last"), [("decode_latent", "5"), ("decode_to_video", "3")])
def test_decodes_run_with_the_demos_files(server, name, last):
    described = save_demo_checkpoint(server.folder / "models" / "vae" / "demo_vae.safetensors", "wan2.1", 8)
    save_latents(server.input / "demo.latent", demo_latents(described, frames=2, rows=4, columns=6))
    run = server.run(api_workflow(name)).check()
    saved = run.outputs(last)["images"][0]
    assert saved["type"] == "output"
    assert (server.output / saved["subfolder"] / saved["filename"]).stat().st_size > 0


@pytest.mark.parametrize(("name", "last"), [("encode_video", "5"), ("video_to_latent", "3")])
def test_encodes_run_with_the_demos_files(server, name, last):
    save_demo_checkpoint(server.folder / "models" / "vae" / "demo_vae.safetensors", "wan2.1", 8)
    frames = torch.rand(1, 7, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    with open_output(server.input / "demo.mp4", shape=frames.shape, fps=16) as write:
        write(frames)
    run = server.run(api_workflow(name)).check()
    saved = run.outputs(last)["latents"][0]
    latents = load_file(server.output / saved["subfolder"] / saved["filename"])["latent_tensor"]
    assert latents.shape == (1, 16, 2, 4, 6)
