"""Workers in a real ComfyUI server stay from prompt to prompt, give memory back when that is wanted, end with /free."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import REPOSITORY, Server, node
from tests.processes import gone, patience, wait_until

# What ComfyUI keeps between prompts, by its option. A server of each takes long: those that are no default run only
# where slow tests are asked for.
OTHERS = ["--cache-none", "--disable-smart-memory"]
whatever_it_keeps = pytest.mark.parametrize(
    "kept", ["", *(pytest.param(option, marks=pytest.mark.slow) for option in OTHERS)], indirect=True
)


@pytest.fixture(scope="module")
def kept(request, comfyui, tmp_path_factory):
    """A server of that option, which has no workers yet."""
    if not request.param:
        server = request.getfixturevalue("server")
        free(server)
        server.option = ""
        yield server
        return
    folder = tmp_path_factory.mktemp("kept")
    (folder / "models" / "vae").mkdir(parents=True)
    random_checkpoint(folder / "models" / "vae" / "wan21.safetensors")
    random_checkpoint(folder / "models" / "vae" / "wan22.safetensors", family="wan2.2")
    packs = {"bench": REPOSITORY / "tests" / "bench" / "comfyui" / "pack"}
    running = Server(*comfyui, folder, "--cpu", request.param, packs=packs)
    running.option = request.param
    yield running
    running.stop()


def workers(server):
    """Process ids of the engine's workers."""
    return sorted(pid for pid, command in server.children() if "workers/bootstrap.py" in command)


def latents(server, name, seed, channels=16, size=(6, 10)):
    generator = torch.Generator().manual_seed(seed)
    save_file({"tensor": torch.randn(1, channels, 4, *size, generator=generator)}, server.input / name)
    return node("ProbeLoadTensor", name=name)


def loader(name="wan21.safetensors"):
    return node("WanVAEParallelLoader", vae_name=name, devices="cpu,cpu", dtype="auto", chunk=0)


def decoded(server, seed, vae=None, **more):
    """Decodes other latents in another prompt, by core's VAE Decode with our VAE; the frames."""
    name = f"latents{seed}"
    graph = {
        "latent": latents(server, name, seed, **more),
        **(vae or {"vae": loader()}),
        "decode": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "save": node("ProbeSaveTensor", name=f"frames{seed}", image=["decode", 0]),
    }
    server.run(graph).check()
    return load_file(server.output / f"frames{seed}")["tensor"]


APPLIED = {
    "core": node("VAELoader", vae_name="wan21.safetensors"),
    "vae": node("WanVAEParallelApply", vae=["core", 0], devices="cpu,cpu", dtype="auto", chunk=0),
}


@whatever_it_keeps
def test_three_prompts_keep_the_same_workers(kept):
    first = decoded(kept, 1)
    before = workers(kept)
    assert len(before) == 2
    for seed, size in ((2, (6, 10)), (3, (4, 8)), (4, (10, 6))):
        decoded(kept, seed, size=size)
        assert workers(kept) == before
    assert torch.equal(decoded(kept, 1), first)


@whatever_it_keeps
def test_workers_of_an_applied_vae_stay_too(kept):
    first = decoded(kept, 5, APPLIED)
    before = workers(kept)
    for seed in (6, 7):
        decoded(kept, seed, APPLIED)
        # Core may have loaded the VAE anew: the processes are taken over.
        assert workers(kept) == before
    core = {"vae": node("VAELoader", vae_name="wan21.safetensors")}
    assert (decoded(kept, 8, core) - decoded(kept, 8, APPLIED)).abs().max() <= 1e-3
    assert torch.equal(decoded(kept, 5, APPLIED), first)


@whatever_it_keeps
def test_apply_behind_the_loader_and_two_loaders_share_the_workers(kept):
    decoded(kept, 9)
    before = workers(kept)
    twice = {"first": loader(), "other": loader(), "vae": dict(APPLIED["vae"], inputs=dict(APPLIED["vae"]["inputs"]))}
    twice["vae"]["inputs"]["vae"] = ["first", 0]
    twice["unused"] = node("ProbeDiscard", vae=["other", 0])
    decoded(kept, 10, twice)
    assert workers(kept) == before


def free(server):
    server.free(lambda: not workers(server))


@whatever_it_keeps
def test_another_vae_in_between_leaves_the_workers(kept):
    free(kept)
    decoded(kept, 11)
    before = workers(kept)
    decoded(kept, 12, {"vae": loader("wan22.safetensors")}, channels=48)
    decoded(kept, 13)
    assert set(before) <= set(workers(kept))


@whatever_it_keeps
def test_a_model_that_wants_room_parks_the_workers_and_free_ends_them(kept):
    frames = decoded(kept, 14)
    before = workers(kept)
    for call in (1, 2):
        room = {"vae": loader(), "room": node("ProbeAskForRoom", vae=["vae", 0], call=call)}
        kept.run(room).check()
        assert workers(kept) == before
        # Their memory is back: nothing is loaded any more.
        state = kept.run({"vae": loader(), "state": node("ProbeEngineState", vae=["vae", 0], call=call)}).check()
        assert state.outputs("state")["loaded"] == [False]
        assert torch.equal(decoded(kept, 14), frames)
        assert workers(kept) == before
    kept.run({"vae": loader(), "room": node("ProbeAskForRoom", vae=["vae", 0], call=3)}).check()
    kept.free(lambda: all(map(gone, before)), memory=False)
    assert torch.equal(decoded(kept, 14), frames)


@whatever_it_keeps
def test_an_interrupt_while_workers_start_takes_effect_within_a_second(kept):
    free(kept)
    sent = []

    def interrupt():
        time.sleep(1.0)  # workers have begun to load their modules, which takes seconds
        sent.append(time.monotonic())
        kept.post("/interrupt")

    def on_message(message):
        if message["type"] == "executing" and message["data"].get("node") == "decode":
            threading.Thread(target=interrupt).start()

    graph = {
        "latent": latents(kept, "interrupted", 15),
        "vae": loader(),
        "decode": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "save": node("ProbeSaveTensor", name="interrupted start", image=["decode", 0]),
    }
    run = kept.run(graph, on_message=on_message)
    assert run.ended == "execution_interrupted"
    assert time.monotonic() - sent[0] < patience(1)
    # Where core asks for all memory after each prompt, new processes take the place of those that were at it.
    assert wait_until(lambda: len(workers(kept)) == 2, 10)
    started = workers(kept)
    decoded(kept, 16)
    assert len(workers(kept)) == 2
    assert workers(kept) == started or kept.option == "--disable-smart-memory"


@whatever_it_keeps
def test_the_log_has_one_line_a_decode(kept):
    before = kept.log().count("decoded 13 frames of 80x48 on cpu: rows 0-2, cpu: rows 3-5, in float32, chunk ")
    decoded(kept, 17)
    decoded(kept, 18)
    after = kept.log().count("decoded 13 frames of 80x48 on cpu: rows 0-2, cpu: rows 3-5, in float32, chunk ")
    assert after == before + 2
