"""Measuring on a real GPU, what is made of it, and decodes whose layers are cuDNN's."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import load, oracle_vae, random_latents
from tests.tuning import start_anew
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.memory import decode_memory
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured
from wan_vae_parallel.runtime import tuning
from wan_vae_parallel.runtime.local import LocalDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
]
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import measure, tiles  # noqa: E402

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
KINDS = [
    LayerKind("conv", 96, 96, (3, 3, 3)),
    LayerKind("conv", 96, 192, (3, 1, 1), 2),
    LayerKind("upsample_conv", 192, 96, (1, 3, 3)),
    # Encoders'.
    LayerKind("conv", 192, 192, (3, 1, 1), time_stride=2),
    LayerKind("down_conv", 96, 96, (1, 3, 3)),
    LayerKind("head_conv", 96, 3, (3, 3, 3)),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start_anew(monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def wan21():
    return oracle_vae("wan2.1", width=96)


def test_every_candidate_is_measured_kept_and_read_back_without_a_launch(folder, monkeypatch, caplog):
    torch.cuda.init()
    torch.cuda.synchronize(CUDA)
    random, held = torch.cuda.get_rng_state(CUDA), torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    tuning.tune(KINDS, CUDA, BF16)
    (known,) = tuning._known.values()
    for kind, one in known.items():
        settings = [str(tile) for tile in tiles.candidates(kind, CUDA)]
        print(f"\n{kind}: cuDNN {one.cudnn:.0f} TFLOP/s, {dict(zip(settings, map(round, one.tiles), strict=True))}")
        assert len(one.tiles) == len(settings)
        assert all(0 < speed < 5000 for speed in (*one.tiles, one.cudnn))
    assert list(known) == KINDS
    assert len(list(folder.rglob("*.json"))) == len(KINDS)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), random)
    assert torch.cuda.memory_allocated(CUDA) == held
    print(f"peak {(torch.cuda.max_memory_allocated(CUDA) - held) / 2**20:.0f} MiB")
    assert torch.cuda.max_memory_allocated(CUDA) - held <= 512 * 2**20

    start_anew(monkeypatch)
    monkeypatch.setattr(measure, "measure", None)
    tuning.tune(KINDS, torch.device("cuda"), BF16)
    assert "could not be measured" not in caplog.text
    assert list(tuning._known.values()) == [known]
    assert {kind for _, _, kind in tiles._measured} == set(KINDS[:-1])  # the head has one setting


def test_memory_that_is_short_is_said_and_the_shipped_settings_stay(folder, caplog):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + 2**26) / total, CUDA)
    try:
        assert tuning.tune(KINDS[:1], CUDA, BF16) == frozenset()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert [record for record in caplog.records if "could not be measured" in record.getMessage()]
    assert not tiles._measured
    assert not list(folder.rglob("*.json"))


def decoder(oracle):
    checkpoint = checkpoint_from_state_dict(oracle.state_dict(), source="the test")
    return LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=CUDA, dtype=BF16)


def frames(decoder, latents, chunk=2):
    return torch.cat([frames.clone() for frames in decoder.stream(latents, chunk)], dim=1)


def test_frames_have_the_same_bits_with_every_setting(wan21):
    wan = decoder(wan21)
    latents = random_latents("wan2.1", frames=4, rows=8, columns=12)
    shipped = frames(wan, latents)
    kinds = dict.fromkeys(conv.kind for conv in wan.model.convolutions())
    for turn in range(max(len(tiles.candidates(kind, CUDA)) for kind in kinds)):
        for kind in kinds:
            count = len(tiles.candidates(kind, CUDA))
            speeds = tuple(1000.0 if i == turn % count else 1.0 for i in range(count))
            tiles.use({kind: Measured(speeds, 1.0)}, CUDA, BF16)
        wan._compiled.clear()  # so that the new ones compile side by side
        assert torch.equal(frames(wan, latents), shipped), turn


@pytest.mark.parametrize("op", ["conv", "upsample_conv", "head_conv", ""])
def test_layers_that_are_cudnns_decode_right_and_within_their_estimate(wan21, monkeypatch, op):
    latents = random_latents("wan2.1", frames=6, rows=30, columns=52)
    expected = frames(decoder(wan21), latents)
    monkeypatch.setattr(tuning, "tune", lambda kinds, *_: frozenset(kind for kind in kinds if not op or kind.op == op))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    wan = decoder(wan21)
    wan.tune()
    assert not wan.kernels
    decoded = frames(wan, latents)
    # Both err by as much against fp32; see test_decode_gpu.py.
    assert (decoded - expected).abs().max() < 5e-2
    assert (decoded - expected).abs().mean() < 5e-3
    whole = decoded.nbytes * 2  # that this test holds: frames and what they are joined to
    peak = torch.cuda.max_memory_allocated(CUDA) - before - whole
    # A tenth is left to what libraries take, such as cuDNN for its workspace.
    assert 0.9 * peak <= decode_memory(wan.architecture, (1, 6, 30, 52), chunk=2, dtype=BF16, kernels=False).total


def test_a_decode_measures_before_its_first_step_and_says_what_cudnn_gets(wan21, monkeypatch, caplog):
    real = measure.measure

    def lost(kinds, dtype, device):
        found = real(kinds, dtype, device)
        return {kind: Measured(one.tiles, 2 * one.ours if kind == KINDS[0] else 0.0) for kind, one in found.items()}

    monkeypatch.setattr(measure, "measure", lost)
    latents = random_latents("wan2.1", frames=3, rows=8, columns=8)
    with caplog.at_level("INFO"), load(wan21, devices="cuda:0", dtype="bfloat16") as vae:
        vae.decode(latents)
        given = {conv.kind for conv in vae._engine.decoder().model.convolutions() if conv.cudnn}
    assert given == {KINDS[0]}
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if text.startswith("measured settings for 9 kinds of layers on")]
    assert [text for text in said if text.startswith("conv 3x3x3 96 to 96 runs on cuDNN")]
