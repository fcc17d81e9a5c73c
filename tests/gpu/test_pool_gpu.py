"""Decoding on several CUDA devices: frames, layouts, and what breaks otherwise than on the CPU.

In bf16 frames are equal bit for bit for any number of devices; in fp32 they are close, as cuDNN picks its algorithms by
shape.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.oracle import load, max_error, oracle_vae, random_latents
from tests.parallel import launch, test_edges
from tests.processes import gone, patience, shared_files, shared_maps, wait_until, worker_processes
from tests.runtime.test_group import torchrun
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.files.latents import save_latents
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.workers.meanwhile import MeanwhileRun

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs two CUDA devices, there are {COUNT}"),
]

GIB = 2**30
# Columns divide by 2 and 4, rows don't; and the other way round.
SIZES = [(31, 52), (52, 31)]


def named(count):
    return ",".join(f"cuda:{i}" for i in range(count))


def counts():
    return sorted({2, COUNT})


@pytest.fixture(scope="module")
def latents():
    return random_latents("wan2.1", frames=6, rows=31, columns=52)


@pytest.fixture(scope="module")
def warm(wan21):
    """All devices, for the tests that leave the pool usable."""
    with load(wan21, devices=named(COUNT), dtype="float32", chunk=1) as vae:
        yield vae


@pytest.fixture(scope="module")
def expected(wan21, latents):
    with load(wan21, devices="cuda:0", dtype="float32", chunk=1) as alone:
        return alone.decode(latents)


@pytest.fixture
def vae(warm, latents, expected):
    """The warm pool with living workers; after the test it must decode right, whatever was done to it."""
    if not warm.loaded:
        assert max_error(warm.decode(latents), expected) <= 1e-4
    yield warm
    assert max_error(warm.decode(latents), expected) <= 1e-4


def pids(vae):
    return [worker.pid for worker in vae._engine.workers]


# Frames.


def saved(frames, folder):
    """The hash of a file of ``frames``."""
    with open_output(folder / "frames.safetensors", shape=frames.shape, fps=16) as write:
        write(frames)
    return hashlib.sha256((folder / "frames.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frames_of_one_two_and_all_devices(family, oracle, dtype, tmp_path):
    frames = {}
    for count in (1, *counts()):
        # Another chunk for each: that must not matter either.
        with load(oracle, devices=named(count), dtype=dtype, chunk=1 + count % 3) as vae:
            frames[count] = [
                vae.decode(random_latents(family, frames=6, rows=rows, columns=columns)) for rows, columns in SIZES
            ]
    for count in counts():
        axes = {plan_shards(*size, count).transposed for size in SIZES}
        assert axes == {False, True}
        for size, one, several in zip(SIZES, frames[1], frames[count], strict=True):
            difference = (several - one).abs()
            print(
                f"\n{family} {dtype} {size}: {count} devices against 1: max {difference.max():.2e}, "
                f"mean {difference.mean():.2e}, {(difference > 0).sum()} of {difference.numel()} values differ"
            )
            assert several.isfinite().all()
            assert one.std() > 0.05
            if dtype == "bfloat16":
                assert torch.equal(several, one)
                assert saved(several, tmp_path) == saved(one, tmp_path)
            assert difference.max() < 1e-4
            assert difference.mean() < 1e-5


def test_wan22_at_its_own_widths_on_one_two_and_all_devices():
    # Attention over 1024 channels when decoding, 640 when encoding: more than one pass takes.
    oracle = oracle_vae("wan2.2", width=256, encoder_width=160)
    frames, latents = {}, {}
    for count in (1, *counts()):
        with load(oracle, devices=named(count), dtype="bfloat16", chunk=count) as vae:
            frames[count] = [
                vae.decode(random_latents("wan2.2", frames=4, rows=rows, columns=columns)) for rows, columns in SIZES
            ]
            latents[count] = [vae.encode(video) for video in frames[1]]
    for found, spread in ((frames, 0.05), (latents, 0.01)):
        for count in counts():
            for one, several in zip(found[1], found[count], strict=True):
                assert one.isfinite().all()
                assert one.std() > spread
                assert torch.equal(several, one), (count, (several - one).abs().max())


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_fp32_is_fp32_on_all_devices_whatever_the_chunk(vae, latents, expected, chunk):
    try:
        vae.chunk = chunk
        assert max_error(vae.decode(latents), expected) <= 1e-4
    finally:
        vae.chunk = 1


def test_few_rows_leave_devices_idle_and_the_next_decode_takes_all(vae, wan21, latents, expected):
    # One rank alone, and all but one.
    for rows in (1, max(1, COUNT - 1)):
        few = random_latents("wan2.1", frames=3, rows=rows, columns=1)
        with load(wan21, devices="cuda:0", dtype="float32", chunk=1) as alone:
            assert max_error(vae.decode(few), alone.decode(few)) <= 1e-4
        assert max_error(vae.decode(latents), expected) <= 1e-4


def arranged(state_dict, interleaved):
    """The same weights, convolutions' in channels-last order or not."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if interleaved else {}
    return {
        key: tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))
        for key, tensor in state_dict.items()
    }


def test_frames_do_not_depend_on_the_format_that_weights_and_latents_come_in(family, oracle):
    # Channels-last weights with planar shards, or the reverse, garbled peers' videos.
    latents = random_latents(family, frames=3, rows=31, columns=52)
    frames = []
    for interleaved in (False, True):
        weights = arranged(oracle.state_dict(), interleaved)
        with wvp.vae_from_state_dict(weights, devices=named(COUNT), dtype="bfloat16", chunk=2) as vae:
            frames.append(vae.decode(latents))
            frames.append(vae.decode(latents.contiguous(memory_format=torch.channels_last_3d)))
    assert all(torch.equal(one, frames[0]) for one in frames[1:])
    with load(oracle, devices="cuda:0", dtype="bfloat16", chunk=2) as alone:
        assert torch.equal(frames[0], alone.decode(latents))


def test_latents_on_any_device(vae, latents):
    decoded = vae.decode(latents)
    for device in (0, COUNT - 1):
        assert torch.equal(vae.decode(latents.to(f"cuda:{device}")), decoded)


def test_the_whole_decode_is_what_the_stream_hands_out(vae, latents):
    decoded = vae.decode(latents)
    parts = list(vae.decode_stream(latents))
    assert torch.equal(torch.cat(parts, dim=1), decoded)
    seen = []
    assert torch.equal(vae.decode(latents, on_chunk=lambda *call: seen.append(call[2].clone())), decoded)
    assert torch.equal(torch.cat(seen, dim=1), decoded)


# The exchange itself, exact as on the CPU.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(COUNT, tmp_path_factory.mktemp("ranks"), backend="nccl") as ranks:
        yield ranks


def test_halos_and_gathers_over_nccl_are_exact(ranks):
    for count in counts():
        for dtype in (torch.float32, torch.bfloat16):
            sent = ranks.run(test_edges.check_halo, dtype, 2, members=count)
            assert sent == [3 * ((rank > 0) + (rank < count - 1)) for rank in range(count)]
            ranks.run(test_edges.check_all_rows, dtype, 2, members=count)
        ranks.run(test_edges.check_own_rows, 7, 6, 2, members=count)
        ranks.run(test_edges.check_reuse, members=count)


def test_an_outer_edge_copies_and_sends_nothing(ranks):
    for count in counts():
        ranks.run(test_edges.check_copies, members=count)


@pytest.mark.skipif(COUNT < 3, reason=f"needs three CUDA devices, there are {COUNT}")
def test_groups_need_not_begin_at_global_rank_0(ranks):
    ranks.run(test_edges.check_halo, torch.float32, 1, members=(1, 2))
    ranks.run(test_edges.check_all_rows, torch.float32, 1, members=(1, 2))
    ranks.run(test_edges.check_own_rows, 6, 7, 2, members=(1, 2))


# While the workers start.

# As it is outside of the tests: the fixtures for all of them have it otherwise.
possible = MeanwhileRun.possible


@pytest.fixture
def _begins_here(monkeypatch, _workers_decode, caplog):
    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(possible))
    caplog.set_level(logging.INFO)


def workers_come(vae, seconds=120):
    """Waits until workers that no decode waits for are ready."""
    assert wait_until(lambda: vae.memory_to_start == 0, seconds)


@pytest.mark.usefixtures("_begins_here")
@pytest.mark.parametrize("size", SIZES)
def test_a_first_decode_is_one_devices_with_the_same_bits(wan21, caplog, size, tmp_path, monkeypatch):
    latents = random_latents("wan2.1", frames=6, rows=size[0], columns=size[1])
    with load(wan21, devices="cuda:0", dtype="bfloat16", chunk=2) as alone:
        expected = alone.decode(latents)  # which has measured settings, if there were none
    # Empty: the workers must compile.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with load(wan21, devices=named(COUNT), dtype="bfloat16", chunk=1) as vae:
        workers = pids(vae)
        started = time.monotonic()
        frames = vae.decode(latents)
        print(f"\nfirst decode at once: {time.monotonic() - started:.2f} s")
        assert torch.equal(frames, expected)
        assert vae.worked_on == vae.devices[:1]
        assert "cuda:0 alone, while the workers start" in caplog.text
        workers_come(vae)
        # While this process decoded: nothing is left for the decode that is theirs.
        compiled = set(tmp_path.rglob("*.cubin"))
        assert compiled
        assert torch.equal(vae.decode(latents), expected)
        assert vae.worked_on == vae.devices
        assert pids(vae) == workers
        assert set(tmp_path.rglob("*.cubin")) == compiled


@pytest.mark.usefixtures("_begins_here")
def test_workers_that_are_sooner_go_on_with_the_same_bits_and_here_is_no_memory_left(wan21, caplog, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.workers.meanwhile._BEGIN_SECONDS", 0.0)
    latents = random_latents("wan2.1", frames=9, rows=31, columns=52)
    with load(wan21, devices="cuda:0", dtype="bfloat16", chunk=2) as alone:
        expected = alone.decode(latents)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    with load(wan21, devices=named(COUNT), dtype="bfloat16", chunk=1) as vae:
        seen, reserved = [], []

        def on_chunk(done, _total, newest):
            seen.append(newest.clone())
            if len(seen) == 2:
                assert wait_until(lambda: vae._engine.advance("decoder"), 120)
            reserved.append((done, torch.cuda.memory_reserved(0)))

        frames = vae.decode(latents, on_chunk=on_chunk)
    assert torch.equal(frames, expected)
    assert torch.equal(torch.cat(seen, dim=1), expected)
    assert "cuda:0, then cuda:0: " in caplog.text
    assert reserved[1][1] > before
    assert reserved[-1][1] <= before


@pytest.mark.usefixtures("_begins_here")
def test_where_bits_would_differ_workers_are_waited_for(wan21, latents, caplog):
    with load(wan21, devices=named(2), dtype="float32", chunk=2) as vae:
        vae.decode(latents)
        assert vae.worked_on == vae.devices
    assert "while the workers start" not in caplog.text


# When things break.


@pytest.mark.parametrize(
    ("send", "message"),
    [(signal.SIGKILL, "worker 1 on cuda:1 died with exit code -9"), (signal.SIGSTOP, "worker 1 on cuda:1 is not answ")],
)
def test_a_worker_that_dies_or_stops_is_named_and_all_are_gone(vae, latents, send, message):
    # The others wait in a kernel for rows that never come.
    before, struck = pids(vae), []

    def strike(done, *_):
        if done >= 5 and not struck:
            struck.append(time.monotonic())
            os.kill(before[1], send)

    with pytest.raises(wvp.WorkerError, match=message):
        vae.decode(latents, on_chunk=strike)
    assert time.monotonic() - struck[0] < patience(10)
    assert wait_until(lambda: all(map(gone, before)), 2)


def test_a_stream_may_be_closed_at_any_chunk(vae, latents, expected):
    before = pids(vae)
    steps = sum(1 for _ in vae.decode_stream(latents))
    for taken in range(steps + 1):
        stream = vae.decode_stream(latents)
        parts = [next(stream) for _ in range(taken)]
        stream.close()
        if parts:
            got = torch.cat(parts, dim=1)
            assert max_error(got, expected[:, : got.shape[1]]) <= 1e-4
    assert pids(vae) == before


def free():
    """Free bytes of each device. Asking makes contexts in this process, so ask once before comparing."""
    return [torch.cuda.mem_get_info(device)[0] for device in range(COUNT)]


def test_nccl_that_can_not_start_is_an_error_with_its_reason_and_a_way_out(wan21, latents, monkeypatch):
    # Where devices reach one another's memory nobody asks NCCL.
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setattr("wan_vae_parallel.workers.pool.INTERFACE", "wan0")
    with load(wan21, devices=named(2), dtype="bfloat16") as vae:
        with pytest.raises(wvp.WorkerError, match=r"(?s)NCCL.*NCCL_P2P_DISABLE=1"):
            vae.decode(latents)
        assert pids(vae) == []
        monkeypatch.undo()
        assert vae.decode(latents).isfinite().all()


def memory_of(pids):
    """MiB that each process holds on its device, as the driver counts it; none for those without a context."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    held = dict(map(int, line.split(",")) for line in lines)
    return [held.get(pid, 0) for pid in pids]


@pytest.mark.parametrize("direct", [True, False])
def test_what_workers_hold_in_each_stage(wan21, latents, monkeypatch, direct):
    if not direct:
        monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with load(wan21, devices=named(COUNT), dtype="bfloat16") as vae:
        workers = pids(vae)
        assert wait_until(lambda: all(worker.connection.poll() for worker in vae._engine.workers), 120)
        time.sleep(2)  # they load kernels
        prepared = memory_of(workers)
        assert prepared == [0] * COUNT
        expected = vae.decode(latents)
        for _ in range(2):
            ready = memory_of(workers)
            started = time.monotonic()
            vae.park()
            took = time.monotonic() - started
            parked = memory_of(workers)
            print(
                f"\nMiB of workers, {direct=}: prepared {prepared}, ready {ready}, parked {parked} after {took:.2f} s"
            )
            if direct:
                assert max(ready) <= 1.2 * 1024
                assert max(parked) <= 0.6 * 1024
            assert all(now < was - 100 for now, was in zip(parked, ready, strict=True))
            assert torch.equal(vae.decode(latents), expected)
            assert pids(vae) == workers


def test_devices_that_must_not_reach_one_another_make_the_same_bits(wan21, latents, monkeypatch):
    with load(wan21, devices=named(COUNT), dtype="bfloat16") as vae:
        expected = vae.decode(latents)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with load(wan21, devices=named(COUNT), dtype="bfloat16") as vae:
        assert torch.equal(vae.decode(latents), expected)


def test_release_gives_all_devices_their_memory_back(wan21, latents):
    free()
    before = free()
    vae = load(wan21, devices=named(COUNT), dtype="bfloat16")
    for _ in range(2):
        frames = vae.decode(latents)
        held = free()
        assert all(was - now > vae.weights_size for was, now in zip(before, held, strict=True))
        vae.release()
        assert wait_until(
            lambda: all(abs(was - now) < 64 * 2**20 for was, now in zip(before, free(), strict=True)), 10
        ), (before, free())
    vae.close()
    gc.collect()
    assert frames.isfinite().all()


def test_a_device_with_less_memory_makes_all_chunks_smaller_with_the_same_frames(wan21):
    latents = random_latents("wan2.1", frames=9, rows=60, columns=104)
    with load(wan21, devices=named(2), dtype="bfloat16", chunk=1) as vae:
        expected = vae.decode(latents)
        needed = vae.memory_needed(latents.shape)
        vae.chunk = 8
        assert vae.memory_needed(latents.shape) > 2 * needed
        vae.release()
        free()
        # What one latent frame at a time takes, and some for CUDA's and NCCL's own.
        spare = int(1.3 * needed) + 2 * GIB
        hold = torch.empty(free()[1] - spare, dtype=torch.uint8, device="cuda:1")
        try:
            decoded = vae.decode(latents)
        finally:
            del hold
            torch.cuda.empty_cache()
    assert torch.equal(decoded, expected)


def test_nothing_is_left(warm):
    before = [worker.pid for worker in worker_processes()]
    warm.release()
    gc.collect()
    assert all(map(gone, before))
    assert worker_processes() == []
    assert shared_files() == 0
    assert shared_maps() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchrun_with_a_gpu_each(wan21, latents, tmp_path, dtype):
    vae = tmp_path / "vae.safetensors"
    save_file(dict(checkpoint_from_state_dict(wan21.state_dict(), source="the oracle").decoder), vae)
    save_latents(tmp_path / "x.latent", latents)
    codes, outputs = torchrun(
        tmp_path, *("decode", "x.latent", "--vae", vae, "-o", "out.safetensors", "--dtype", dtype), nodes=1
    )
    assert codes == [0], outputs
    with load(wan21, devices="cuda:0", dtype=dtype, chunk=1) as alone:
        expected = alone.decode(latents)
    frames = load_file(tmp_path / "out.safetensors")["frames"]
    if dtype == "bfloat16":
        assert torch.equal(frames, expected)
    else:
        assert max_error(frames, expected) <= 1e-4
