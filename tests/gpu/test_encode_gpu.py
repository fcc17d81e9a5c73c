"""Encoding on CUDA devices: precision, equal bits over chunks, repeats, axes and devices, memory."""

from __future__ import annotations

import copy

import pytest
import torch

import wan_vae_parallel as wvp
from tests.gpu.device import CUDA, clear
from tests.oracle import load, max_error, oracle_latents, oracle_vae, random_video
from wan_vae_parallel.memory import encode_memory
from wan_vae_parallel.parallel.plan import ShardPlan
from wan_vae_parallel.parallel.window import PixelWindow
from wan_vae_parallel.runtime import pieces
from wan_vae_parallel.runtime.local import LocalEncoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
    pytest.mark.usefixtures("clean_device"),
]


@pytest.fixture(scope="module")
def oracle(family):
    """With an encoder of the published width."""
    return oracle_vae(family, width=96, encoder_width=160)


@pytest.fixture(scope="module")
def video(family):
    """Latents of 5 x 7, 21 frames; two runs of equal ones."""
    video = random_video(family, frames=21, rows=5, columns=7)
    video[:, 2:14] = video[:, 2:3]
    video[:, 19:] = video[:, 19:20]
    return video


@pytest.fixture(scope="module")
def expected(oracle, video):
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=1) as vae:
        return vae.encode(video)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_diffusers(family, oracle, dtype):
    given = random_video(family, frames=9, rows=12, columns=20)[0]
    wide = copy.deepcopy(oracle).to(CUDA)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        exact = oracle_latents(wide, given.to(CUDA)).cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    half = getattr(torch, dtype)
    peer = (oracle_latents(wide.to(half), given.to(CUDA, half)).float().cpu() - exact).abs()
    del wide
    clear()
    with load(oracle, dtype=dtype, devices="cuda:0") as vae:
        ours = (vae.encode(given)[0].permute(1, 2, 3, 0) - exact).abs()
    print(f"\n{family} {dtype}: max {ours.max():.2e} (diffusers {peer.max():.2e}), "
          f"mean {ours.mean():.2e} (diffusers {peer.mean():.2e})")  # fmt: skip
    assert ours.isfinite().all()
    assert ours.mean() <= peer.mean()
    assert ours.square().mean() <= peer.square().mean()
    assert ours.max() <= 1.2 * peer.max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_precision_agrees_with_the_cpu(family, dtype):
    oracle = oracle_vae(family)
    given = random_video(family, frames=9, rows=3, columns=4).to(getattr(torch, dtype))
    with load(oracle, dtype=dtype) as on_cpu, load(oracle, dtype=dtype, devices="cuda:0") as vae:
        assert max_error(vae.encode(given), on_cpu.encode(given)) <= (1e-4 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize("chunk", [2, 3, 5, "auto"])
def test_chunks_give_equal_bits(oracle, video, expected, chunk):
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=chunk) as vae:
        assert torch.equal(vae.encode(video), expected)
        assert torch.equal(torch.cat(list(vae.encode_stream(video[0].split(3))), dim=2), expected)


def test_repeats_give_equal_bits_whether_they_are_found_or_not(oracle, video, expected, monkeypatch):
    monkeypatch.setattr(pieces, "counted_ahead", lambda parts: ((part, (0,) * len(part)) for part in parts))
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=4) as vae:
        assert torch.equal(vae.encode(video), expected)


def test_frames_may_lie_on_the_device(oracle, video, expected):
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=4) as vae:
        assert torch.equal(vae.encode(video.to(CUDA)), expected)


def test_the_transposed_video_of_transposed_weights_is_the_transposed_latent(oracle, video, expected):
    """What a split along the columns does on each device, in whole."""
    with load(oracle, dtype="bfloat16", devices="cuda:0") as vae:
        encoder = vae._engine.encoder()
        plan = ShardPlan(transposed=True, bounds=(0, 7), columns=5)
        window = PixelWindow.of(plan, 0, ratio=vae.architecture.spatial_ratio, patch=vae.architecture.patch)
        steps = encoder.stream(pieces.pieces(pieces.blocks(video[0], 4)), window, 4)
        latents = torch.cat([step.means for step in steps if step.means is not None], dim=1)
    assert torch.equal(latents.cpu(), expected[0])


@pytest.mark.multigpu
@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("size", [(5, 7), (7, 5)])  # columns, rows
def test_devices_give_equal_bits(family, oracle, devices, size):
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices, there are {torch.cuda.device_count()}")
    video = random_video(family, frames=13, rows=size[0], columns=size[1])
    video[:, 3:] = video[:, 3:4]
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=2) as vae:
        expected = vae.encode(video)
    names = ",".join(f"cuda:{i}" for i in range(devices))
    with load(oracle, dtype="bfloat16", devices=names, chunk=4) as vae:
        assert torch.equal(vae.encode(video), expected)
        assert torch.equal(torch.cat(list(vae.encode_stream(video[0].split(5))), dim=2), expected)
        # The same processes decode.
        workers = [worker.pid for worker in vae._engine.workers]
        assert vae.decode(expected).shape == video.shape
        assert [worker.pid for worker in vae._engine.workers] == workers


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_encode_takes_no_more_memory_than_is_planned_and_gives_it_back(family, oracle, chunk):
    given = random_video(family, frames=13, rows=30, columns=52)
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=chunk) as vae:
        vae.encode(given)  # kernels compile, settings are measured, lists of slots come to the device
        clear()
        before = torch.cuda.memory_allocated(CUDA)
        torch.cuda.reset_peak_memory_stats(CUDA)
        vae.encode(given)
        peak = torch.cuda.max_memory_allocated(CUDA)
        planned = encode_memory(
            vae.architecture, (30, 52), chunk=chunk, image=False, dtype=torch.bfloat16,
            kernels=vae._engine.encoder().kernels,
        ).total  # fmt: skip
        print(f"\n{family}, chunk {chunk}: {peak / 2**20:.0f} MiB of {planned / 2**20:.0f} MiB planned")
        assert peak <= 1.05 * planned
        assert torch.cuda.memory_allocated(CUDA) <= before
    clear()
    assert torch.cuda.memory_allocated(CUDA) == 0


def test_out_of_memory_goes_on_with_smaller_chunks_and_the_same_bits(family, oracle, caplog):
    given = random_video(family, frames=17, rows=30, columns=52)

    def reserved(vae):
        clear()
        torch.cuda.reset_peak_memory_stats(CUDA)
        return vae.encode(given), torch.cuda.max_memory_reserved(CUDA)

    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=1) as vae:
        vae.encode(given)
        expected, fits = reserved(vae)
        vae.chunk = 16
        _, needed = reserved(vae)
        assert needed > 1.5 * fits
        clear()
        total = torch.cuda.get_device_properties(CUDA).total_memory
        # Just enough for a chunk of one, with some room for fragments.
        torch.cuda.set_per_process_memory_fraction((fits + (needed - fits) // 10) / total, CUDA)
        assert torch.equal(vae.encode(given), expected)
    assert "ran out of memory with chunk 16; going on with smaller" in caplog.text


def test_an_error_leaves_nothing_on_the_device(oracle, video):
    with load(oracle, dtype="bfloat16", devices="cuda:0") as vae:
        vae.encode(video)
        before = torch.cuda.memory_allocated(CUDA)

        def stop(_done, _total, _latents):
            raise KeyError("enough")

        with pytest.raises(KeyError):
            vae.encode(video, on_chunk=stop)
        assert torch.cuda.memory_allocated(CUDA) <= before
        bad = video.clone()
        bad[0, 7, 3, 3, 0] = torch.nan
        with pytest.raises(wvp.FrameError):
            vae.encode(bad)
        assert torch.cuda.memory_allocated(CUDA) <= before
        assert isinstance(vae._engine.encoder(), LocalEncoder)
