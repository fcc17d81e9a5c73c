"""Apply put behind loaders in workflows: small ones of each format; the official ones are in tests/comfyui."""

import copy
import json

import pytest

import wan_vae_parallel as wvp
from wan_vae_parallel.cli import main
from wan_vae_parallel.workflows import APPLY, make_parallel

WAN = "wan_2.1_vae.safetensors"


def loader(number, file=WAN, *, links=(), mode=0, pos=(0, 0), promoted=None):
    return {
        "id": number,
        "type": "VAELoader",
        "pos": list(pos),
        "size": [300, 60],
        "mode": mode,
        "inputs": [{"name": "vae_name", "type": "COMBO", "widget": {"name": "vae_name"}, "link": promoted}],
        "outputs": [{"name": "VAE", "type": "VAE", "links": list(links)}],
        "widgets_values": [file],
    }


def decode(number, link, *, kind="VAEDecode", mode=0, pos=(600, 0)):
    inputs = [{"name": "samples", "type": "LATENT", "link": None}, {"name": "vae", "type": "VAE", "link": link}]
    return {"id": number, "type": kind, "pos": list(pos), "size": [200, 60], "mode": mode, "inputs": inputs}


def editor(*nodes, links=(), **more):
    nodes, links = list(nodes), [list(link) for link in links]
    return {"last_node_id": 9, "last_link_id": 20, "nodes": nodes, "links": links, "version": 0.4, **more}


def nested(file=WAN, values=(), *, modes=(0,)):
    """A loader in a subgraph whose file is an input of that, and nodes that stand for it."""
    widget = {"name": "vae_name", "type": "COMBO", "widget": {"name": "vae_name"}, "link": None}
    graph = {
        "id": "sub",
        "name": "Inner",
        "state": {"lastNodeId": 40, "lastLinkId": 60},
        "inputs": [{"name": "vae_name", "linkIds": [7]}],
        "nodes": [loader(3, file, links=[8], promoted=7), decode(4, 8)],
        "links": [
            {"id": 7, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "COMBO"},
            {"id": 8, "origin_id": 3, "origin_slot": 0, "target_id": 4, "target_slot": 1, "type": "VAE"},
        ],
    }
    values = values or [[]] * len(modes)
    places = [
        {"id": 30 + i, "type": "sub", "mode": mode, "inputs": [widget], "widgets_values": list(value)}
        for i, (value, mode) in enumerate(zip(values, modes, strict=False))
    ]
    return editor(*places, definitions={"subgraphs": [graph]})


def test_every_taker_gets_the_parallel_vae_and_nothing_else_changes():
    video = editor(
        loader(1, links=[5, 6]), decode(2, 5), decode(3, 6), links=[[5, 1, 0, 2, 1, "VAE"], [6, 1, 0, 3, 1, "VAE"]]
    )
    before = copy.deepcopy(video)
    made, outcomes = make_parallel(video, devices="cuda:0,cuda:1", dtype="float32")
    assert video == before
    assert [(one.node, one.file, one.done) for one in outcomes] == [("1", WAN, "made parallel")]
    *others, apply = made["nodes"]
    assert others == [loader(1, links=[21]), decode(2, 5), decode(3, 6)]
    assert (apply["id"], apply["type"], apply["outputs"][0]["links"]) == (10, APPLY, [5, 6])
    assert apply["widgets_values"] == ["cuda:0,cuda:1", "float32", 0, "auto"]
    assert made["links"] == [[5, 10, 0, 2, 1, "VAE"], [6, 10, 0, 3, 1, "VAE"], [21, 1, 0, 10, 0, "VAE"]]
    assert (made["last_node_id"], made["last_link_id"]) == (10, 21)
    again, outcomes = make_parallel(made)
    assert again == made
    assert [one.done for one in outcomes] == ["left: an Apply follows it already"]


@pytest.mark.parametrize(
    "file",
    [
        "ae.safetensors",
        "hunyuan_video_vae_bf16.safetensors",
        "taew2_1.safetensors",
        "lightvae_pro_wan2_1.safetensors",
    ],
)
def test_other_vaes_stay(file):
    video = editor(loader(1, file, links=[5]), decode(2, 5), links=[[5, 1, 0, 2, 1, "VAE"]])
    made, outcomes = make_parallel(video)
    assert made == video
    assert "not a VAE of Wan's family" in outcomes[0].done
    made, outcomes = make_parallel(video, names=[file[:3].upper() + "*"])
    assert outcomes[0].changed


# Names as they are published; those of the family that core loads are beside them.
@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("qwen_image_2.1_vae_bf16.safetensors", True),
        ("Wan2.1_VAE_upscale2x_imageonly_real_v1.safetensors", True),
        ("wan/Wan2_2_VAE_pruned_50.safetensors", True),
        ("lightvaew2_2.safetensors", True),
        ("qwen_image_vae.safetensors", False),
        ("qwen_image_layered_vae.safetensors", False),
        ("wan_alpha_2.1_vae_rgb_channel.safetensors", False),
        ("wan2.2_vae.safetensors", False),
        ("Wan2_1_VAE_bf16.safetensors", False),
        ("lightvaew2_1.safetensors", False),
    ],
)
def test_what_core_can_not_load_is_left_and_told(file, left):
    video = editor(loader(1, file, links=[5]), decode(2, 5), links=[[5, 1, 0, 2, 1, "VAE"]])
    prompt = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": file}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["1", 0]}},
    }
    for workflow in (video, prompt, nested(WAN, [[file]])):
        made, (outcome,) = make_parallel(workflow)
        assert outcome.changed != left
        assert (made == workflow) == left
        if left:
            assert outcome.done == (
                "left: ComfyUI's own loader can't load it; take Load Wan VAE (Parallel) in its place"
            )
        # Who names it knows of a ComfyUI that can.
        assert make_parallel(workflow, names=["*"])[1][0].changed


@pytest.mark.parametrize("mode", [2, 4])
def test_muted_and_bypassed_loaders_stay(mode):
    video = editor(loader(1, links=[5], mode=mode), decode(2, 5, mode=mode), links=[[5, 1, 0, 2, 1, "VAE"]])
    assert make_parallel(video)[0] == video
    assert make_parallel(nested(modes=(mode, mode)))[0] == nested(modes=(mode, mode))
    assert make_parallel(nested(modes=(0, mode)))[1][0].changed


def test_a_loader_that_nothing_follows_stays():
    video = editor(loader(1))
    made, outcomes = make_parallel(video)
    assert made == video
    assert outcomes[0].done == "left: nothing takes its VAE"


def test_in_a_subgraph():
    video = nested()
    made, outcomes = make_parallel(video)
    assert [(one.graph, one.file, one.changed) for one in outcomes] == [("Inner", WAN, True)]
    graph = made["definitions"]["subgraphs"][0]
    assert graph["nodes"][-1]["id"] == made["last_node_id"] == graph["state"]["lastNodeId"] == 41
    assert graph["links"][1]["origin_id"] == 41
    assert graph["links"][2] == {
        "id": 61, "origin_id": 3, "origin_slot": 0, "target_id": 41, "target_slot": 0, "type": "VAE",
    }  # fmt: skip
    assert graph["state"]["lastLinkId"] == made["last_link_id"] == 61


def test_the_file_is_what_the_subgraph_is_given():
    assert make_parallel(nested("ae.safetensors", [[WAN]]))[1][0].changed
    assert not make_parallel(nested(WAN, [["ae.safetensors"]]))[1][0].changed
    outcome = make_parallel(nested(WAN, [[WAN], ["ae.safetensors"]], modes=(0, 0)))[1][0]
    assert outcome.file == f"ae.safetensors, {WAN}"
    assert outcome.done == "left: its subgraph is used with other VAEs, too"


@pytest.mark.parametrize("posted", [False, True])
def test_the_api_s_format(posted):
    nodes = {
        "57:8": {"class_type": "VAELoader", "inputs": {"vae_name": WAN}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["57:8", 0]}},
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["3", 0]}},
    }
    made, outcomes = make_parallel({"prompt": nodes, "client_id": "me"} if posted else nodes)
    changed = made["prompt"] if posted else made
    assert [one.changed for one in outcomes] == [True, False]
    assert changed["2"]["inputs"] == {"samples": ["9", 0], "vae": ["58", 0]}
    assert changed["58"]["class_type"] == APPLY
    assert changed["58"]["inputs"] == {
        "vae": ["57:8", 0], "devices": "auto", "dtype": "auto", "chunk": 0, "encode_dtype": "auto",
    }  # fmt: skip
    assert {key: value for key, value in changed.items() if key not in ("2", "58")} == {
        key: value for key, value in nodes.items() if key != "2"
    }
    assert make_parallel(made)[0] == made


def test_it_stands_near_its_loader_and_on_nothing():
    busy = [decode(10 + i, None, pos=(0, 120 + 100 * i)) for i in range(3)]
    made, _ = make_parallel(
        editor(loader(1, links=[5]), decode(2, 5, pos=(310, 0)), *busy, links=[[5, 1, 0, 2, 1, "VAE"]])
    )
    x, y = made["nodes"][-1]["pos"]
    width, height = made["nodes"][-1]["size"]
    for node in made["nodes"][:-1]:
        (left, top), (w, h) = node["pos"], node["size"]
        assert x >= left + w or x + width <= left or y - 30 >= top + h or y + height <= top - 30
    assert abs(x) + abs(y) < 500


@pytest.mark.parametrize("junk", [{}, [], {"nodes": 3}, {"1": {"inputs": {}}}, "text", None])
def test_what_is_no_workflow(junk):
    with pytest.raises(wvp.ArgumentError, match="no workflow of ComfyUI"):
        make_parallel(junk)


def test_from_the_shell(tmp_path, capsys):
    source, target = tmp_path / "mine.json", tmp_path / "parallel.json"
    source.write_text(json.dumps(editor(loader(1, links=[5]), decode(2, 5), links=[[5, 1, 0, 2, 1, "VAE"]])))
    assert main(["workflow", str(source), "-o", str(target), "--devices", "cuda:1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"loader 1, {WAN}: made parallel",
        f"written: {target}, 1 of 1 loaders made parallel",
    ]
    assert json.loads(target.read_text())["nodes"][-1]["widgets_values"] == ["cuda:1", "auto", 0, "auto"]
    assert "\n" not in target.read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_shell_reads_every_utf_and_keeps_texts(tmp_path, encoding):
    source, target = tmp_path / "mine.json", tmp_path / "parallel.json"
    workflow = editor(loader(1, links=[5]), decode(2, 5), links=[[5, 1, 0, 2, 1, "VAE"]])
    workflow["nodes"][0]["title"] = "狐狸 half of an emoji: \ud83d"
    source.write_text(json.dumps(workflow), encoding=encoding)
    assert main(["workflow", str(source), "-o", str(target)]) == 0
    assert json.loads(target.read_bytes())["nodes"][0]["title"] == workflow["nodes"][0]["title"]
    assert "狐狸" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "", "{", "[" * 100_000, b"\xff", b"\x08\0\0\0\0\0\0\0{}", "{}"])
def test_the_shell_says_what_is_no_workflow_and_writes_nothing(tmp_path, capsys, content):
    source, target = tmp_path / "mine.json", tmp_path / "parallel.json"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["workflow", str(source), "-o", str(target)]) == 1
    error = capsys.readouterr().err
    reasons = {None: "mine.json can't be opened; save", "{}": "is no workflow of ComfyUI"}
    assert reasons.get(content, "mine.json can't be read as JSON; save") in error
    assert "codec" not in error
    assert not target.exists()


@pytest.mark.parametrize(
    "broken",
    [
        {"nodes": [{"id": 1, "type": "VAELoader", "widgets_values": ["wan_2.1_vae.safetensors"]}], "links": None},
        {"nodes": [{"type": "VAELoader"}], "links": []},
        {"1": {"class_type": "VAELoader", "inputs": None}},
    ],
)
def test_a_workflow_that_comfyui_would_not_write_is_an_error_or_left_as_it_is(broken):
    given = json.dumps(broken)
    try:
        changed, _ = make_parallel(broken)
    except wvp.ArgumentError as error:
        assert "save it anew" in str(error)  # noqa: PT017 (either is right)
    else:
        assert json.loads(given) == changed
    assert json.dumps(broken) == given


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "in.json"
    file.write_text(json.dumps({"1": {"class_type": "VAELoader", "inputs": {"vae_name": "x"}}}), encoding="utf-8-sig")
    assert main(["workflow", str(file), "-o", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["1"]["class_type"] == "VAELoader"
