"""Which tile a convolution takes: by an H200's speeds, or by what was measured. Needs neither a GPU nor Triton."""

from __future__ import annotations

import pytest
import torch

from wan_vae_parallel.ops.gpu import Gpu
from wan_vae_parallel.ops.kernels import tiles
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured
from wan_vae_parallel.ops.pixels import tap_channels

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CONV = LayerKind("conv", 384, 384, (3, 3, 3))
KINDS = (
    [
        LayerKind("conv", channels, out_channels, (3, 3, 3))
        for channels, out_channels in [(16, 384), (384, 384), (192, 192), (96, 96), (48, 1024), (1024, 1024), (80, 160)]
    ]
    + [
        LayerKind("conv", 384, 768, (3, 1, 1), 2),
        LayerKind("upsample_conv", 384, 192, (1, 3, 3)),
        LayerKind("head_conv", 96, 3, (3, 3, 3)),
        # Encoders': neighbourhoods of pixels, every other frame.
        LayerKind("conv", 32, 96, (3, 1, 1)),
        LayerKind("conv", 112, 160, (3, 1, 1)),
        LayerKind("conv", 384, 384, (3, 1, 1), time_stride=2),
    ]
    + [LayerKind("down_conv", width, width, (1, 3, 3)) for width in (96, 192, 384, 160, 320, 640)]
)
LARGE = 720 * 1282
GPUS = {
    "H200": Gpu("H200", (9, 0), 132, 232448),
    "A100": Gpu("A100", (8, 0), 108, 166912),
    "RTX 4090": Gpu("RTX 4090", (8, 9), 128, 101376),
    "B200": Gpu("B200", (10, 0), 148, 232448),
    "RTX 5090": Gpu("RTX 5090", (12, 0), 170, 101376),
}


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    # Whatever Triton is installed.
    monkeypatch.setattr(tiles, "DESCRIPTORS", True)


def chosen(kind, positions, frames=4, dtype=BF16):
    return tiles.choose_tile(kind, positions, frames, dtype=dtype, device=CPU)


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_candidates_are_few_and_fit_the_gpu(monkeypatch, kind, gpu, descriptors):
    monkeypatch.setattr(tiles, "gpu", lambda _: GPUS[gpu])
    monkeypatch.setattr(tiles, "DESCRIPTORS", descriptors)
    found = tiles.candidates(kind, CPU)
    assert 1 <= len(found) <= 6
    assert len(set(found)) == len(found)
    for tile in found:
        assert tiles.fit(tile, CPU) == tile
        # Where products come from registers a pipeline of n stages has room for n - 1.
        stages = tile.stages - (gpu not in ("H200", "B200"))
        assert (tile.positions + tile.first + tile.second) * tile.step * 2 * stages <= GPUS[gpu].shared
        # Of a thread's 255 registers; other GPUs' products take their operands from there, too.
        assert tile.positions * (tile.first + tile.second) / (32 * tile.warps) <= 192
    # Only where there is a choice.
    assert {tile.descriptors for tile in found} == ({True, False} if _has_choice(kind, gpu, descriptors) else {True})


def _has_choice(kind, gpu, descriptors):
    return kind.op != "head_conv" and gpu == "RTX 5090" and descriptors


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090", "RTX 5090"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.op != "head_conv"], ids=str)
def test_narrow_settings_compute_little_for_nothing(monkeypatch, kind, gpu):
    monkeypatch.setattr(tiles, "gpu", lambda _: GPUS[gpu])
    own = kind.out_channels // kind.halves
    for tile in tiles.candidates(kind, CPU):
        width = tile.first + tile.second
        assert -(-own // width) * width <= 1.08 * own


@pytest.mark.parametrize("gpu", ["H200", "B200", "RTX 5090"])
def test_where_channels_are_no_multiple_of_16_bytes_settings_are_those_without_descriptors(monkeypatch, gpu):
    monkeypatch.setattr(tiles, "gpu", lambda _: GPUS[gpu])
    odd, even = (CONV._replace(channels=channels, out_channels=channels) for channels in (180, 184))

    def settings():
        return {kind: (tiles.candidates(kind, CPU), chosen(kind, LARGE)) for kind in (odd, even)}

    found = settings()
    monkeypatch.setattr(tiles, "DESCRIPTORS", False)
    without = settings()
    assert found[odd] == without[odd]
    assert found[even] != without[even]


def test_with_nothing_measured_the_shipped_speeds_choose():
    assert chosen(CONV, LARGE).positions == 128
    few = chosen(CONV, 10 * 20, frames=1)  # smaller programs are done first
    assert (few.positions, few.first + few.second) == (128, 128)
    assert chosen(LayerKind("conv", 96, 96, (3, 3, 3)), LARGE).positions == 256


@pytest.mark.parametrize(
    ("colours", "patch", "out_channels", "step"),
    [(3, 1, 96, 32), (3, 2, 160, 64), (4, 1, 96, 32)],  # Wan 2.1's, Wan 2.2's, one with transparency
)
def test_neighbourhoods_of_pixels_go_in_steps_that_are_fast(colours, patch, out_channels, step):
    channels = tap_channels(colours * patch**2)
    kind = LayerKind("conv", channels, out_channels, (3, 1, 1))
    for tile in tiles.candidates(kind, CPU):
        assert tile.step == step
        assert tile.first + tile.second == out_channels


def test_measured_speeds_choose_for_their_kind_dtype_and_device_alone():
    found = tiles.candidates(CONV, CPU)
    slow = chosen(CONV, LARGE)
    for i, tile in enumerate(found):
        speeds = tuple(1000.0 if j == i else 10.0 for j in range(len(found)))
        tiles.use({CONV: Measured(speeds, 0.0)}, CPU, BF16)
        assert chosen(CONV, LARGE) == tile
    assert chosen(CONV, LARGE, dtype=torch.float16) == slow
    other = CONV._replace(channels=192)
    assert chosen(other, LARGE).positions == 128


def test_a_setting_that_does_not_run_is_never_chosen():
    found = tiles.candidates(CONV, CPU)
    tiles.use({CONV: Measured((0.0,) * (len(found) - 1) + (1.0,), 500.0)}, CPU, BF16)
    assert {chosen(CONV, positions, frames) for positions in (1, 100, 10**6) for frames in (1, 4)} == {found[-1]}
    # Where none runs, cuDNN has the kind; the table stays for whoever asks.
    tiles._measured.clear()
    tiles.use({CONV: Measured((0.0,) * len(found), 500.0)}, CPU, BF16)
    assert chosen(CONV, LARGE).positions == 128


def test_the_choice_weighs_speed_against_turns_that_are_not_full():
    found = tiles.candidates(CONV, CPU)
    large, small = found[0], next(tile for tile in found if tile.positions == 64)
    speeds = {large: 700.0, small: 650.0}
    tiles.use({CONV: Measured(tuple(speeds.get(tile, 1.0) for tile in found), 0.0)}, CPU, BF16)
    turn = 132 * large.positions
    assert chosen(CONV, turn, frames=1) == large
    assert chosen(CONV, turn + 1, frames=1) == small  # 1.5 turns of the large one's time instead of 2
    assert chosen(CONV, 20 * turn + 1, frames=1) == large


@pytest.mark.parametrize(
    ("speeds", "cudnn", "lost"),
    [((500.0, 600.0), 659.0, False), ((500.0, 600.0), 661.0, True), ((0.0, 0.0), 1.0, True), ((1.0,), 0.0, False)],
)
def test_cudnn_has_to_be_faster_by_over_a_tenth(speeds, cudnn, lost):
    assert Measured(speeds, cudnn).lost == lost
