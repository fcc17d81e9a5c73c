"""Which of ComfyUI's own workflows ``wan-vae-parallel workflow`` changes: writes ``docs/official_workflows.md`` anew.

    python -m tools.official

asks the templates and blueprints of the ComfyUI that the tests find (``tests/comfyui``).
"""

from __future__ import annotations

import collections
from pathlib import Path

from tests.comfyui.conftest import official_workflows
from tests.comfyui.server import find_comfyui
from wan_vae_parallel.workflows import make_parallel

_DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "official_workflows.md"


def main() -> None:
    """Writes the document."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH and COMFYUI_PYTHON")
    workflows = official_workflows(*comfyui)
    if workflows is None:
        raise SystemExit("the package comfyui_workflow_templates_json is not installed beside ComfyUI")
    rows, changed = [], collections.Counter[str]()
    for name, workflow in sorted(workflows.items()):
        kind, _, file = name.partition("/")
        _, outcomes = make_parallel(workflow)
        wan = [one for one in outcomes if "not a VAE of Wan" not in one.done]
        if not wan:
            continue
        told = collections.Counter(f"{one.done}{' in a subgraph' if one.graph else ''}" for one in wan)
        changed[kind] += any(one.changed for one in wan)
        rows.append(f"| {kind} | {file} | {'; '.join(f'{count} {what}' for what, count in sorted(told.items()))} |")
    version = (comfyui[0] / "comfyui_version.py").read_text().rpartition("=")[2].strip(' \n"')
    kinds = collections.Counter(row.split(" | ")[0].strip("| ") for row in rows)
    counts = ", ".join(f"{changed[kind]} of {count} {kind}" for kind, count in kinds.items())
    _DOCUMENT.write_text(
        f"""# ComfyUI's own workflows

What `wan-vae-parallel workflow IN.json -o OUT.json` makes of the workflows that come with ComfyUI {version}, of those
that load one of Wan's VAEs: {counts} are made parallel. For each, its loaders and
what became of them. Made by `python -m tools.official`.

| kind | workflow | loaders |
| --- | --- | --- |
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
