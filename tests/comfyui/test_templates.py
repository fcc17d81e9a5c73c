"""The pack's example workflows and subgraphs, as files, and against a real server's nodes."""

import io
import json
import math
import re
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from tests.comfyui.editor_graphs import (
    INPUT_NODE,
    NOTES,
    OUTPUT_NODE,
    SLOT,
    WIDGET,
    as_object,
    behind,
    graphs,
    overlaps,
    title,
)
from tests.comfyui.server import REPOSITORY
from tools.templates import MODELS, TEMPLATES
from wan_vae_parallel import __version__

NAMES = sorted(path.stem for path in (REPOSITORY / "workflows").glob("*.json"))
SUBGRAPHS = sorted(path.stem for path in (REPOSITORY / "subgraphs").glob("*.json"))
FILES = [*(f"workflows/{name}" for name in NAMES), *(f"subgraphs/{name}" for name in SUBGRAPHS)]
# Files that come with ComfyUI or that the pack's demo makes; others are downloaded.
AT_HAND = {"demo_vae.safetensors"}
WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", "COMFY_DYNAMICCOMBO_V3"}
FOLDERS = {
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "WanVAEParallelLoader": "vae",
}


def read(file):
    return json.loads((REPOSITORY / f"{file}.json").read_text(encoding="utf-8"))


def own_nodes(graph):
    """Those that are neither notes nor stand for a subgraph."""
    return [
        node for node in graph["nodes"] if node["type"] not in NOTES and not re.fullmatch("[0-9a-f-]{36}", node["type"])
    ]


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


def specs(node_info):
    return {name: spec for kind in ("required", "optional") for name, spec in node_info["input"].get(kind, {}).items()}


def type_of(spec):
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def options_of(spec):
    return spec[1] if len(spec) > 1 else {}


def legal(value, spec):
    """Whether a widget takes a value; of files a name is enough, for they may have to be downloaded."""
    options = options_of(spec)
    kind = type_of(spec)
    if kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
        choices = spec[0] if isinstance(spec[0], list) else options["options"]
        keys = [choice["key"] if isinstance(choice, dict) else choice for choice in choices]
        a_file = isinstance(value, str) and re.search(r"\.(safetensors|latent|png|mp4)$", value)
        return value in keys or bool(a_file)
    if kind in ("INT", "FLOAT"):
        step = options.get("step", 1) if kind == "INT" else 0
        fits = options.get("min", -math.inf) <= value <= options.get("max", math.inf)
        on_a_step = not step or (value - options.get("min", 0)) % step == 0
        return type(value) in ((int,) if kind == "INT" else (int, float)) and fits and on_a_step
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


def test_there_is_a_template_for_each_way_of_making_a_video():
    assert set(TEMPLATES) == set(NAMES)
    text = " ".join(NAMES)
    for model in (
        "Wan 2.1 1.3B",
        "Wan 2.2 14B Text",
        "Wan 2.2 14B Image",
        "5B",
        "VACE",
        "First-Last",
        "Qwen-Image",
    ):
        assert model in text


def test_the_list_of_workflows_has_each_with_the_nodes_that_it_shows():
    text = (REPOSITORY / "workflows" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|`]+) \| `(\w+)` \|", text, flags=re.MULTILINE))
    assert rows == {name: api_name for name, (api_name, _) in TEMPLATES.items()}
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (REPOSITORY / "workflows" / picture).stat().st_size < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_the_template_browser_gets_a_square_picture(server, name):
    assert name in server.get("/workflow_templates")["wan-vae-parallel"]
    path = f"/api/workflow_templates/wan-vae-parallel/{urllib.parse.quote(name)}"
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}.jpg", timeout=30) as response:
        picture = Image.open(io.BytesIO(response.read()))
    assert picture.format == "JPEG"
    assert picture.width == picture.height >= 400
    assert server.get(path + ".json") == read(f"workflows/{name}")


@pytest.mark.parametrize("file", FILES)
def test_links_are_told_alike_at_both_ends(file):
    for graph in graphs(read(file)):
        nodes = {node["id"]: node for node in graph["nodes"]}
        links = {link["id"]: link for link in map(as_object, graph["links"])}
        assert len(links) == len(graph["links"])
        at_inputs = {
            entry["link"]: (node["id"], slot)
            for node in graph["nodes"]
            for slot, entry in enumerate(node["inputs"])
            if entry["link"] is not None
        }
        at_outputs = {
            link: (node["id"], slot)
            for node in graph["nodes"]
            for slot, entry in enumerate(node["outputs"])
            for link in entry["links"] or []
        }
        for number, link in links.items():
            origin, target = (link["origin_id"], link["origin_slot"]), (link["target_id"], link["target_slot"])
            assert at_outputs.pop(number, origin) == origin
            assert at_inputs.pop(number, target) == target
            if origin[0] == INPUT_NODE:
                assert number in graph["inputs"][origin[1]]["linkIds"]
            else:
                assert number in nodes[origin[0]]["outputs"][origin[1]]["links"]
            if target[0] == OUTPUT_NODE:
                assert number in graph["outputs"][target[1]]["linkIds"]
        assert (at_inputs, at_outputs) == ({}, {})


@pytest.mark.parametrize("file", FILES)
def test_every_node_and_each_of_its_inputs_is_one_of_the_servers(info, file):
    for graph in graphs(read(file)):
        links = {link["id"]: link for link in map(as_object, graph["links"])}
        nodes = {node["id"]: node for node in graph["nodes"]}
        for node in own_nodes(graph):
            known = info[node["type"]]
            inputs = specs(known)
            entries = {entry["name"]: entry for entry in node["inputs"]}
            assert set(entries) <= set(inputs), node["type"]
            assert [entry["name"] for entry in node["outputs"]] == known["output_name"][: len(node["outputs"])]
            for name in known["input"]["required"]:
                assert "widget" in entries[name] or entries[name]["link"] is not None, (title(node), name)
            for name, entry in entries.items():
                link = links.get(entry["link"])
                if link and link["origin_id"] != INPUT_NODE:
                    origin = nodes[link["origin_id"]]
                    given = info[origin["type"]]["output"][link["origin_slot"]]
                    assert link["type"] == given
                    assert given in type_of(inputs[name]).split(","), (title(node), name)


@pytest.mark.parametrize("file", FILES)
def test_every_value_is_legal_and_belongs_to_its_widget(info, file):
    for graph in graphs(read(file)):
        for node in own_nodes(graph):
            inputs = specs(info[node["type"]])
            widgets = [name for name, spec in inputs.items() if type_of(spec) in WIDGETS]
            stored = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            # The editor keeps values by their order; newer versions may have more behind.
            ours = node["type"].startswith("WanVAEParallel")
            assert stored == (widgets if ours else widgets[: len(stored)]), node["type"]
            values = list(node["widgets_values"])
            for name in stored:
                assert legal(values.pop(0), inputs[name]), (title(node), name)
                options = options_of(inputs[name])
                if options.get("control_after_generate"):
                    assert values.pop(0) in ("fixed", "randomize")
            # Behind all others the buttons that upload.
            uploads = [
                name
                for name in stored
                if {"image_upload", "video_upload"} & {key for key, on in options_of(inputs[name]).items() if on}
            ]
            assert values == ["image"] * len(uploads), title(node)


@pytest.mark.parametrize("file", FILES)
def test_missing_models_and_packs_can_be_fetched_by_a_click(file):
    missing = 0
    for graph in graphs(read(file)):
        for node in own_nodes(graph):
            ours = node["type"].startswith("WanVAEParallel")
            assert node["properties"]["cnr_id"] == ("wan-vae-parallel" if ours else "comfy-core")
            version = [int(part) for part in node["properties"]["ver"].split(".")]
            assert version <= [int(part) for part in __version__.split(".")] if ours else version == [0, 8, 0]
            files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
            models = node["properties"].get("models", [])
            assert [model["name"] for model in models] == [name for name in files if name not in AT_HAND]
            for model in models:
                assert model["directory"] == FOLDERS[node["type"]]
                assert model["url"].startswith("https://huggingface.co/")
                assert model["url"].endswith(f"/{model['directory']}/{model['name']}")
            missing += len(models)
    assert missing or "demo_vae" in json.dumps(read(file))


def test_models_are_had_from_where_comfyuis_own_templates_have_them(official):
    told = {
        (model["name"], model["url"].partition("?")[0], model["directory"])
        for workflow in official.values()
        for graph in graphs(workflow)
        for node in graph["nodes"]
        for model in node.get("properties", {}).get("models") or []
    }
    for name, (url, directory) in MODELS.items():
        places = {
            told_url for told_name, told_url, told_directory in told if (told_name, told_directory) == (name, directory)
        }
        assert url in places, (name, places)


def as_tall_as_with(info, node):
    """The node as tall as the server's makes it, which may have more outputs and widgets than when it was saved."""
    if node["type"] not in info:
        return node
    inputs = specs(info[node["type"]]).values()
    kinds = ("control_after_generate", "image_upload", "video_upload")
    widgets = [spec for spec in inputs if type_of(spec) in WIDGETS]
    rows = max(len(inputs) - len(widgets), len(info[node["type"]]["output"]))
    more = sum(bool(options_of(spec).get(kind)) for spec in widgets for kind in kinds)
    tall = SLOT * rows + WIDGET * (len(widgets) + more) + 14
    return {**node, "size": [node["size"][0], max(node["size"][1], tall)]}


@pytest.mark.parametrize("file", FILES)
def test_no_node_lies_on_another_and_no_link_passes_behind_one(info, file):
    for graph in graphs(read(file)):
        drawn = {**graph, "nodes": [as_tall_as_with(info, node) for node in graph["nodes"]]}
        assert overlaps(drawn["nodes"]) == []
        assert list(behind(drawn)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_note_says_what_it_shows_and_every_node_has_a_name_that_can_be_read(info, name):
    workflow = read(f"workflows/{name}")
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    (text,) = note["widgets_values"]
    assert text.startswith("## ")
    assert 150 < len(text) < 1000
    ours = {node["type"] for node in workflow["nodes"] if node["type"].startswith("WanVAEParallel")}
    assert ours
    for node in own_nodes(workflow):
        named = node.get("title", info[node["type"]]["display_name"])
        assert named.strip() == named != ""
        assert not re.search("[a-z_][A-Z_]", named), "that is a type's name"
        # Nodes of this pack are called in the language of who opens them.
        assert "title" not in node or node["type"] not in ours


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_the_server_lists_the_packs_subgraphs(server, name):
    listed = server.get("/global_subgraphs")
    (key,) = [
        key
        for key, entry in listed.items()
        if entry["name"] == name and entry["info"]["node_pack"] == "custom_nodes.wan-vae-parallel"
    ]
    assert listed[key]["source"] == "custom_node"
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == read(f"subgraphs/{name}")


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_a_subgraph_shows_what_is_set_outside(name):
    workflow = read(f"subgraphs/{name}")
    (place,), (definition,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert place["type"] == definition["id"]
    assert place["title"] == definition["name"] == name
    assert definition["description"]
    assert [(entry["name"], entry["type"]) for entry in place["inputs"]] == [
        (entry["name"], entry["type"]) for entry in definition["inputs"]
    ]
    assert [entry["name"] for entry in place["outputs"]] == [entry["name"] for entry in definition["outputs"]]
    widgets = [entry["name"] for entry in place["inputs"] if "widget" in entry]
    assert {"vae_name", "devices"} <= set(widgets)
    assert place["properties"]["proxyWidgets"] == [["-1", widget] for widget in widgets]
    assert len(place["widgets_values"]) == len(widgets)
    # What is set outside is what the nodes inside have, too.
    inside = {value for node in definition["nodes"] for value in map(str, node["widgets_values"])}
    assert set(map(str, place["widgets_values"])) <= inside
