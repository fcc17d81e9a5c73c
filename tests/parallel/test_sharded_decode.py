"""Several workers against one device, through what users call: frames are close (1e-5), whoever computes them.

Shapes are [rows, columns] of the latents; pools stay warm for all of a module's shapes, since starting takes longest.
"""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import save_file

import wan_vae_parallel as wvp
from tests.oracle import FAMILIES, load, max_error, oracle_vae, original_state_dict, random_latents
from tests.processes import nothing_left, worker_processes
from wan_vae_parallel.parallel.plan import plan_shards

TOLERANCE = 1e-5
# By number of workers: rows and columns that don't divide, along both axes, and fewer than workers. Few and small ones,
# since torch compiles its CPU convolutions anew for each size, in each worker.
SIZES = {
    2: [(5, 3), (3, 5), (1, 1)],
    3: [(5, 4), (4, 5), (2, 1)],
    5: [(6, 6), (6, 7), (3, 2)],
    8: [(9, 4), (4, 9), (3, 2)],
}


@functools.cache
def weights(family):
    # Wan 2.2 is wider where it is patched; 8 keeps both quick.
    return oracle_vae(family, width=8)


@functools.cache
def alone(family):
    return load(weights(family))


@functools.cache
def expected_frames(family, rows, columns, frames, batch=1):
    return alone(family).decode(random_latents(family, frames=frames, rows=rows, columns=columns, batch=batch))


def settings():
    """Both families with all numbers of workers; what takes longest is for the slow run."""
    for family in FAMILIES:
        for workers in SIZES:
            slow = workers > 3 or (family, workers) == ("wan2.2", 3)
            yield pytest.param((family, workers), id=f"{family}-{workers}", marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(params=settings(), scope="module")
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def family(setting):
    return setting[0]


@pytest.fixture(scope="module")
def workers(setting):
    return setting[1]


@pytest.fixture(scope="module")
def vae(family, workers, tmp_path_factory):
    """From a file for Wan 2.1, from tensors for Wan 2.2: both ways weights can come."""
    devices = ",".join(["cpu"] * workers)
    with pytest.MonkeyPatch.context() as patch:
        temporary = tmp_path_factory.mktemp("temporary")
        patch.setattr("tempfile.tempdir", str(temporary))
        with nothing_left(temporary):
            if family == "wan2.1":
                path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
                save_file(original_state_dict(weights(family)), path)
                made = wvp.load_vae(path, devices=devices)
            else:
                made = wvp.vae_from_state_dict(weights(family).state_dict(), devices=devices)
            with made as vae:
                yield vae
            del made, vae


def test_frames_are_those_of_one_device(vae, family, workers):
    pids = None
    plans = set()
    # The first size with both chunks, the others with one each.
    for (rows, columns), chunks in zip(SIZES[workers], [(1, 3), (3,), (1,)], strict=True):
        plan = plan_shards(rows, columns, workers)
        plans.add((plan.transposed, plan.shards < workers))
        latents = random_latents(family, frames=6, rows=rows, columns=columns)
        expected = expected_frames(family, rows, columns, 6)
        for chunk in chunks:
            vae.chunk = chunk
            frames = vae.decode(latents)
            assert frames.is_contiguous()
            assert frames.dtype == torch.float32
            error = max_error(frames, expected)
            assert error <= TOLERANCE, f"{rows}x{columns}, chunk {chunk}: {error:.1e}"
        # Workers are the same throughout, whatever the shape and axis.
        pids = pids or [worker.pid for worker in worker_processes()]
        assert len(pids) == workers
        assert [worker.pid for worker in worker_processes()] == pids
    # That the sizes above are what they are said to be.
    assert {transposed for transposed, _ in plans} == {False, True}
    assert {fewer for _, fewer in plans} == {False, True}


@pytest.mark.slow
def test_every_size_with_every_chunk(vae, family, workers):
    for rows, columns in SIZES[workers]:
        for frames in (1, 6):
            latents = random_latents(family, frames=frames, rows=rows, columns=columns)
            for chunk in (1, 3):
                vae.chunk = chunk
                error = max_error(vae.decode(latents), expected_frames(family, rows, columns, frames))
                assert error <= TOLERANCE, f"{rows}x{columns}, {frames} latent frames, chunk {chunk}: {error:.1e}"


def test_an_image(vae, family, workers):
    rows, columns = SIZES[workers][1]
    for chunk in (1, 3):
        vae.chunk = chunk
        frames = vae.decode(random_latents(family, frames=1, rows=rows, columns=columns))
        assert frames.shape[1] == 1
        assert max_error(frames, expected_frames(family, rows, columns, 1)) <= TOLERANCE


def test_parked_workers_go_on_with_the_same_frames(vae, family, workers):
    rows, columns = SIZES[workers][-1]
    latents = random_latents(family, frames=1, rows=rows, columns=columns)
    before = vae.decode(latents)
    pids = [worker.pid for worker in worker_processes()]
    assert vae.park()
    assert not vae.loaded
    assert torch.equal(vae.decode(latents), before)
    assert [worker.pid for worker in worker_processes()] == pids


def test_the_chunk_that_is_chosen(vae, family, workers):
    rows, columns = SIZES[workers][-1]
    vae.chunk = "auto"
    frames = vae.decode(random_latents(family, frames=6, rows=rows, columns=columns))
    assert max_error(frames, expected_frames(family, rows, columns, 6)) <= TOLERANCE


def test_a_batch_streams_and_calls_back_every_frame_once_in_order(vae, family, workers):
    if workers != 2:
        pytest.skip("the same way for any number of workers")
    rows, columns = SIZES[workers][1]
    latents = random_latents(family, frames=6, rows=rows, columns=columns, batch=2)
    vae.chunk = 3
    calls = []
    decoded = vae.decode(latents, on_chunk=lambda done, total, newest: calls.append((done, total, newest.clone())))
    assert max_error(decoded, expected_frames(family, rows, columns, 6, batch=2)) <= TOLERANCE
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (1, 21)  # the first frame does not wait for the rest
    assert {call[1] for call in calls} == {21}
    assert torch.equal(torch.cat([call[2] for call in calls], dim=1), decoded)
    parts = list(vae.decode_stream(latents))
    assert torch.equal(torch.cat(parts, dim=1), decoded)
    for part in parts:
        part.mul_(2)  # the caller's own


def test_latents_of_any_strides_and_dtype(vae, family, workers):
    rows, columns = SIZES[workers][1]
    vae.chunk = 3
    latents = random_latents(family, frames=6, rows=rows, columns=columns)
    expected = expected_frames(family, rows, columns, 6)
    arranged = latents.double().transpose(-1, -2).contiguous().transpose(-1, -2)
    with torch.inference_mode():
        assert max_error(vae.decode(arranged), expected) <= TOLERANCE


def test_fp64_agrees_to_fp64():
    latents = random_latents("wan2.2", frames=3, rows=3, columns=4).double()
    oracle = weights("wan2.2")
    with load(oracle, dtype="float64", devices="cpu,cpu", chunk=1) as vae:
        frames = vae.decode(latents)
    assert frames.dtype == torch.float64
    assert max_error(frames, load(oracle, dtype="float64").decode(latents)) <= 1e-12
