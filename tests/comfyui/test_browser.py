"""The pack in the editor itself: a real browser, the frontend that ComfyUI runs with, and its server."""

import json
import shutil

import pytest
from PIL import Image

from tests.comfyui.editor import RENDERERS, draw_by, load_workflow, open_editor
from tests.comfyui.editor_graphs import TITLE
from tests.comfyui.server import REPOSITORY
from tests.processes import patience
from tools.templates import TEMPLATES
from wan_vae_parallel import demo_latents, save_demo_checkpoint
from wan_vae_parallel.files.latents import save_latents

PACK = "wan-vae-parallel"
# The first frontend with all that is clicked here; older ones are only asked to open workflows.
NEW_ENOUGH = (1, 45)
SUBGRAPHS = sorted(path.stem for path in (REPOSITORY / "subgraphs").glob("*.json"))
# What people type, and the node that they should be shown among the first results.
TYPED = [
    ("wan vae", "Load Wan VAE (Parallel)"),
    ("wan decode", "Wan VAE Decode (Parallel)"),
    ("vae decode", "Wan VAE Decode (Parallel)"),
    ("wan encode", "Wan VAE Encode (Parallel)"),
    ("load wan vae", "Load Wan VAE (Parallel)"),
    ("multi gpu vae", "Load Wan VAE (Parallel)"),
    ("parallel vae", "Apply Wan VAE Parallel"),
    ("qwen image vae", "Load Wan VAE (Parallel)"),
    ("decode to video", "Wan VAE Decode to Video (Parallel)"),
    ("video to latent", "Load Video to Latent (Parallel)"),
    ("wan alpha", "Wan VAE Decode RGBA (Parallel)"),
]
FIRST = 6


@pytest.fixture(scope="module")
def editor(browser, frontend, comfyui, server):  # noqa: ARG001 (the server has the frontend)
    """A page with the editor, of a server that has the demo's files."""
    described = save_demo_checkpoint(server.folder / "models" / "vae" / "demo_vae.safetensors", "wan2.1", 8)
    save_latents(server.input / "demo.latent", demo_latents(described, frames=4, rows=12, columns=20))
    shutil.copy(comfyui[0] / "input" / "example.png", server.input)
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(patience(15) * 1000)
    open_editor(page, server)
    yield page
    page.close()


@pytest.fixture
def new_editor(editor, frontend):
    if frontend[1] < NEW_ENOUGH:
        pytest.skip(f"frontend {frontend[1]} looks different: tested from {NEW_ENOUGH} on")
    yield editor
    # Whatever dialog a test left.
    editor.keyboard.press("Escape")
    editor.keyboard.press("Escape")


def workflow(name):
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def settled(page, measure):
    """What ``measure`` gives once it stays the same."""
    before = None
    for _ in range(50):
        page.wait_for_timeout(150)
        now = page.evaluate(measure)
        if now == before and now:
            return now
        before = now
    raise AssertionError("the nodes' sizes don't settle")


@pytest.fixture(params=RENDERERS)
def renderer(editor, request):
    draw_by(editor, request.param)
    yield request.param
    draw_by(editor, "old renderer")


# Titles with left, top, right and bottom: of the old renderer from the graph, of Nodes 2.0 as drawn.
BOXES = {
    "old renderer": f"""() => app.graph._nodes.map(node => [node.title, node.pos[0], node.pos[1] - {TITLE},
        node.pos[0] + node.size[0], node.pos[1] + node.size[1]])""",
    "Nodes 2.0": """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
        const box = element.getBoundingClientRect();
        return [app.graph.getNodeById(element.dataset.nodeId)?.title, box.left, box.top, box.right, box.bottom];
    })""",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_opens_with_its_values_and_without_overlaps(editor, renderer, name):
    load_workflow(editor, workflow(name))
    unknown = "() => app.graph._nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))"
    assert editor.evaluate(unknown) == []
    prompt = editor.evaluate("async () => (await app.graphToPrompt()).output")
    api = json.loads((REPOSITORY / "workflows" / "api" / f"{TEMPLATES[name][0]}.json").read_text(encoding="utf-8"))
    assert set(prompt) == set(api)
    for key, node in api.items():
        kept = {name: prompt[key]["inputs"].get(name) for name in node["inputs"]}
        # Of a dynamic combo a part may be named for its whole.
        nested = {name: prompt[key]["inputs"].get(f"format.{name}") for name in kept if kept[name] is None}
        assert kept | nested == node["inputs"], node["class_type"]
    boxes = settled(editor, BOXES[renderer])
    named = "types => types.map(type => LiteGraph.registered_node_types[type].title)"
    nodes = workflow(name)["nodes"]
    by_type = editor.evaluate(named, [node["type"] for node in nodes])
    titles = [node.get("title", of_type) for node, of_type in zip(nodes, by_type, strict=True)]
    assert sorted(title for title, *_ in boxes) == sorted(titles)
    for index, (one, *a) in enumerate(boxes):
        for other, *b in boxes[index + 1 :]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (one, other)


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_what_is_set_on_a_subgraph_reaches_the_nodes_inside(new_editor, name):
    content = json.loads((REPOSITORY / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    load_workflow(new_editor, content)
    new_editor.wait_for_function("app.graph._nodes[0].subgraph")
    widgets = new_editor.evaluate("app.graph._nodes[0].widgets.map(widget => [widget.name, widget.value])")
    place = content["nodes"][0]
    names = [entry["name"] for entry in place["inputs"] if "widget" in entry]
    assert widgets == [list(pair) for pair in zip(names, place["widgets_values"], strict=True)]
    new_editor.evaluate("""() => {
        const chosen = {vae_name: 'demo_vae.safetensors', devices: 'cpu'};
        for (const widget of app.graph._nodes[0].widgets) if (widget.name in chosen) widget.value = chosen[widget.name];
    }""")
    prompt = new_editor.evaluate("async () => (await app.graphToPrompt()).output")
    loader, worker = sorted(prompt.values(), key=lambda node: node["class_type"] != "WanVAEParallelLoader")
    assert (loader["inputs"]["vae_name"], loader["inputs"]["devices"]) == ("demo_vae.safetensors", "cpu")
    assert isinstance(worker["inputs"]["vae"], list)
    for widget, value in widgets:
        assert widget in loader["inputs"] or worker["inputs"][widget] == value


def test_the_search_finds_the_subgraphs(new_editor):
    new_editor.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    new_editor.get_by_role("dialog").get_by_role("combobox").first.fill("wan vae parallel")
    for name in SUBGRAPHS:
        new_editor.get_by_test_id("result-item").filter(has_text=name).filter(has_text="Blueprint").first.wait_for()


def test_the_template_browser_shows_ours_with_pictures_and_opens_one(new_editor):
    new_editor.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = new_editor.get_by_role("dialog").first
    dialog.get_by_text("Wan VAE Parallel", exact=True).first.click()
    for name in TEMPLATES:
        dialog.get_by_text(name, exact=True).first.scroll_into_view_if_needed()
        # The picture of the smallest part of the dialog that has it and the name; it comes when it is scrolled to.
        new_editor.wait_for_function(
            """([name, size]) => {
                const names = [...document.querySelectorAll('[role=dialog] *')];
                let part = names.find(element => !element.children.length && element.textContent.trim() === name);
                while (part && !part.querySelector('img')) part = part.parentElement;
                part?.scrollIntoView({block: 'nearest'});
                return part?.querySelector('img').naturalWidth === size;
            }""",
            arg=[name, Image.open(REPOSITORY / "workflows" / f"{name}.jpg").width],
        )
    dialog.get_by_text("Encode a Video", exact=True).first.click()
    new_editor.wait_for_function("app.graph._nodes.some(node => node.type === 'WanVAEParallelEncode')")


def test_missing_models_are_listed_by_name(new_editor):
    name = "Wan 2.2 5B Text or Image to Video"
    load_workflow(new_editor, workflow(name))
    new_editor.get_by_test_id("error-overlay-see-errors").click()
    models = [model["name"] for node in workflow(name)["nodes"] for model in node["properties"].get("models", [])]
    assert len(models) == 3
    for model in models:
        new_editor.get_by_text(model).first.wait_for()


def test_a_decode_shows_progress_and_previews_and_its_video(new_editor):
    load_workflow(new_editor, workflow("Decode a Saved Latent"))
    new_editor.evaluate("""() => {
        window.seen = {progress: [], previews: 0, errors: []};
        app.api.addEventListener('progress', event => event.detail.node == 3 && seen.progress.push(event.detail.value));
        app.api.addEventListener('b_preview', () => seen.previews++);
        app.api.addEventListener('execution_error', event => seen.errors.push(event.detail.exception_message));
    }""")
    new_editor.get_by_test_id("queue-button").click()
    new_editor.wait_for_function("app.nodeOutputs['5'] || seen.errors.length", timeout=patience(120) * 1000)
    seen = new_editor.evaluate("seen")
    assert seen["errors"] == []
    assert len(seen["progress"]) >= 2
    assert seen["progress"] == sorted(seen["progress"])
    assert seen["previews"] >= 2
    (video,) = new_editor.evaluate("app.nodeOutputs['5'].images")
    assert video["filename"].endswith(".mp4")


def test_every_node_shows_its_help(new_editor):
    types = new_editor.evaluate(
        "Object.keys(LiteGraph.registered_node_types).filter(type => type.startsWith('WanVAEParallel'))"
    )
    assert len(types) >= 7
    for kind in types:
        title = new_editor.evaluate(
            """kind => {
                app.graph.clear();
                const node = LiteGraph.createNode(kind);
                app.graph.add(node);
                app.canvas.selectNode(node);
                return node.title;
            }""",
            kind,
        )
        if not new_editor.get_by_role("heading", level=1, name=title, exact=True).is_visible():
            new_editor.get_by_test_id("info-button").click()
        new_editor.get_by_role("heading", level=1, name=title, exact=True).wait_for()
        new_editor.get_by_role("heading", level=2, name="Inputs").first.wait_for()
        # Pictures of the page have come.
        new_editor.wait_for_function(
            f"""() => [...document.querySelectorAll('img')].filter(image => image.src.includes('/{PACK}/docs/')).every(
                image => image.complete && image.naturalWidth > 0)"""
        )


@pytest.mark.parametrize(("typed", "node"), TYPED)
def test_the_search_finds_nodes_by_what_people_type(new_editor, typed, node):
    new_editor.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    new_editor.get_by_role("dialog").get_by_role("combobox").first.fill(typed)
    new_editor.wait_for_function(
        """([node, first]) => [...document.querySelectorAll('[data-testid=result-item]')].slice(0, first).some(
            item => item.innerText.split('\\n')[0] === node)""",
        arg=[node, FIRST],
        timeout=patience(10) * 1000,
    )
