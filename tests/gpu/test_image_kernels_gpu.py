"""Images on the kernels: a third of each weight, frames of over 2^31 values, the bits of a video's first frame.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena; see kernel_tests.py
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu.kernel_tests import DEVICE, DTYPE, INTERPRETED, MARKS, SIZE, conv_problem, here, upsample_problem
from tests.oracle import load, oracle_vae, random_latents
from wan_vae_parallel.ops import conv as conv_ops
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured

pytestmark = MARKS
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import conv as conv_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import tiles  # noqa: E402


def images(size, channels, out_channels, kernel=(3, 3, 3)):
    """An arena, two slots of blank frames, those of images, a whole weight and its last third, a bias."""
    arena, slots, weight, bias = conv_problem(size, channels, out_channels, kernel=kernel, dtype=DTYPE)
    blank, own = slots[:2].clone(), slots[2:].clone()
    arena[blank.long()] = 0
    present = weight[:, :, -1:].contiguous(memory_format=torch.channels_last_3d)
    return arena, blank, own, weight, present, bias


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("channels", "out_channels"), here((32, 48), (16, 16), gpu=[(96, 96), (384, 384), (1152, 576)])
)
def test_a_third_of_the_weight_makes_the_same_bits_as_all_of_it_with_blank_frames(channels, out_channels, transposed):
    arena, blank, own, weight, present, bias = images(SIZE, channels, out_channels)
    together = conv_ops.conv(arena, own, present, bias, transposed=transposed)
    for i, slot in enumerate(own):
        alone = conv_ops.conv(arena, torch.cat([blank, slot[None]]), weight, bias, transposed=transposed)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out_channels", [3, 4, 12])
def test_so_does_the_head(out_channels, transposed):
    arena, blank, own, weight, present, bias = images((3, *SIZE[1:]), 32 if INTERPRETED else 96, out_channels)

    def head(slots, weight, count):
        prepared = conv_ops.prepare_head(weight, count, transposed=transposed)
        assert prepared is not None
        return conv_ops.head_conv(arena, slots, weight, bias, prepared=prepared, transposed=transposed)

    # In the interpreter sums depend on the tile's shape: of one image there, and of several elsewhere too.
    for count in (1,) if INTERPRETED else (1, 2, 3):
        together = head(own[:count].clone(), present, count)
        for i, slot in enumerate(own[:count]):
            assert torch.equal(together[i : i + 1], head(torch.cat([blank, slot[None]]), weight, 1))
    several = head(own, present, len(own))
    assert several.shape[0] == 3
    assert torch.allclose(several[:1].float(), head(own[:1].clone(), present, 1).float(), atol=1e-2, rtol=1e-2)


def test_places_of_64_bits_change_nothing():
    for kernel in ((3, 3, 3), (1, 3, 3)):
        arena, slots, weight, bias = conv_problem(SIZE, 32, 48, kernel=kernel, dtype=DTYPE)
        frames = len(slots) - kernel[0] + 1
        residual = torch.randn(frames, *SIZE[1:], 48, device=DEVICE).to(DTYPE)
        results = []
        for wide in (False, True):
            out = torch.full_like(residual, math.nan)
            conv_kernels.conv(
                arena, slots, weight, bias, residual=residual, out=out, out_slots=None, halves=1, transposed=False,
                wide=wide,
            )  # fmt: skip
            results.append(out)
        assert torch.equal(*results)
    _, (arena, slots, weight, bias) = upsample_problem(SIZE, 32, 48, dtype=DTYPE)
    shape = (len(slots), 2 * SIZE[1], 2 * SIZE[2], 48)
    results = []
    for wide in (False, True):
        out = torch.full(shape, math.nan, dtype=DTYPE, device=DEVICE)
        folded = conv_ops.fold_upsample_weight(weight)
        conv_kernels.upsample_conv(arena, slots, folded, bias, out=out, transposed=False, wide=wide)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("rows", "columns", "channels", "scale", "wide"),
    [
        (4096, 4096, 96, 1, False),  # Qwen-Image's last stage: 1.6 billion values
        (4096, 4096, 144, 1, True),  # Qwen-Image-2.1's
        (2048, 2048, 288, 2, True),  # what it upsamples to
        (8192, 8192, 96, 1, True),
    ],
)
def test_frames_of_over_2_to_the_31_values_are_the_kernels(rows, columns, channels, scale, wide):
    kind = LayerKind("conv" if scale == 1 else "upsample_conv", channels, channels, (1, 3, 3))
    geometry = conv_kernels._Geometry(
        kind, (1, rows + 2, columns + 2, channels), 1, channels, (1, 3, 3) if scale == 1 else (1, 2, 2),
        (channels, 9 * channels), 2, None, (1, rows * scale, columns * scale, channels), None, False, None, True,
        DTYPE, DEVICE, 0,
    )  # fmt: skip
    _, call, *_ = conv_kernels._plan(geometry)
    assert call._options["WIDE"] == wide
    arena = torch.empty((1, rows + 2, columns + 2, channels), dtype=DTYPE, device="meta")
    weight = torch.empty((channels, channels, 1, 3, 3), dtype=DTYPE, device="meta")
    assert conv_kernels.takes(arena, weight, scale=scale)


def test_images_layers_take_the_settings_that_were_measured_for_videos(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    video = LayerKind("conv", 96, 96, (3, 3, 3))
    candidates = tiles.candidates(video, DEVICE)
    slow = [1.0] * len(candidates)
    slow[-1] = 1000.0
    tiles.use({video: Measured(tuple(slow), 0.0)}, DEVICE, DTYPE)
    arguments = {"frame_positions": 10**6, "frames": 1, "dtype": DTYPE, "device": DEVICE}
    assert tiles.choose_tile(video, **arguments) == candidates[-1]
    assert tiles.choose_tile(video._replace(kernel=(1, 3, 3)), **arguments) == candidates[-1]


@pytest.mark.skipif(INTERPRETED, reason="a whole decoder takes the interpreter minutes")
@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_images_of_a_batch_have_the_bits_of_videos_first_frames(family):
    oracle = oracle_vae(family, width=96)
    latents = random_latents(family, frames=2, rows=9, columns=14, batch=3)
    with load(oracle, dtype="bfloat16", devices="cuda:0") as vae:
        videos = vae.decode(latents)
        for chunk in ("auto", 1, 2):
            vae.chunk = chunk
            assert torch.equal(vae.decode(latents[:, :, :1]), videos[:, :1]), chunk
