"""Help pages, where ComfyUI's editor looks for them, tell of every input and output."""

import re
import urllib.request

import pytest


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_every_node_has_help_that_names_all_its_inputs_and_outputs(server, page):
    ours = {name: info for name, info in server.get("/object_info").items() if name.startswith("WanVAEParallel")}
    assert len(ours) >= 7
    for name, info in ours.items():
        pack = info["python_module"].removeprefix("custom_nodes.")
        url = f"http://127.0.0.1:{server.port}/extensions/{pack}/docs/{page.format(name)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
        assert text.startswith("# ")
        told = {
            word
            for cell in re.findall(r"^\| ([^|]*`[^|]*)\|", text, flags=re.MULTILINE)
            for word in re.findall(r"`(\w+)`", cell)
        }
        inputs = {key for kind, keys in info["input"].items() if kind != "hidden" for key in keys}
        assert told == inputs | set(info["output_name"]), name
        # Pictures that a page shows are there.
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            urllib.request.urlopen(url.rpartition("/docs/")[0] + f"/docs/{picture}", timeout=30).close()
