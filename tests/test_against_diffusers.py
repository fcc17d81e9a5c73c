"""The engine's frames against those of diffusers' AutoencoderKLWan, with the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan
from safetensors.torch import save_file

import wan_vae_parallel as wvp
from tests.oracle import (
    FAMILIES,
    RATIO,
    load,
    max_error,
    oracle_frames,
    oracle_vae,
    original_state_dict,
    random_latents,
)

# What the project promises in fp32; a layer left out or a frame shifted errs by 0.1 and more.
FP32_BOUND = 1e-4
FP64_BOUND = 1e-9


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    return oracle_vae(family)


@pytest.mark.parametrize("chunk", [1, 2, 3, "auto", 100], ids=lambda chunk: f"chunk={chunk}")
@pytest.mark.parametrize(
    ("frames", "rows", "columns"),
    [
        (1, 2, 2),  # an image: only the first latent frame, which skips every time convolution
        (2, 5, 7),  # one chunk behind the first frame; odd sides
        (3, 1, 1),  # the smallest picture: every convolution reads mostly zeros
        (6, 3, 2),  # chunks that don't divide what follows the first frame
        (3, 1, 4),  # one row: row strides mean nothing there
        (2, 4, 1),  # one column
    ],
)
def test_fp32_is_within_the_bound_for_any_shape_and_chunk(family, oracle, frames, rows, columns, chunk):
    latents = random_latents(family, frames=frames, rows=rows, columns=columns)
    decoded = load(oracle, chunk=chunk).decode(latents)
    ratio = RATIO[family]
    assert decoded.shape == (1, 4 * frames - 3, rows * ratio, columns * ratio, 3)
    assert decoded.dtype == torch.float32
    assert max_error(decoded, oracle_frames(oracle, latents)) <= FP32_BOUND


def test_a_batch_decodes_each_video_as_if_alone(family, oracle):
    latents = random_latents(family, batch=2, frames=3, rows=3, columns=5)
    decoded = load(oracle, chunk=2).decode(latents)
    assert max_error(decoded, oracle_frames(oracle, latents)) <= FP32_BOUND


def test_fp64_agrees_to_nine_digits(family, monkeypatch):
    # diffusers upsamples in fp32 whatever the dtype (`x.float()`), which would be the larger error by far here.
    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", torch.nn.Upsample.forward)
    oracle = oracle_vae(family).double()
    latents = random_latents(family, frames=4, rows=3, columns=5).double()
    decoded = load(oracle, dtype="float64", chunk=2).decode(latents)
    assert decoded.dtype == torch.float64
    assert max_error(decoded, oracle_frames(oracle, latents)) <= FP64_BOUND


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.", "vae."])
def test_both_key_layouts_under_every_prefix(family, oracle, tmp_path, layout, prefix):
    tensors = original_state_dict(oracle) if layout == "original" else oracle.state_dict()
    path = tmp_path / "vae.safetensors"
    save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    latents = random_latents(family, frames=2, rows=2, columns=3)
    with wvp.load_vae(path, devices="cpu") as vae:
        assert max_error(vae.decode(latents), oracle_frames(oracle, latents)) <= FP32_BOUND


@pytest.mark.parametrize("width", [16, 24, 32], ids=lambda width: f"width={width}")  # 24, 32: pruned relatives
def test_other_widths(family, width):
    oracle = oracle_vae(family, width=width, seed=2)
    latents = random_latents(family, frames=3, rows=2, columns=3)
    vae = load(oracle)
    assert vae.architecture.width == width
    assert max_error(vae.decode(latents), oracle_frames(oracle, latents)) <= FP32_BOUND


def test_other_latent_channels_and_frames_with_alpha(family):
    oracle = oracle_vae(family, z_dim=12, colours=4)
    latents = random_latents(family, frames=3, rows=2, columns=3, z_dim=12)
    vae = load(oracle)
    assert (vae.architecture.z_dim, vae.architecture.output_channels) == (12, 4)
    assert max_error(vae.decode(latents), oracle_frames(oracle, latents)) <= FP32_BOUND


def test_one_latent_frame_without_its_axis(family, oracle):
    latents = random_latents(family, batch=2, frames=1, rows=2, columns=3)
    decoded = load(oracle).decode(latents[:, :, 0])
    assert max_error(decoded, oracle_frames(oracle, latents)) <= FP32_BOUND


@pytest.mark.parametrize(
    ("family", "width", "rows", "columns"),
    [
        ("wan2.1", 96, 3, 2),  # as published
        # As published; 2.2 GB of weights, so as few pixels as make sense.
        pytest.param("wan2.2", 256, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_published_widths(family, width, rows, columns):
    oracle = oracle_vae(family, width=width)
    latents = random_latents(family, frames=2, rows=rows, columns=columns)
    expected = oracle_frames(oracle, latents)
    vae = load(oracle)
    # The oracle's encoder of Wan 2.2 is a narrow one.
    published = wvp.Architecture.published(family)
    assert vae.architecture == dataclasses.replace(published, encoder_width=oracle.config.base_dim)
    assert max_error(vae.decode(latents), expected) <= FP32_BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_at_most_as_much_as_diffusers_in_it(family, dtype):
    """Both round at many places, so their errors vary: 1.5 is the margin for that, not for a mistake."""
    oracle = oracle_vae(family, width=16)
    latents = random_latents(family, frames=3, rows=3, columns=4)
    exact = oracle_frames(oracle, latents)
    decoded = load(oracle, dtype=dtype).decode(latents)
    half = getattr(torch, dtype)
    peer = oracle_frames(oracle.to(half), latents.to(half))
    assert (decoded - exact).abs().mean() <= 1.5 * (peer.float() - exact).abs().mean()
