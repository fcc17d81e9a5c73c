"""What the registry of ComfyUI's packs gets: the facts of pyproject.toml, and what is packed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import wan_vae_parallel

if sys.version_info < (3, 11):
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)
import tomllib

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
RAW = "https://raw.githubusercontent.com/wan-vae-parallel/wan-vae-parallel/main/"


def test_one_version_everywhere_and_changes_begin_with_it():
    version = PROJECT["project"]["version"]
    assert wan_vae_parallel.__version__ == version
    headings = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == version
    assert headings == sorted(headings, key=lambda text: [int(part) for part in text.split(".")], reverse=True)


def named_packs(value):
    """Types of nodes and the packs that workflows say they are of."""
    if isinstance(value, dict):
        kind = value.get("type")
        pack = (value.get("properties") or {}).get("cnr_id") if isinstance(kind, str) else None
        if pack:
            yield kind, pack
        for inner in value.values():
            yield from named_packs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from named_packs(inner)


def test_workflows_call_our_nodes_pack_by_the_name_that_the_registry_has(tmp_path):
    name = PROJECT["project"]["name"]
    assert PROJECT["tool"]["comfy"]["PublisherId"] == name
    # What the shell's command writes, too.
    made = tmp_path / "made.json"
    loader = {"id": 1, "type": "VAELoader", "pos": [0, 0], "size": [300, 60], "mode": 0, "inputs": []}
    loader |= {"outputs": [{"name": "VAE", "type": "VAE", "links": [1]}], "widgets_values": ["wan_2.1_vae.safetensors"]}
    decode = {"id": 2, "type": "VAEDecode", "pos": [400, 0], "size": [200, 60], "mode": 0, "outputs": []}
    decode |= {"inputs": [{"name": "vae", "type": "VAE", "link": 1}]}
    plain = {"last_node_id": 2, "last_link_id": 1, "nodes": [loader, decode], "links": [[1, 1, 0, 2, 0, "VAE"]]}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    command = [sys.executable, "-m", "wan_vae_parallel", "workflow", tmp_path / "plain.json", "-o", made]
    subprocess.run(command, check=True, capture_output=True)
    assert list(named_packs(json.loads(made.read_text()))) == [("WanVAEParallelApply", name)]
    for path in (REPOSITORY / "workflows").glob("*.json"):
        for kind, pack in named_packs(json.loads(path.read_text())):
            assert (pack == name) == kind.startswith("WanVAEParallel"), path.name


@pytest.mark.parametrize(("key", "most", "shape"), [("Icon", 400, 1), ("Banner", 1600, 21 / 9)])
def test_icon_and_banner_are_there_and_of_the_registrys_sizes(key, most, shape):
    address = PROJECT["tool"]["comfy"][key]
    assert address.startswith(RAW)
    file = REPOSITORY / address.removeprefix(RAW)
    with Image.open(file) as picture:
        assert picture.width <= most
        assert picture.width / picture.height == pytest.approx(shape, abs=0.01)
    assert file.stat().st_size < 60_000


# What is at the top of an archive that users get.
PACKED = {"__init__.py", "nodes", "wan_vae_parallel", "web", "locales", "workflows", "subgraphs"}
PACKED |= {"pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}


def test_what_users_do_not_need_is_not_packed():
    # As comfy-cli packs: what git has, without what .comfyignore says, whose patterns are git's.
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone, so that there is nothing to pack")

    def listed(*options):
        command = ["git", "ls-files", *options]
        return set(
            subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")
        )

    packed = listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore") - {""}
    assert {name.split("/")[0] for name in packed} == PACKED


def comfy_cli():
    beside = Path(sys.executable).with_name("comfy")
    found = os.environ.get("COMFY_CLI") or shutil.which("comfy") or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip("no comfy-cli: install it, or name its command comfy in COMFY_CLI")
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone, so that there is nothing to pack")
    return found


def test_comfy_cli_validates_the_pack_and_packs_what_users_need(tmp_path):
    program = comfy_cli()
    clone, home = tmp_path / "pack", tmp_path / "home"
    home.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(lambda name: (REPOSITORY / name).is_file(), listed.splitlines()):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, clone / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=clone, check=True, capture_output=True)
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "COMFY_NO_TRACKING": "1"}

    def comfy(*words):
        command = [program, "--skip-prompt", "node", *words]
        return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)

    validated = comfy("validate")
    said = validated.stdout + validated.stderr
    assert validated.returncode == 0, said
    assert "All validation checks passed" in said, said
    assert "Warning" not in said, said
    packed = comfy("pack")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (archive,) = clone.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        size = sum(entry.compress_size for entry in file.infolist())
    assert {name.split("/")[0] for name in names} == PACKED
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".latent"))]
    assert size < 3e6
    # Whatever a module of the pack imports of the pack is in it.
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names}
    for name in names:
        if name.endswith(".py") and name.startswith("wan_vae_parallel/"):
            parts = name.removesuffix(".py").split("/")
            for statement in ast.walk(ast.parse((clone / name).read_text())):
                if isinstance(statement, ast.ImportFrom) and statement.level:
                    base = ".".join([*parts[: len(parts) - statement.level], *filter(None, [statement.module])])
                    assert base in modules, f"{name} imports {base}"
