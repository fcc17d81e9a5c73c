import contextlib
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.editor import chromium, find_frontend
from tests.comfyui.server import REPOSITORY, Server, find_comfyui
from wan_vae_parallel import save_demo_checkpoint


def pytest_collection_modifyitems(items):
    for item in items:
        if "comfyui" in item.path.parts:
            item.add_marker(pytest.mark.comfyui)


def random_checkpoint(path, *, family="wan2.1", width=16, seed=0):
    """Real shapes, encoder included, seeded random weights that neither saturate nor vanish."""
    save_demo_checkpoint(path, family, width)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("gamma"):
            tensors[key] = 1 + 0.1 * noise
        elif key.endswith("bias"):
            tensors[key] = 0.1 * noise
        else:
            tensors[key] = noise / tensor[0].numel() ** 0.5
    save_file(tensors, path)


@pytest.fixture(scope="session")
def comfyui():
    found = find_comfyui()
    if found is None:
        pytest.skip(
            "no ComfyUI found: set COMFYUI_PATH and COMFYUI_PYTHON, or put one at ~/comfy/ComfyUI and ~/comfy/venv"
        )
    return found


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """One for all tests that it fits, since ComfyUI takes long to start: with the editor, if that is installed."""
    folder = tmp_path_factory.mktemp("comfyui")
    models = folder / "models" / "vae"
    models.mkdir(parents=True)
    random_checkpoint(models / "wan21.safetensors")
    random_checkpoint(models / "wan22.safetensors", family="wan2.2")
    packs = {"bench": REPOSITORY / "tests" / "bench" / "comfyui" / "pack"}
    found = find_frontend(comfyui[1])
    editor = ["--front-end-root", found[0]] if found else []
    running = Server(*comfyui, folder, "--cpu", *editor, packs=packs)
    yield running
    running.stop()


@pytest.fixture
def send(server):
    """Puts a tensor where ProbeLoadTensor finds it; returns the node."""

    def send(name, tensor):
        save_file({"tensor": tensor.contiguous()}, server.input / name)
        return {"class_type": "ProbeLoadTensor", "inputs": {"name": name}}

    return send


@pytest.fixture
def received(server):
    """Reads what ProbeSaveTensor wrote."""

    def received(name):
        return load_file(server.output / name)["tensor"]

    return received


@pytest.fixture(scope="module")  # not longer: other tests' event loops would be within Playwright's
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(chromium())
        except api.Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"no Chromium: apt install chromium, or playwright install chromium ({reason})")
        yield running


@pytest.fixture(scope="session")
def frontend(comfyui):
    """The frontend's folder and its version."""
    found = find_frontend(comfyui[1])
    if found is None:
        pytest.skip("the package comfyui_frontend_package is not installed beside ComfyUI")
    return found


def official_workflows(path, python):
    """ComfyUI's own workflows of the editor's format, by folder and name; None without their package."""
    code = "import comfyui_workflow_templates_json as package; print(list(package.__path__)[0])"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    folders = [type(path)(found.stdout.strip()) / "templates", path / "blueprints"]
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    workflows = {f"{file.parent.name}/{file.stem}": json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: workflow for name, workflow in workflows.items() if "nodes" in workflow}


@pytest.fixture(scope="session")
def official(comfyui):
    """`official_workflows` of the ComfyUI that the tests found."""
    workflows = official_workflows(*comfyui)
    if workflows is None:
        pytest.skip("the package comfyui_workflow_templates_json is not installed beside ComfyUI")
    return workflows
