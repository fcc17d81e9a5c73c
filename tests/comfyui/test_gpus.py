"""A real ComfyUI server on several GPUs, whose own process holds a CUDA context and cudaMallocAsync."""

import re
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.comfyui.conftest import random_checkpoint
from tests.comfyui.server import REPOSITORY, Server, node

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
MIB_OF_NOISE = 64
# What CUDA's libraries and kernels keep in a process that has computed on a GPU.
MIB_OF_LIBRARIES = 256

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs two CUDA devices, there are {COUNT}"),
]


@pytest.fixture
def gpu_server(comfyui, tmp_path):
    models = tmp_path / "models" / "vae"
    models.mkdir(parents=True)
    random_checkpoint(models / "wan21.safetensors", width=96)
    packs = {"bench": REPOSITORY / "tests" / "bench" / "comfyui" / "pack"}
    running = Server(*comfyui, tmp_path, "--cuda-malloc", packs=packs)
    yield running
    running.stop()


def memory_used():
    """MiB in use on each GPU, by whomever."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()]


def settled(wanted, seconds=60):
    """The last reading of `memory_used`, taken until ``wanted(reading)`` or the time is over."""
    deadline = time.monotonic() + seconds
    while not wanted(used := memory_used()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return used


def workers(server):
    return [pid for pid, command in server.children() if "workers/bootstrap.py" in command]


def test_decode_interrupt_decode_again_and_free(gpu_server):
    server = gpu_server
    latents = torch.randn(1, 16, 13, 90, 160, generator=torch.Generator().manual_seed(1))
    save_file({"tensor": latents}, server.input / "latent")
    assert "cudaMallocAsync" in server.log()

    def decode(name, chunk, on_message=None):
        graph = {
            "latent": node("ProbeLoadTensor", name="latent"),
            "vae": node("WanVAEParallelLoader", vae_name="wan21.safetensors", devices="auto", dtype="auto", chunk=0),
            # Another chunk makes another graph: the same one would come from ComfyUI's cache.
            "own": node("WanVAEParallelApply", vae=["vae", 0], devices="auto", dtype="auto", chunk=chunk),
            "decode": node("WanVAEParallelDecode", samples=["latent", 0], vae=["own", 0], normalized_latents=False),
            "save": node("ProbeSaveTensor", name=name, image=["decode", 0]),
        }
        started = time.monotonic()
        run = server.run(graph, on_message=on_message)
        print(f"\n{name}: {run.ended} after {time.monotonic() - started:.2f} s, file and all; MiB {memory_used()}")
        return run

    before = memory_used()
    print(f"\nMiB in use before: {before}")
    decode("first", 4).check()
    assert len(workers(server)) == COUNT
    # As long as the processes start, one GPU decodes alone.
    for chunk in (3, *range(6, 40)):
        decode("second", chunk).check()
        log = server.log()
        if all(re.search(rf"cuda:{i}: (rows|columns) \d", log) for i in range(COUNT)):
            break
    else:
        pytest.fail(log)

    asked = []

    def interrupt(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not asked:
            server.post("/interrupt")
            asked.append(message["data"]["value"])

    run = decode("interrupted", 1, interrupt)
    assert run.ended == "execution_interrupted"
    assert not (server.output / "interrupted").exists()
    decode("third", 2).check()
    assert len(workers(server)) == COUNT

    warm = memory_used()
    assert all(now > was + 600 for now, was in zip(warm, before, strict=True)), (before, warm)

    # A large model is to be sampled: the processes stay, their memory goes.
    stayed = workers(server)
    loader = node("WanVAEParallelLoader", vae_name="wan21.safetensors", devices="auto", dtype="auto", chunk=0)
    server.run({"vae": loader, "room": node("ProbeAskForRoom", vae=["vae", 0], call=1)}).check()
    parked = memory_used()
    print(f"MiB in use parked: {parked}")
    # The server's own context, which may have come meanwhile, and a worker's.
    assert all(now < was - 300 for now, was in zip(parked, warm, strict=True)), (warm, parked)
    decode("fourth", 5).check()
    assert workers(server) == stayed

    server.post("/free", {"unload_models": True, "free_memory": True})

    # The first decode was the server's own, on the first GPU, while workers started.
    allowed = [MIB_OF_LIBRARIES, *[MIB_OF_NOISE] * (COUNT - 1)]

    def as_before(used):
        return all(now <= was + more for now, was, more in zip(used, before, allowed, strict=True))

    after = settled(as_before)
    print(f"MiB in use warm: {warm}, after /free: {after}")
    assert as_before(after), (before, after)
    assert workers(server) == []

    with wvp.load_vae(server.folder / "models/vae/wan21.safetensors", devices="cuda:0", dtype="bfloat16") as alone:
        expected = alone.decode(latents)[0]
    assert expected.std() > 0.05  # else nothing is compared
    for name in ("first", "second", "third", "fourth"):
        frames = load_file(server.output / name)["tensor"]
        assert frames.shape == (49, 720, 1280, 3)
        # bf16, other chunks, four devices and one: the same bits.
        assert torch.equal(frames, expected), (frames - expected).abs().max()
