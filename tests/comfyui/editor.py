"""ComfyUI's editor in a real browser, for the tests of the page and the pictures of the documents.

Needs Playwright (``pip install playwright``) and a Chromium, Debian's or Playwright's own.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.comfyui.server import Server

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.Minimap.Visible": False}
RENDERERS = ("old renderer", "Nodes 2.0")


@contextlib.contextmanager
def chromium() -> Iterator:
    """A running browser, or Playwright's error."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    # Where Playwright keeps its own, which is below the cache folder, and tests have one of their own.
    kept = {"PLAYWRIGHT_BROWSERS_PATH": str(Path.home() / ".cache" / "ms-playwright")}
    with mock.patch.dict(os.environ, {**kept, **os.environ}):
        playwright = sync_playwright().start()
    try:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
    finally:
        playwright.stop()


def find_frontend(python: Path) -> tuple[str, tuple[int, ...]] | None:
    """The folder of the frontend that ComfyUI's Python has, and its version."""
    code = (
        "import importlib.metadata, importlib.resources, json\n"
        "name = 'comfyui_frontend_package'\n"
        "folder = importlib.resources.files(name) / 'static'\n"
        "print(json.dumps([str(folder), importlib.metadata.version(name)]))"
    )
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    folder, version = json.loads(found.stdout)
    return folder, tuple(int(part) for part in version.split(".")[:2])


def open_editor(page, server: Server, **settings) -> None:
    """Has ``page`` show the editor of ``server``, without greetings."""
    server.post("/settings", {**SETTINGS, **settings})
    page.goto(f"http://127.0.0.1:{server.port}/")
    # The workflow that it opens with: what is opened before that, that replaces.
    page.wait_for_function("window.app?.vueAppReady && app.graph && app.extensionManager?.workflow?.activeWorkflow")


def draw_by(page, renderer: str) -> None:
    """Chooses one of the editor's ways to draw nodes."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", renderer == "Nodes 2.0")


def load_workflow(page, workflow: dict) -> None:
    """Opens ``workflow``, as a dropped file is."""
    page.evaluate("workflow => app.loadGraphData(workflow, true, true)", workflow)
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(workflow["nodes"]))
