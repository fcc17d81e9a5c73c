"""The list of devices in the editor's page, in both of its ways to draw nodes; needs Playwright and Chromium."""

import json
import shutil
import subprocess

import pytest

from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import REPOSITORY, Server
from tests.processes import patience

# As a machine with two GPUs describes its nodes.
OPTIONS = ["auto", "cuda:0", "cuda:1", "all but the first", "cpu"]
NAMES = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA RTX 4090"}
NODES = ("WanVAEParallelLoader", "WanVAEParallelApply")
WIDGETS = """() => window.app.graph._nodes.filter((node) => node.type.startsWith("WanVAEParallel")).flatMap((node) =>
  node.widgets.filter((one) => one.name === "devices").map((one) => ({
    value: one.value, offered: one.options.values, labels: one.options.values.map(one.options.getOptionLabel) })))"""


@pytest.fixture(scope="module")
def editor(comfyui, tmp_path_factory):
    """The editor in a browser, with nodes as on a machine with two GPUs; a function that opens a workflow."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("there is no chromium or google-chrome on the PATH")
    find = "import comfyui_frontend_package as f, pathlib; print(pathlib.Path(f.__file__).parent / 'static')"
    static = subprocess.run([comfyui[1], "-c", find], capture_output=True, text=True).stdout.strip()
    if not static:
        pytest.skip(f"{comfyui[1]} has no comfyui_frontend_package")
    folder = tmp_path_factory.mktemp("editor")
    (folder / "models" / "vae").mkdir(parents=True)
    random_checkpoint(folder / "models" / "vae" / "wan21.safetensors", width=8)
    server = Server(*comfyui, folder, "--cpu", "--front-end-root", static)

    def with_gpus(route):
        response = route.fetch()
        described = response.json()
        for name in NODES:
            described[name]["input"]["optional"]["devices"][1].update(options=OPTIONS, device_names=NAMES)
        route.fulfill(response=response, json=described)

    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("**/object_info", with_gpus)
        page.set_default_timeout(1000 * patience(20))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_function(f"() => window.app?.canvas && window.LiteGraph?.registered_node_types?.{NODES[0]}")

        def open_workflow(workflow, *, nodes_2):
            page.evaluate("on => window.app.ui.settings.setSettingValue('Comfy.VueNodes.Enabled', on)", nodes_2)
            page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
            return page

        yield open_workflow
        browser.close()
    server.stop()


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])
@pytest.mark.parametrize("devices", ["auto", "cuda:1", "cuda:0,cuda:3", "CUDA:0"])
def test_the_list_names_gpus_and_keeps_what_a_workflow_says(editor, devices, nodes_2):
    workflow = json.loads((REPOSITORY / "workflows" / "Decode a Saved Latent.json").read_text())
    loader = next(node for node in workflow["nodes"] if node["type"] == NODES[0])
    loader["widgets_values"][1] = devices
    page = editor(workflow, nodes_2=nodes_2)
    (widget,) = page.evaluate(WIDGETS)
    offered = OPTIONS if devices in OPTIONS else [*OPTIONS, devices]
    assert widget["value"] == devices
    assert widget["offered"] == offered  # so that it is not marked as wrong
    assert widget["labels"][:5] == ["auto", "cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA RTX 4090)", *OPTIONS[3:]]
    assert widget["labels"][5:] == offered[5:]
    # The lists read anew, and a copy.
    page.evaluate("async () => { await window.app.refreshComboInNodes(); }")
    assert page.evaluate(WIDGETS)[0]["offered"] == offered
    copied = "type => window.app.graph._nodes.find((node) => node.type === type).clone().widgets"
    (options,) = page.evaluate(
        f"type => ({copied})(type).filter((one) => one.name === 'devices').map((one) => one.options.values)", NODES[0]
    )
    assert options == offered
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    (sent,) = [node["inputs"]["devices"] for node in prompt.values() if node["class_type"] == NODES[0]]
    assert sent == devices
    if nodes_2:
        label = f"{devices} ({NAMES[devices]})" if devices in NAMES else devices
        # Frontends before 1.36 show values alone there.
        page.get_by_text(label, exact=True).or_(page.get_by_text(devices, exact=True)).first.wait_for()
