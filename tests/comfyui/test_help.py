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
        # The node in a graph is shown, by a path that the editor takes from the pack's docs in each language.
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert pictures == [f"images/{name}.png"], name
        with urllib.request.urlopen(url.rpartition("/docs/")[0] + f"/docs/{pictures[0]}", timeout=30) as response:
            picture = response.read()
        assert picture.startswith(b"\x89PNG"), name
        assert len(picture) < 200_000, name


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_and_tooltips_are_there_in_every_language_and_in_english_are_the_nodes_own(server, language):
    told = server.get("/i18n")[language]["nodeDefs"]
    ours = {name: info for name, info in server.get("/object_info").items() if name.startswith("WanVAEParallel")}
    assert {name for name in told if name.startswith("WanVAEParallel")} == set(ours)
    for name, info in ours.items():
        texts = told[name]
        inputs = {key: spec for kind, keys in info["input"].items() if kind != "hidden" for key, spec in keys.items()}
        assert set(texts["inputs"]) == set(inputs), name
        assert len(texts["outputs"]) == len(info["output_name"]), name
        entries = [texts, *texts["inputs"].values(), *texts["outputs"].values()]
        assert all(entry.get("name") or entry.get("display_name") for entry in entries), name
        assert all(entry.get("tooltip") or entry.get("description") for entry in entries), name
        if language == "en":
            assert (texts["display_name"], texts["description"]) == (info["display_name"], info["description"])
            assert {key: text["tooltip"] for key, text in texts["inputs"].items()} == {
                key: spec[1]["tooltip"] for key, spec in inputs.items()
            }
            assert [text["tooltip"] for text in texts["outputs"].values()] == info["output_tooltips"]
        else:
            assert all(ord(max(text["tooltip"])) > 0x2E80 for text in texts["inputs"].values()), name


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_packs_nodes_and_templates_stand_under_its_name(server, language):
    told = server.get("/i18n")[language]
    name = told["nodeCategories"]["Wan VAE Parallel"]
    (module,) = [module for module in server.get("/workflow_templates") if "wan" in module]
    assert told["templateWorkflows"]["category"][module] == name
    assert name == "Wan VAE Parallel" if language == "en" else ord(max(name)) > 0x2E80
