"""The nodes in a real ComfyUI server, by POST /prompt. The version is in ComfyUI's comfyui_version.py."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import REPOSITORY, node
from tests.oracle import oracle_frames, oracle_vae
from tests.processes import patience
from wan_vae_parallel.architecture import Architecture
from wan_vae_parallel.files.latents import denormalize

# T 5 makes several chunks; 6x10 differs between the axes.
LATENTS = torch.randn(1, 16, 5, 6, 10, generator=torch.Generator().manual_seed(1))


class Devices:
    """What the nodes are asked to decode on, in the test that runs."""

    asked = "cpu"


@pytest.fixture(params=["cpu", "cpu,cpu"], autouse=True)
def devices(request):
    """Every check on one device in the server's process, and on two workers."""
    Devices.asked = request.param
    return request.param


# Our decoder on workers and core's on one device; the other way round is for slow runs.
each_of_both = pytest.mark.parametrize(
    ("devices", "decoder"),
    [
        ("cpu,cpu", "WanVAEParallelDecode"),
        ("cpu", "VAEDecode"),
        pytest.param("cpu", "WanVAEParallelDecode", marks=pytest.mark.slow),
        pytest.param("cpu,cpu", "VAEDecode", marks=pytest.mark.slow),
    ],
    indirect=["devices"],
)


def parallel_loader(name="wan21.safetensors", devices=None, dtype="auto", chunk=0):
    return node("WanVAEParallelLoader", vae_name=name, devices=devices or Devices.asked, dtype=dtype, chunk=chunk)


def apply(vae, chunk=0):
    return node("WanVAEParallelApply", vae=[vae, 0], devices=Devices.asked, dtype="auto", chunk=chunk)


def decode(samples="latent", vae="vae", normalized=False):
    return node("WanVAEParallelDecode", samples=[samples, 0], vae=[vae, 0], normalized_latents=normalized)


def save(name, image):
    return node("ProbeSaveTensor", name=name, image=[image, 0])


def close_to_core(frames, core):
    assert frames.shape == core.shape
    assert frames.dtype == core.dtype == torch.float32
    assert core.std() > 0.05  # else nothing is compared
    assert (frames - core).abs().max() <= 1e-3


def test_every_way_to_decode_equals_cores_vae_decode(server, send, received):
    graph = {
        "latent": send("latent", LATENTS),
        "core": node("VAELoader", vae_name="wan21.safetensors"),
        "parallel": parallel_loader(),
        "applied": apply("core", chunk=2),
        # 0: what all others are compared with
        "decode0": node("VAEDecode", samples=["latent", 0], vae=["core", 0]),
        "decode1": decode(vae="parallel"),
        "decode2": node("VAEDecode", samples=["latent", 0], vae=["parallel", 0]),
        "decode3": node("VAEDecode", samples=["latent", 0], vae=["applied", 0]),
        # tiles that would leave seams, were they used
        "decode4": node(
            "VAEDecodeTiled",
            samples=["latent", 0],
            vae=["applied", 0],
            tile_size=64,
            overlap=0,
            temporal_size=8,
            temporal_overlap=4,
        ),
        # a VAE that was never made parallel
        "decode5": decode(vae="core"),
        # one that was, twice
        "twice": apply("applied", chunk=1),
        "decode6": decode(vae="twice"),
    }
    for i in range(7):
        graph[f"save{i}"] = save(f"frames{i}", f"decode{i}")
    server.run(graph).check()
    core = received("frames0")
    assert core.shape == (17, 48, 80, 3)
    for i in range(1, 7):
        close_to_core(received(f"frames{i}"), core)


def test_a_batch_of_videos_and_a_batch_of_pictures(server, send, received):
    generator = torch.Generator().manual_seed(2)
    graph = {"core": node("VAELoader", vae_name="wan21.safetensors"), "vae": parallel_loader()}
    for kind, shape in (("videos", (2, 16, 3, 4, 6)), ("pictures", (3, 16, 1, 4, 6))):
        graph[kind] = send(kind, torch.randn(shape, generator=generator))
        graph[kind + "0"] = node("VAEDecode", samples=[kind, 0], vae=["core", 0])
        graph[kind + "1"] = decode(samples=kind)
        for i in "01":
            graph["save" + kind + i] = save(kind + i, kind + i)
    server.run(graph).check()
    for kind, frames in (("videos", 18), ("pictures", 3)):
        assert len(received(kind + "0")) == frames
        close_to_core(received(kind + "1"), received(kind + "0"))


def test_a_latent_without_a_time_axis_is_one_frame(server, send, received):
    graph = {
        "flat": send("flat", LATENTS[:, :, 0]),
        "one": send("one", LATENTS[:, :, :1]),
        "core": node("VAELoader", vae_name="wan21.safetensors"),
        "vae": parallel_loader(),
        "decode0": node("VAEDecode", samples=["one", 0], vae=["core", 0]),
        "decode1": decode(samples="flat"),
        "save0": save("flat0", "decode0"),
        "save1": save("flat1", "decode1"),
    }
    server.run(graph).check()
    close_to_core(received("flat1"), received("flat0"))


def test_normalized_latents_get_the_published_mean_and_deviation(server, send, received):
    graph = {
        "raw": send("raw", LATENTS[:, :, :2]),
        "applied": send("denormalized", denormalize(LATENTS[:, :, :2], Architecture.published("wan2.1"))),
        "core": node("VAELoader", vae_name="wan21.safetensors"),
        "vae": parallel_loader(),
        "decode0": node("VAEDecode", samples=["applied", 0], vae=["core", 0]),
        "decode1": decode(samples="raw", normalized=True),
        "save0": save("normalized0", "decode0"),
        "save1": save("normalized1", "decode1"),
    }
    server.run(graph).check()
    close_to_core(received("normalized1"), received("normalized0"))


def test_a_pruned_wan22_that_core_has_no_model_for_decodes(server, send, received):
    latents = torch.randn(1, 48, 3, 3, 4, generator=torch.Generator().manual_seed(4))
    graph = {
        "latent": send("latent22", latents),
        "vae": parallel_loader("wan22.safetensors"),
        "decode1": decode(),
        "decode2": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "save1": save("pruned1", "decode1"),
        "save2": save("pruned2", "decode2"),
    }
    server.run(graph).check()
    assert received("pruned1").shape == (9, 48, 64, 3)
    assert torch.equal(received("pruned1"), received("pruned2"))


@each_of_both
def test_progress_and_previews_come_with_each_chunk(server, send, decoder):
    latents = LATENTS + (0.1 if decoder == "VAEDecode" else 0)  # no cached result
    inputs = {"samples": ["latent", 0], "vae": ["vae", 0]}
    if decoder == "WanVAEParallelDecode":
        inputs["normalized_latents"] = False
    run = server.run(
        {
            "latent": send("progress" + decoder, latents),
            "vae": parallel_loader(chunk=1),
            "decode": node(decoder, **inputs),
            "save": save("progress", "decode"),
        }
    ).check()
    progress = run.progress("decode")
    values = [value for value, _ in progress]
    assert {most for _, most in progress} == {17}
    assert values == sorted(set(values))
    assert len(values) >= 5  # at least one a chunk
    assert values[-1] == 17
    assert any(b"\xff\xd8\xff" in preview for preview in run.previews)  # a JPEG


@pytest.mark.parametrize("core", [False, True], ids=["ours", "core's"])
def test_nodes_say_how_many_frames_they_made_in_what_time_and_where(server, send, core):
    latents = LATENTS[:, :, :2] + (0.31 if core else 0.3)  # no cached result
    graph = {"latent": send(f"said{core}", latents), "vae": parallel_loader()}
    graph["decode"] = node("VAEDecode", samples=["latent", 0], vae=["vae", 0]) if core else decode()
    encoder = "VAEEncode" if core else "WanVAEParallelEncode"
    graph["encode"] = node(encoder, pixels=["decode", 0], vae=["vae", 0])
    graph["again"] = node("VAEDecodeTiled" if core else "WanVAEParallelDecode", samples=["encode", 0], vae=["vae", 0])
    if core:
        graph["again"]["inputs"] |= {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    run = server.run({**graph, "save": save("said", "again")}).check()
    count = Devices.asked.count(",") + 1
    where = f"{count} processes" if count > 1 else Devices.asked
    assert [name for name, _ in run.texts] == ["decode", "encode", "again"]
    for _, text in run.texts:
        told = re.fullmatch(rf"5 frames of 80x48, (\d+\.\d+) s on {where}", text)
        assert told, text
        assert 0 < float(told[1]) < 100


@each_of_both
def test_interrupt_ends_within_one_chunk_and_the_next_prompt_works(server, send, received, decoder):
    big = torch.randn(1, 16, 21, 14, 20, generator=torch.Generator().manual_seed(5))
    asked_at, seen_after = [], []

    def interrupt_at_the_third_chunk(message):
        if message["type"] != "progress":
            return
        if asked_at:
            seen_after.append(message["data"]["value"])
        elif message["data"]["value"] >= 9:
            server.post("/interrupt")
            asked_at.append((time.monotonic(), message["data"]["value"]))

    graph = {
        "latent": send("big", big),
        "vae": parallel_loader(chunk=4),
        "decode": decode()
        if decoder == "WanVAEParallelDecode"
        else node(decoder, samples=["latent", 0], vae=["vae", 0]),
        "save": save("interrupted", "decode"),
    }
    run = server.run(graph, on_message=interrupt_at_the_third_chunk)
    assert run.ended == "execution_interrupted"
    assert asked_at
    # one step of at most four frames may have been under way, no more
    assert all(value <= asked_at[0][1] + 8 for value in seen_after)
    assert not (server.output / "interrupted").exists()
    test_a_latent_without_a_time_axis_is_one_frame(server, send, received)


def test_free_releases_the_engine_and_the_next_prompt_works(server, send, received):
    loader = {"vae": parallel_loader()}
    latent = {"latent": send("free", LATENTS[:, :, :2] + 0.2), "decode": decode(), "save": save("free", "decode")}
    server.run({**loader, **latent}).check()

    def engine_state(call):
        state = {"state": node("ProbeEngineState", vae=["vae", 0], call=call)}
        return server.run({**loader, **state}).check().outputs("state")

    assert engine_state(1)["loaded"] == [True]
    server.post("/free", {"unload_models": True})
    deadline = time.monotonic() + 20
    call = 2
    while engine_state(call)["loaded"] == [True]:
        assert time.monotonic() < deadline, "/free did not release the engine"
        call += 1
    server.post("/free", {"unload_models": True, "free_memory": True})
    latent["latent"] = send("free2", LATENTS[:, :, :2] + 0.3)
    server.run({**loader, **latent}).check()
    assert received("free").shape == (5, 48, 80, 3)


@pytest.mark.parametrize(
    ("name", "latents", "words"),
    [
        ("channels", torch.randn(1, 48, 2, 3, 4), ["48 channels", "takes 16", "Wan 2.2 5B"]),  # the wrong VAE
        ("nan", torch.full((1, 16, 2, 3, 4), float("nan")), ["384 NaN"]),  # a sampler that blew up
        ("axes", torch.randn(16, 4), ["2 axes", "[B, C, T, h, w]"]),
        ("order", torch.randn(16, 5, 4, 16), ["not clear which they are; take them as the sampler made them"]),
    ],
)
def test_bad_latents_fail_in_words_and_leave_the_server_healthy(server, send, received, name, latents, words):
    graph = {"latent": send(name, latents), "vae": parallel_loader(), "decode": decode(), "save": save(name, "decode")}
    run = server.run(graph)
    assert run.ended == "execution_error"
    for word in words:
        assert word in run.detail["exception_message"]
    assert run.detail["exception_type"] == "wan_vae_parallel.LatentError"
    assert "permute" not in run.detail["exception_message"]  # which a graph can't
    test_a_latent_without_a_time_axis_is_one_frame(server, send, received)


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_a_workflow_made_with_four_gpus_runs_here_and_says_where(server, send):
    graph = {
        "latent": send("four", LATENTS[:, :, :1]),
        "vae": parallel_loader(devices="cuda:0,cuda:1,cuda:2,cuda:3"),
        "decode": decode(),
        "save": save("four", "decode"),
    }
    server.run(graph).check()
    assert "cuda:0,cuda:1,cuda:2,cuda:3 were asked for; using cpu" in server.log()


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_on_a_machine_with_too_few_gpus_all_but_the_first_decode_where_auto_would(server, send):
    graph = {
        "latent": send("rest", LATENTS[:, :, :1] + 0.5),
        "vae": parallel_loader(devices="all but the first"),
        "decode": decode(),
        "save": save("rest", "decode"),
    }
    server.run(graph).check()
    assert "devices all but the first were asked for; using cpu" in server.log()


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_devices_are_a_list_that_takes_what_is_not_in_it_and_texts_that_are_connected(server, send, received):
    for name in ("WanVAEParallelLoader", "WanVAEParallelApply"):
        kind, described = server.get("/object_info")[name]["input"]["optional"]["devices"]
        assert kind == "COMBO"
        assert described["options"] == ["auto", "cpu"]
        assert described["default"] == "auto"
        assert described["device_names"] == {}  # of GPUs
    text = node("PrimitiveString", value="cpu,cuda:3")
    applied = apply("core") | {"inputs": {"vae": ["core", 0], "devices": ["text", 0]}}
    core = node("VAELoader", vae_name="wan21.safetensors")
    graph = {"text": text, "core": core, "latent": send("text", LATENTS[:, :, :1]), "applied": applied}
    graph |= {"vae": parallel_loader(devices="cpu"), "one": decode(), "other": decode(vae="applied")}
    graph |= {"save one": save("one", "one"), "save other": save("other", "other")}
    server.run(graph).check()
    assert torch.equal(received("one"), received("other"))
    assert "devices cpu,cuda:3 were asked for; using cpu" in server.log()

    del graph["save one"]  # else it would be run, and the other one left out
    with pytest.raises(AssertionError, match="vae takes VAE,WANVAE, and STRING is connected to it; connect a VAE"):
        server.run(graph | {"applied": {**applied, "inputs": {**applied["inputs"], "vae": ["text", 0]}}})
    with pytest.raises(AssertionError, match="devices takes a text, and VAE is connected to it"):
        server.run(graph | {"applied": {**applied, "inputs": {**applied["inputs"], "devices": ["core", 0]}}})


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_a_device_that_is_none_is_an_error(server, send):
    graph = {
        "latent": send("tpu", LATENTS[:, :, :1]),
        "vae": parallel_loader(devices="tpu7"),
        "decode": decode(),
        "save": save("tpu", "decode"),
    }
    run = server.run(graph)
    assert run.ended == "execution_error"
    assert "there is no device 'tpu7'" in run.detail["exception_message"]


def workers(server):
    return [pid for pid, command in server.children() if "workers/bootstrap.py" in command]


def without_workers(server):
    """Other tests' workers may be warm still: with them gone, those that are there are this test's."""
    server.free(lambda: not workers(server))


@pytest.mark.parametrize("devices", ["cpu,cpu"], indirect=True)
def test_loaders_of_one_file_share_workers_and_a_new_file_of_its_name_takes_them_over(server, send, received):
    path = server.folder / "models" / "vae" / "shared.safetensors"
    random_checkpoint(path, width=8)
    without_workers(server)
    graph = {"latent": send("shared", LATENTS)}
    for name, chunk in (("one", 1), ("two", 2)):
        graph |= {name: parallel_loader(path.name, chunk=chunk), f"{name} decode": decode(vae=name)}
        graph[f"{name} save"] = save(f"shared {name}", f"{name} decode")
    server.run(graph).check()
    first, warm = received("shared one"), workers(server)
    assert (received("shared two") - first).abs().max() < 1e-5
    assert len(warm) == 2

    random_checkpoint(path, width=8, seed=1)
    server.run(graph).check()
    assert (received("shared one") - first).abs().max() > 0.01
    assert workers(server) == warm


@pytest.mark.parametrize("devices", ["cpu,cpu"], indirect=True)
def test_a_killed_worker_is_an_error_and_the_next_prompt_works(server, send, received):
    big = torch.randn(1, 16, 21, 16, 24, generator=torch.Generator().manual_seed(6))
    killed = []

    def kill_at_the_second_chunk(message):
        if message["type"] == "progress" and message["data"]["value"] >= 5 and not killed:
            killed.append(workers(server)[0])
            os.kill(killed[0], signal.SIGKILL)

    without_workers(server)
    graph = {"latent": send("doomed", big), "vae": parallel_loader(chunk=4), "decode": decode()}
    graph["save"] = save("doomed", "decode")
    started = time.monotonic()
    run = server.run(graph, on_message=kill_at_the_second_chunk)
    assert run.ended == "execution_error"
    assert "died with exit code -9" in run.detail["exception_message"]
    assert time.monotonic() - started < patience(60)
    assert not workers(server)
    test_a_latent_without_a_time_axis_is_one_frame(server, send, received)


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)
def test_other_peoples_files(server, send, received):
    """Diffusers' layout and a prefix, which core's own loader can't read."""
    frames = {}
    folder = server.folder / "models" / "vae"
    oracle = oracle_vae("wan2.1").state_dict()
    save_file(oracle, folder / "diffusers.safetensors")
    save_file({f"vae.{key}": tensor for key, tensor in oracle.items()}, folder / "prefixed.safetensors")
    for name in ("diffusers", "prefixed"):
        graph = {"latent": send("others", LATENTS), "vae": parallel_loader(f"{name}.safetensors"), "decode": decode()}
        server.run({**graph, "save": save(name, "decode")}).check()
        frames[name] = received(name)
    expected = oracle_frames(oracle_vae("wan2.1"), LATENTS).flatten(0, 1)
    for decoded in frames.values():
        assert (decoded - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_nodes_describe_themselves(server):
    info = server.get("/object_info")
    for name in sorted(name for name in info if name.startswith("WanVAEParallel")):
        described = info[name]
        assert described["description"]
        assert described["category"] == "Wan VAE Parallel"
        inputs = {**described["input"].get("required", {}), **described["input"].get("optional", {})}
        # What has a default may be missing; so may sound, and a second VAE.
        optional = described["input"].get("optional", {})
        wired = ("audio", "vae_alpha")
        assert all(("default" in value[1]) == (key in optional) for key, value in inputs.items() if key not in wired)
        for key, value in inputs.items():
            assert value[1]["tooltip"], f"{name}.{key} has no tooltip"
        assert all(described["output_tooltips"])
    assert len([name for name in info if name.startswith("WanVAEParallel")]) == 7
    loader = info["WanVAEParallelLoader"]["input"]["optional"]
    assert loader["dtype"][1]["advanced"]
    assert loader["chunk"][1]["advanced"]
    assert loader["encode_dtype"][1]["advanced"]
    assert list(loader)[-1] == "encode_dtype"  # values in older workflows are kept by their order


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_the_pack_is_quiet_on_import(server):
    assert not server.first_children  # importing starts no process
    log = server.first_words
    lines = [line for line in log[: log.index("To see the GUI")].splitlines() if "wan" in line.lower()]
    # only ComfyUI's own line with the import time
    assert len(lines) == 1, lines
    assert "seconds:" in lines[0]
    assert "IMPORT FAILED" not in lines[0]


@pytest.mark.parametrize("devices", ["cpu"], indirect=True)  # the same whatever decodes
def test_without_a_server_nothing_is_said_and_nothing_fails(comfyui):
    path, python = comfyui
    script = (
        "import importlib.util, sys, comfy.options\n"
        "comfy.options.enable_args_parsing()\n"
        "spec = importlib.util.spec_from_file_location('pack', sys.argv[2] + '/__init__.py')\n"
        "sys.modules['pack'] = importlib.util.module_from_spec(spec)\n"
        "del sys.argv[1:]\n"
        "sys.argv.append('--cpu')\n"
        "spec.loader.exec_module(sys.modules['pack'])\n"
        "import pack.nodes.report as report\n"
        "from comfy_execution.utils import CurrentNodeContext\n"
        "report.tell_work(1, (8, 8), 0.0, ['cpu'])\n"
        "import types\n"
        "sys.modules['server'] = server = types.ModuleType('server')\n"
        "server.PromptServer = type('PromptServer', (), {})\n"  # which nobody made yet
        "with CurrentNodeContext('prompt', 'node'):\n"
        "    report.tell_work(1, (8, 8), 0.0, ['cpu'])\n"
        "    said = []\n"
        "    server.PromptServer.instance = types.SimpleNamespace(send_progress_text=lambda *it: said.append(it))\n"
        "    report.tell_work(1, (8, 16), 0.0, ['cpu'])\n"
        "((text, node),) = said\n"
        "print(node, text)\n"
        "with CurrentNodeContext('prompt', '3:7:2'):\n"
        "    report.tell_work(1, (8, 16), 0.0, ['cpu'])\n"
        "print('then on', [node for _, node in said[1:]])\n"
    )
    command = [python, "-c", script, str(path), str(REPOSITORY)]
    run = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=patience(120))
    assert run.returncode == 0, run.stderr
    assert re.search(r"^node 1 frame of 16x8, [\d.]+ s on cpu$", run.stdout, flags=re.MULTILINE), run.stdout
    assert "then on ['3:7:2', '3']" in run.stdout
