"""Pictures of the pack in ComfyUI's editor, for the documents and the nodes' help pages.

    python -m tools.screenshots [NAME ...]

writes ``docs/NAME.png`` and ``web/docs/images/NODE.png``. Needs what the tests of the browser need
(``tests/comfyui/editor.py``): a ComfyUI with its frontend and its templates, Playwright, Chromium.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from tests.comfyui.editor import chromium, draw_by, find_frontend, load_workflow, open_editor
from tests.comfyui.server import Server, find_comfyui
from wan_vae_parallel import __version__, demo_latents, save_demo_checkpoint
from wan_vae_parallel.cli import main as command
from wan_vae_parallel.files.latents import save_latents
from wan_vae_parallel.workflows import make_parallel

from .graphs import Graph

_ROOT = Path(__file__).resolve().parents[1]
_FILES = ("wan_2.1_vae", "wan_alpha_2.1_vae_rgb_channel", "wan_alpha_2.1_vae_alpha_channel")
_TITLE = 30
_OFFICIAL = "video_wan2_2_14B_t2v"


class Editor:
    """A page with the editor."""

    def __init__(self, page: Page, server: Server, comfyui: Path, python: Path) -> None:
        self.page, self.server, self.comfyui, self.python = page, server, comfyui, python

    def open(self, workflow: dict[str, Any], *, nodes2: bool = False) -> None:
        """Opens a workflow with nothing else in sight."""
        open_editor(self.page, self.server, **{"Comfy.Graph.CanvasInfo": False})
        self.page.wait_for_timeout(1500)
        draw_by(self.page, "Nodes 2.0" if nodes2 else "old renderer")
        load_workflow(self.page, workflow)
        self.page.wait_for_timeout(1500)

    def run(self, node: int) -> None:
        """Runs the workflow until a node has its output or any fails."""
        self.page.evaluate("""() => {
            window.failed = false;
            app.api.addEventListener('execution_error', () => window.failed = true);
        }""")
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function("node => app.nodeOutputs[node] || window.failed", arg=str(node), timeout=180_000)
        self.page.wait_for_timeout(2500)

    def graph(self, types: tuple[str, ...] = (), *, scale: float = 1.0, margin: int = 24) -> Image.Image:
        """The part of the graph that nodes of these types take, or that all do but notes."""
        self.page.evaluate("app.extensionManager.focusMode || app.extensionManager.toggleFocusMode()")
        self.page.evaluate("app.canvas.deselectAll?.()")
        box = self.page.evaluate(
            """([types, scale, title]) => {
                const nodes = app.canvas.graph._nodes.filter(
                    node => types.length ? types.includes(node.type) : node.type !== 'MarkdownNote');
                const left = Math.min(...nodes.map(node => node.pos[0]));
                const top = Math.min(...nodes.map(node => node.pos[1])) - title;
                const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0]));
                const bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1]));
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset = [70 / scale - left, 90 / scale - top];
                app.canvas.setDirty(true, true);
                return [(right - left) * scale, (bottom - top) * scale];
            }""",
            [list(types), scale, _TITLE],
        )
        self.page.wait_for_timeout(1200)
        area = {"x": 70 - margin, "y": 90 - margin, "width": box[0] + 2 * margin, "height": box[1] + 2 * margin}
        return self.shot(clip=area)

    def shot(self, **options: Any) -> Image.Image:
        """The page, or a part."""
        return Image.open(io.BytesIO(self.page.screenshot(**options)))


def _workflow(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((_ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def node_help(editor: Editor) -> Image.Image:
    """A node's help page, beside the node."""
    editor.open(_workflow("Decode a Saved Latent"), nodes2=True)
    editor.page.evaluate("app.canvas.selectNode(app.graph._nodes.find(n => n.type === 'WanVAEParallelDecode'))")
    editor.page.get_by_test_id("info-button").click()
    editor.page.wait_for_timeout(2000)
    return editor.shot(clip={"x": 640, "y": 40, "width": 960, "height": 760})


def template_browser(editor: Editor) -> Image.Image:
    """ComfyUI's template browser with the pack's workflows."""
    editor.open(_workflow("Decode a Saved Latent"))
    editor.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = editor.page.get_by_role("dialog").first
    dialog.get_by_text("Wan VAE Parallel", exact=True).first.click()
    editor.page.wait_for_timeout(3000)
    return editor.shot(clip={"x": 100, "y": 90, "width": 1400, "height": 820})


def decoded_nodes2(editor: Editor) -> Image.Image:
    """A graph after a decode, in Nodes 2.0."""
    editor.open(_workflow("Decode a Saved Latent"), nodes2=True)
    editor.run(5)
    return editor.graph(scale=0.7)


def decoded_old_renderer(editor: Editor) -> Image.Image:
    """The same in the old renderer."""
    editor.open(_workflow("Decode a Saved Latent"))
    # Else nothing is decoded again, and nothing is said of it.
    editor.page.evaluate(
        """() => fetch('/free', { method: 'POST', headers: { 'Content-Type': 'application/json' },
                                  body: JSON.stringify({ unload_models: true, free_memory: true }) })"""
    )
    editor.page.wait_for_timeout(1500)
    editor.run(5)
    return editor.graph(scale=0.9)


def error_panel(editor: Editor) -> Image.Image:
    """What is said of a latent of another model."""
    workflow = _workflow("Decode a Saved Latent")
    loader = next(node for node in workflow["nodes"] if node["type"] == "WanVAEParallelLoader")
    loader["widgets_values"][0] = "wan2.2_vae.safetensors"
    editor.open(workflow, nodes2=True)
    editor.run(5)
    editor.page.get_by_test_id("error-overlay-see-errors").click()
    editor.page.wait_for_timeout(1500)
    # The message stands in the midst of a log, with names of folders in it.
    editor.page.evaluate(
        """folders => {
        const lines = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (lines.nextNode()) {
            for (const folder of folders)
                if (lines.currentNode.data.includes(folder))
                    lines.currentNode.data = lines.currentNode.data.replaceAll(folder, 'ComfyUI');
            const found = lines.currentNode.data.indexOf('Exception Message');
            if (found < 0 || !lines.currentNode.parentElement.checkVisibility()) continue;
            const range = document.createRange();
            range.setStart(lines.currentNode, found);
            range.setEnd(lines.currentNode, found + 1);
            let part = lines.currentNode.parentElement;
            while (part && part.scrollHeight <= part.clientHeight) part = part.parentElement;
            const log = part;
            log.scrollTop += range.getBoundingClientRect().top - log.getBoundingClientRect().top - 12;
            return;
        }
    }""",
        [str(editor.server.folder), str(editor.comfyui)],
    )
    editor.page.wait_for_timeout(500)
    return editor.shot(clip={"x": 640, "y": 40, "width": 960, "height": 860})


def apply_in_subgraph(editor: Editor) -> Image.Image:
    """Apply in an official template whose loader is inside of a subgraph, where the command line has put it."""
    code = "import comfyui_workflow_templates_json as package; print(list(package.__path__)[0])"
    found = subprocess.run([str(editor.python), "-c", code], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip()) / "templates" / f"{_OFFICIAL}.json"
    workflow, _ = make_parallel(json.loads(path.read_text(encoding="utf-8")))
    editor.open(workflow)
    editor.page.evaluate("""() => {
        const place = app.graph._nodes.find(node => node.subgraph?._nodes.some(n => n.type === 'WanVAEParallelApply'));
        app.canvas.setGraph(place.subgraph);
    }""")
    editor.page.wait_for_timeout(1500)
    return editor.graph(("CLIPLoader", "VAELoader", "WanVAEParallelApply"), margin=50)


def _help_picture(name: str, *types: str) -> Callable[[Editor], Image.Image]:
    def take(editor: Editor) -> Image.Image:
        editor.open(_workflow(name))
        # Videos on nodes make them taller.
        editor.page.wait_for_timeout(2500)
        return editor.graph(types, scale=0.8)

    return take


def decode_to_video(editor: Editor) -> Image.Image:
    """Decode to Video with the video that it made."""
    editor.open(_workflow("Decode a Saved Latent to Video"))
    editor.run(3)
    return editor.graph(scale=0.8)


def _graph(editor: Editor) -> Graph:
    return Graph(editor.server.get("/object_info"), {}, ("0.8.0", __version__))


def apply(editor: Editor) -> Image.Image:
    """Apply between a loader and VAE Decode."""
    graph = _graph(editor)
    samples = graph.node("LoadLatent", (400, 0), title="Load latent", latent="demo.latent")
    vae = graph.node("VAELoader", (0, 140), vae_name=f"{_FILES[0]}.safetensors")
    vae = graph.node("WanVAEParallelApply", (400, 140), vae=vae)
    graph.node("VAEDecode", (800, 0), samples=samples, vae=vae)
    editor.open(graph.editor("apply"))
    return editor.graph(scale=0.8)


def decode_rgba(editor: Editor) -> Image.Image:
    """Wan-Alpha's two VAEs at the node that takes both."""
    graph = _graph(editor)
    samples = graph.node("LoadLatent", (0, 0), title="Load latent", latent="demo.latent")
    rgb = graph.node("WanVAEParallelLoader", (0, 140), vae_name=f"{_FILES[1]}.safetensors")
    alpha = graph.node("WanVAEParallelLoader", (0, 360), vae_name=f"{_FILES[2]}.safetensors")
    frames = graph.node("WanVAEParallelDecodeRGBA", (400, 0), samples=samples, vae_rgb=rgb, vae_alpha=alpha)
    graph.node("SaveAnimatedWEBP", (800, 0), title="Save animated WEBP", images=frames, fps=16.0)
    editor.open(graph.editor("rgba"))
    return editor.graph(scale=0.8)


# Workflows and the nodes of them that are shown: few, for help pages are narrow.
_DECODE = ("Decode a Saved Latent", "LoadLatent", "WanVAEParallelLoader", "WanVAEParallelDecode")
_ENCODE = ("Encode a Video", "GetVideoComponents", "WanVAEParallelLoader", "WanVAEParallelEncode")
_LOAD = ("Encode a Video File to Latent", "WanVAEParallelLoader", "WanVAEParallelLoadVideoToLatent")

# By the files that they go to.
PICTURES: dict[str, Callable[[Editor], Image.Image]] = {
    "docs/template_browser.png": template_browser,
    "docs/decoded_nodes2.png": decoded_nodes2,
    "docs/decoded_old_renderer.png": decoded_old_renderer,
    "docs/error_panel.png": error_panel,
    "docs/apply_in_subgraph.png": apply_in_subgraph,
    "web/docs/images/WanVAEParallelLoader.png": _help_picture(*_DECODE),
    "web/docs/images/WanVAEParallelApply.png": apply,
    "web/docs/images/WanVAEParallelDecode.png": _help_picture(*_DECODE),
    "web/docs/images/WanVAEParallelDecodeRGBA.png": decode_rgba,
    "web/docs/images/WanVAEParallelEncode.png": _help_picture(*_ENCODE),
    "web/docs/images/WanVAEParallelDecodeToVideo.png": decode_to_video,
    "web/docs/images/WanVAEParallelLoadVideoToLatent.png": _help_picture(*_LOAD),
    # The last, for it shows one of those above.
    "docs/node_help.png": node_help,
}


def _save(picture: Image.Image, path: Path) -> None:
    """In as many colours as a palette has, which suits an editor's flat areas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _files(server: Server) -> None:
    """Demo files, under the names that the workflows load."""
    vaes = server.folder / "models" / "vae"
    described = save_demo_checkpoint(vaes / "demo_vae.safetensors", "wan2.1", 8)
    for name in _FILES:
        shutil.copy(vaes / "demo_vae.safetensors", vaes / f"{name}.safetensors")
    save_demo_checkpoint(vaes / "wan2.2_vae.safetensors", "wan2.2", 16)
    save_latents(server.input / "demo.latent", demo_latents(described, frames=5, rows=24, columns=40))
    options = ["--vae", str(vaes / "demo_vae.safetensors"), "-o", str(server.input / "demo.mp4"), "--devices", "cpu"]
    command(["decode", str(server.input / "demo.latent"), *options])


def main(*names: str) -> None:
    """Takes all pictures, or those whose names hold one of these words."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH and COMFYUI_PYTHON")
    frontend = find_frontend(comfyui[1])
    if frontend is None:
        raise SystemExit(f"{comfyui[1]} has no comfyui_frontend_package")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        server = Server(*comfyui, Path(folder), "--cpu", "--front-end-root", frontend[0])
        try:
            _files(server)
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            editor = Editor(page, server, *comfyui)
            for name, take in PICTURES.items():
                if not names or any(word in name for word in names):
                    _save(take(editor), _ROOT / name)
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
