"""The list of devices in the editor's page, in both of its ways to draw nodes."""

import copy
import json

import pytest

from tests.comfyui.editor import RENDERERS, draw_by, load_workflow, open_editor
from tests.comfyui.server import REPOSITORY
from tests.processes import patience

# As a machine with two GPUs describes its nodes.
OPTIONS = ["auto", "cuda:0", "cuda:1", "all but the first", "cpu"]
NAMES = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA RTX 4090"}
LABELS = ["auto", "cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA RTX 4090)", *OPTIONS[3:]]
NODES = ("WanVAEParallelLoader", "WanVAEParallelApply")
# What the nodes in sight show, of their own or of what a subgraph promotes.
WIDGETS = """() => app.graph._nodes.flatMap((node) => node.widgets ?? [])
    .filter((widget) => widget.name === "devices").map(({value, options}) =>
        ({value, offered: options.values, labels: options.values.map(options.getOptionLabel)}))"""


@pytest.fixture(scope="module")
def editor(browser, frontend, server):  # noqa: ARG001 (the server has the frontend)
    """The editor in a browser, with nodes as on a machine with two GPUs."""

    def with_gpus(route):
        response = route.fetch()
        described = response.json()
        for name in NODES:
            described[name]["input"]["optional"]["devices"][1].update(options=OPTIONS, device_names=NAMES)
        route.fulfill(response=response, json=described)

    page = browser.new_page()
    page.route("**/object_info", with_gpus)
    page.set_default_timeout(1000 * patience(20))
    open_editor(page, server)
    yield page
    page.close()


def on_a_node(devices):
    workflow = json.loads((REPOSITORY / "workflows" / "Decode a Saved Latent.json").read_text(encoding="utf-8"))
    loader = next(node for node in workflow["nodes"] if node["type"] == NODES[0])
    loader["widgets_values"][1] = devices
    return workflow


def promoted(devices):
    workflow = json.loads((REPOSITORY / "subgraphs" / "Decode (Wan VAE Parallel).json").read_text(encoding="utf-8"))
    workflow["nodes"][0]["widgets_values"][1] = devices
    return workflow


def promoted_twice(devices):
    """The blueprint's node in a subgraph with the same inputs and outputs."""
    workflow = promoted(devices)
    (place,), (inner,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    outer = copy.deepcopy(inner) | {"id": "00000000-0000-4000-8000-000000000000", "name": "Around it"}
    within = copy.deepcopy(place) | {"id": 1}
    within["widgets_values"][1] = "auto"
    ends = [(-10, slot, 1, slot, entry) for slot, entry in enumerate(within["inputs"])]
    ends += [(1, slot, -20, slot, entry) for slot, entry in enumerate(within["outputs"])]
    outer["links"] = []
    for number, (origin, origin_slot, target, target_slot, entry) in enumerate(ends, 1):
        if target == 1:
            entry["link"] = number
            outer["inputs"][origin_slot]["linkIds"] = [number]
        else:
            entry["links"] = [number]
            outer["outputs"][target_slot]["linkIds"] = [number]
        outer["links"].append(
            {"id": number, "origin_id": origin, "origin_slot": origin_slot, "target_id": target}
            | {"target_slot": target_slot, "type": entry["type"]}
        )
    outer["nodes"] = [within]
    place["type"] = outer["id"]
    workflow["definitions"]["subgraphs"].append(outer)
    return workflow


def rows():
    """What a workflow says, and where it says it. A quick run has each of these; a slow run, all together."""
    once = {"auto": on_a_node, "cuda:1": promoted, "CUDA:0": on_a_node}
    for devices in ("auto", "cuda:1", "cuda:0,cuda:3", "CUDA:0"):
        for where in (on_a_node, promoted, promoted_twice):
            shown = once.get(devices, where) is where
            name = f"{devices}-{where.__name__}"
            yield pytest.param(devices, where, id=name, marks=[] if shown else [pytest.mark.slow])


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize(("devices", "where"), list(rows()))
def test_the_list_names_gpus_and_keeps_what_a_workflow_says(editor, devices, where, renderer):
    draw_by(editor, renderer)
    load_workflow(editor, where(devices))
    # What the list lacks is added to it: the editor marks as wrong what it does not find there.
    offered = OPTIONS if devices in OPTIONS else [*OPTIONS, devices]
    expected = {"value": devices, "offered": offered, "labels": LABELS + offered[len(LABELS) :]}
    assert editor.evaluate(WIDGETS) == [expected]
    # The lists read anew, and a copy.
    editor.evaluate("async () => { await app.refreshComboInNodes(); }")
    assert editor.evaluate(WIDGETS) == [expected]
    editor.evaluate("""() => {
        const has = (node) => node.widgets?.some((one) => one.name === "devices");
        app.canvas.copyToClipboard(app.graph._nodes.filter(has));
        app.canvas.pasteFromClipboard();
    }""")
    assert editor.evaluate(WIDGETS) == [expected, expected]
    prompt = editor.evaluate("async () => (await app.graphToPrompt()).output")
    sent = [node["inputs"]["devices"] for node in prompt.values() if node["class_type"] == NODES[0]]
    assert sent == [devices, devices]
    if renderer == "Nodes 2.0":
        label = f"{devices} ({NAMES[devices]})" if devices in NAMES else devices
        # Frontends before 1.36 show values alone there.
        editor.get_by_text(label, exact=True).or_(editor.get_by_text(devices, exact=True)).first.wait_for()
        assert editor.locator("[aria-invalid=true], .p-invalid").filter(has_text=devices).count() == 0
