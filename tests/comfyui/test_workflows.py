"""The workflows that come with the pack, against a real server's nodes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.comfyui.editor_graphs import NOTES
from tests.comfyui.server import REPOSITORY
from tools.graphs import BYPASSED, Graph
from tools.templates import MODELS, TEMPLATES
from wan_vae_parallel import __version__, demo_latents, save_demo_checkpoint
from wan_vae_parallel.files.latents import save_latents
from wan_vae_parallel.files.video import open_output

NAMES = sorted(TEMPLATES)


def workflow(name):
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name):
    return json.loads((REPOSITORY / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def in_the_prompt(node):
    return node["type"] not in NOTES and node["mode"] != BYPASSED


def test_the_template_browser_lists_just_the_editors_workflows(server):
    assert sorted(server.get("/workflow_templates")["wan-vae-parallel"]) == NAMES
    in_the_api = {path.stem for path in (REPOSITORY / "workflows" / "api").iterdir()}
    assert in_the_api == {name for name, _ in TEMPLATES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_input_exists(server, name):
    info = server.get("/object_info")
    for node in api_workflow(TEMPLATES[name][0]).values():
        inputs = info[node["class_type"]]["input"]
        known = {**inputs.get("required", {}), **inputs.get("optional", {})}
        assert set(node["inputs"]) <= set(known), node
        assert set(inputs.get("required", {})) <= set(node["inputs"]), node


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_workflow_is_the_same_graph(name):
    editor, api = workflow(name), api_workflow(TEMPLATES[name][0])
    nodes = {node["id"]: node for node in editor["nodes"] if in_the_prompt(node)}
    assert {str(key): node["type"] for key, node in nodes.items()} == {
        key: node["class_type"] for key, node in api.items()
    }
    assert all(node.get("title") in (None, api[str(key)]["_meta"]["title"]) for key, node in nodes.items())
    linked = {
        (str(target), nodes[target]["inputs"][slot]["name"], str(origin), origin_slot)
        for _, origin, origin_slot, target, slot, _ in editor["links"]
        if origin in nodes and target in nodes
    }
    assert linked == {
        (key, name, *value)
        for key, node in api.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    for node in nodes.values():
        values = [v for v in api[str(node["id"])]["inputs"].values() if not isinstance(v, list)]
        # the editor adds widgets of its own, such as what a seed does after a run
        assert all(value in node["widgets_values"] for value in values), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_their_script_makes(server, name):
    api_name, build = TEMPLATES[name]
    graph = Graph(server.get("/object_info"), MODELS, ("0.8.0", __version__))
    build(graph)
    made = graph.api()
    kept = api_workflow(api_name)
    assert {key: node["_meta"]["title"] for key, node in made.items()} == {
        key: node["_meta"]["title"] for key, node in kept.items()
    }
    for key, node in kept.items():
        # A newer ComfyUI may have inputs that the files, made with the oldest, leave at their default.
        assert {name: made[key]["inputs"][name] for name in node["inputs"]} == node["inputs"], node["class_type"]
    places = {node["id"]: (node["pos"], node["properties"].get("models")) for node in workflow(name)["nodes"]}
    assert places == {
        node["id"]: (node["pos"], node["properties"].get("models")) for node in graph.editor(name)["nodes"]
    }


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
