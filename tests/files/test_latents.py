"""Which latents are decoded, and what is said about the others."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from safetensors.torch import save_file

from wan_vae_parallel import Architecture, LatentError
from wan_vae_parallel.files.latents import check_latents, denormalize, read_latents
from wan_vae_parallel.ops.dispatch import say_once

WAN21, WAN22 = Architecture.published("wan2.1"), Architecture.published("wan2.2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", [WAN21, WAN22], ids=lambda architecture: architecture.family)
def test_good_latents_pass_as_they_are(architecture, dtype):
    latents = torch.zeros(2, architecture.z_dim, 3, 4, 5, dtype=dtype)
    assert check_latents(latents, architecture) is latents


def test_four_axes_are_one_latent_frame_each():
    latents = torch.randn(2, 16, 4, 5)
    checked = check_latents(latents, WAN21)
    assert checked.shape == (2, 16, 1, 4, 5)
    assert checked.data_ptr() == latents.data_ptr()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 7])
def test_values_that_are_not_finite_are_counted(value, count):
    latents = torch.zeros(1, 16, 2, 3, 3)
    latents.view(-1)[-count:] = value
    with pytest.raises(LatentError, match=f"{count} NaN or infinite values of 288; .* look at the sampler's settings"):
        check_latents(latents, WAN21)


def test_nan_and_infinity_are_counted_together():
    latents = torch.zeros(1, 16, 1, 1, 1)
    latents[0, 0], latents[0, 3], latents[0, 5] = math.nan, math.inf, -math.inf
    with pytest.raises(LatentError, match="3 NaN or infinite values of 16"):
        check_latents(latents, WAN21)


@pytest.mark.parametrize(
    ("architecture", "channels", "advice"),
    [
        (WAN21, 48, "this is a Wan 2.1 VAE and takes 16; these are latents of the Wan 2.2 5B model: load the VAE"),
        (
            WAN22,
            16,
            r"this is a Wan 2.2 VAE and takes 48; these are latents of Wan 2.1 \(and the Wan 2.2 14B models, and",
        ),
        (WAN21, 4, "takes 16; connect the VAE that the video was sampled for"),  # an image model's
        (WAN22, 128, "takes 48; connect the VAE that the video was sampled for"),
    ],
)
def test_wrong_channels_are_told_with_the_model_that_they_belong_to(architecture, channels, advice):
    with pytest.raises(LatentError, match=rf"latents have {channels} channels, but .*{advice}"):
        check_latents(torch.zeros(1, channels, 2, 3, 3), architecture)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(LatentError, match=f"latents are {dtype}; they must be floating point"):
        check_latents(torch.zeros(1, 16, 2, 3, 3, dtype=dtype), WAN21)


@pytest.mark.parametrize(
    "shape", [(0, 16, 2, 3, 3), (1, 16, 0, 3, 3), (1, 16, 2, 0, 3), (1, 16, 2, 3, 0), (1, 16, 0, 3)]
)
def test_empty_latents_are_refused(shape):
    with pytest.raises(LatentError, match=r"latents are empty, .* every axis must be at least 1"):
        check_latents(torch.zeros(shape), WAN21)


@pytest.mark.parametrize("shape", [(), (16,), (16, 3), (1, 1, 16, 2, 3, 3)])
def test_other_numbers_of_axes_are_refused(shape):
    with pytest.raises(LatentError, match=rf"latents have {len(shape)} axes .* five, \[B, C, T, h, w\], or four"):
        check_latents(torch.zeros(shape), WAN21)


@pytest.mark.parametrize(
    ("latents", "name"),
    [(None, "NoneType"), ({"samples": 0}, "dict"), (numpy.zeros((1, 16, 2, 3, 3)), "ndarray"), ([[0.0]], "list")],
)
def test_what_is_no_tensor_is_refused(latents, name):
    # A whole ComfyUI LATENT instead of its samples is the likely one.
    with pytest.raises(LatentError, match=f"latents are a {name}; they must be a torch tensor"):
        check_latents(latents, WAN21)


@pytest.mark.parametrize("architecture", [WAN21, WAN22], ids=lambda architecture: architecture.family)
def test_denormalize_is_std_times_latent_plus_mean_by_channel(architecture):
    latents = torch.randn(2, architecture.z_dim, 2, 3, 4)
    expected = torch.stack(
        [
            latents[:, channel] * architecture.latents_std[channel] + architecture.latents_mean[channel]
            for channel in range(architecture.z_dim)
        ],
        dim=1,
    )
    torch.testing.assert_close(denormalize(latents, architecture), expected)


def test_the_published_statistics_are_diffusers():
    from diffusers import AutoencoderKLWan

    config = AutoencoderKLWan(base_dim=8).config
    assert WAN21.latents_mean == tuple(config.latents_mean)
    assert WAN21.latents_std == tuple(config.latents_std)
    assert len(WAN22.latents_mean) == len(WAN22.latents_std) == 48


def test_denormalize_does_not_round_to_bf16():
    latents = torch.full((1, 16, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    denormalized = denormalize(latents, WAN21)
    assert denormalized.dtype == torch.float32
    assert denormalized[0, 0].item() == pytest.approx(2.8184 - 0.7571, abs=1e-6)


@pytest.mark.parametrize(("family", "z_dim"), [("wan2.1", 48), ("wan2.2", 16), ("wan2.1", 12)])
def test_denormalize_refuses_channels_without_published_statistics(family, z_dim):
    architecture = Architecture(family=family, z_dim=z_dim, width=8)
    with pytest.raises(LatentError, match=f"none are published for Wan .* with {z_dim} channels; de-normalise them"):
        denormalize(torch.zeros(1, z_dim, 1, 1, 1), architecture)


def film(frames, channels, rows=6, columns=7, seed=0):
    """``[T, C, h, w]`` as a model's are: channels that differ, and frames that follow one another."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, channels, rows, columns, generator=generator)
    steps = 0.2 * torch.randn(frames, channels, rows, columns, generator=generator)
    return still + steps.cumsum(0)


@pytest.mark.parametrize("frames", [1, 5, 21])
@pytest.mark.parametrize(
    ("order", "shaped"),
    [
        ("[B, T, C, h, w]", lambda film: film[None]),
        ("[B, T, h, w, C]", lambda film: film[None].movedim(2, 4)),
        ("[C, T, h, w]", lambda film: film.movedim(0, 1)),
    ],
)
def test_another_order_is_taken_where_it_alone_fits_and_said(frames, order, shaped, caplog):
    say_once.cache_clear()
    latents = film(frames, 16)
    checked = check_latents(shaped(latents), WAN21)
    assert torch.equal(checked, latents.movedim(0, 1)[None])
    assert f"latents are taken as {order}: of the orders that are known it alone has the 16 channels" in caplog.text


def test_one_picture_without_its_batch():
    picture = torch.randn(16, 3, 4)
    assert torch.equal(check_latents(picture, WAN21), picture[None, :, None])


def test_orders_of_which_several_fit_are_shown():
    with pytest.raises(LatentError, match=r"have 16 channels as \[B, h, w, C\] or \[T, h, w, C\], and it is not clear"):
        check_latents(torch.zeros(5, 3, 4, 16), WAN21)
    with pytest.raises(LatentError, match=r"as \[C, T, h, w\] or \[B, h, w, C\] or \[T, h, w, C\]"):
        check_latents(torch.zeros(16, 5, 4, 16), WAN21)
    with pytest.raises(LatentError, match=r"have 48 channels as \[B, T, C, h, w\] or \[B, T, h, w, C\]"):
        check_latents(torch.zeros(1, 5, 48, 4, 48), WAN22)


@pytest.mark.parametrize(
    ("architecture", "shape", "advice"),
    [
        (WAN21, (1, 48, 5, 8, 16), "latents of the Wan 2.2 5B model: load the VAE"),  # 256 pixels wide
        (WAN21, (1, 48, 16, 8, 9), "latents of the Wan 2.2 5B model"),  # 61 frames
        (WAN21, (16, 48, 8, 9), "latents of the Wan 2.2 5B model"),  # 16 pictures
        (WAN21, (1, 48, 8, 16), "latents of the Wan 2.2 5B model"),
        (WAN22, (1, 16, 48, 8, 9), r"latents of Wan 2\.1"),
        (WAN21, (1, 36, 5, 8, 16), "what an image-to-video model reads: noise, a mask"),
        (WAN21, (1, 32, 16, 8, 9), "twice as many are mean and log variance"),
        (WAN21, (1, 128, 5, 8, 16), "connect the VAE that the video was sampled for"),
        (WAN21, (1, 24, 5, 8, 16), "connect the VAE that the video was sampled for"),
    ],
)
@pytest.mark.parametrize("kind", ["film", "noise"])
def test_another_models_latents_with_our_channels_elsewhere_are_told_by_them(architecture, shape, advice, kind):
    batch, channels, frames, rows, columns = shape if len(shape) == 5 else (*shape[:2], 1, *shape[2:])
    videos = [film(frames, channels, rows, columns, seed=i) for i in range(batch)]
    latents = torch.stack(videos).movedim(1, 2).reshape(shape)
    # In rows and columns too, as pictures are; of 24 channels, which may be frames, noise does not tell.
    if kind == "film" or channels == 24:
        latents = torch.nn.functional.avg_pool3d(latents.flatten(0, -4)[None], (1, 3, 3), 1, (0, 1, 1))[0].view(shape)
    else:
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        LatentError, match=rf"have {channels} channels, but .*{advice}.*, or if they are \[.*, permute them to \[B, C"
    ):
        check_latents(latents, architecture)


def test_as_many_frames_of_another_order_as_another_model_has_channels_are_told_by_their_values():
    for frames, architecture in ((48, WAN21), (32, WAN21), (16, WAN22)):
        latents = film(frames, architecture.z_dim)
        checked = check_latents(latents[None], architecture)
        assert torch.equal(checked, latents.movedim(0, 1)[None])


def test_orders_that_mean_the_same_are_no_question():
    picture = torch.randn(1, 16, 3, 4)
    assert torch.equal(check_latents(picture.movedim(1, 3), WAN21), picture.unsqueeze(2))
    assert torch.equal(check_latents(picture[0].movedim(0, 2), WAN21), picture.unsqueeze(2))
    # Of a VAE that knows no time there are only pictures.
    pictures = torch.randn(3, 64, 2, 4)
    assert torch.equal(
        check_latents(pictures.movedim(1, 3), Architecture.published("qwen-image-2.1")), pictures.unsqueeze(2)
    )


@pytest.mark.parametrize("seed", range(3))
def test_as_many_frames_as_channels_are_told_by_their_values(seed):
    latents = film(16, 16, seed=seed)
    # As documented: 61 frames, and 16 pictures.
    video, pictures = latents.movedim(0, 1)[None], torch.stack([film(1, 16, seed=10 + i)[0] for i in range(16)])
    assert check_latents(video, WAN21) is video
    assert check_latents(pictures, WAN21).shape == (16, 16, 1, 6, 7)
    with pytest.raises(
        LatentError, match=r"can be \[B, C, T, h, w\] or \[B, T, C, h, w\], and their values say the lat"
    ):
        check_latents(latents[None], WAN21)
    with pytest.raises(
        LatentError, match=r"can be \[B, C, h, w\] or \[C, T, h, w\], and their values .* permute them to"
    ):
        check_latents(latents.movedim(0, 1), WAN21)


@pytest.mark.parametrize(
    "latents", [torch.randn(1, 16, 16, 5, 16), torch.zeros(1, 16, 16, 5, 5), torch.randn(16, 16, 4, 4)]
)
def test_noise_and_nothing_are_taken_as_documented(latents):
    checked = check_latents(latents, WAN21)
    assert torch.equal(checked, latents if latents.dim() == 5 else latents.unsqueeze(2))


@pytest.mark.parametrize(
    ("architecture", "channels", "advice"),
    [
        (WAN21, 32, "twice as many are mean and log variance, as an encoder makes them: take the first 16, the mean"),
        (WAN22, 96, "twice as many are mean and log variance, .*: take the first 48"),
        (
            WAN21,
            36,
            "an image-to-video model reads: noise, a mask of 4 and the picture's latents. Take what the sampler",
        ),
        (WAN21, 20, "an image-to-video model's condition, a mask of 4 and latents: take the last 16"),
    ],
)
def test_other_channels_that_are_known_get_advice_of_their_own(architecture, channels, advice):
    with pytest.raises(LatentError, match=advice):
        check_latents(torch.zeros(1, channels, 2, 3, 3), architecture)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("samples", {"noise_mask": torch.ones(1, 1, 2, 3, 3)}),
        ("samples", {"noise_mask": torch.ones(1, 3, 3), "batch_index": torch.arange(1)}),
        ("latents", {"latents_mean": torch.zeros(1, 16, 1, 1, 1), "latents_std": torch.ones(1, 16, 1, 1, 1)}),
        ("latent", {"mask": torch.ones(1, 1, 2, 3, 3)}),
        ("anything", {"latents_mean": torch.zeros(1, 16, 1, 1, 1), "latents_std": torch.ones(1, 16, 1, 1, 1)}),
        ("Samples", {"other": torch.ones(1, 1, 2, 3, 3)}),
        ("latent.samples", {"latent.noise_mask": torch.ones(1, 1, 2, 3, 3)}),
        ("video_latents", {"audio_latents": torch.ones(1, 8, 2, 3, 1)}),
        ("latent_tensor", {}),
    ],
)
def test_latents_beside_other_tensors(tmp_path, name, beside):
    latents = torch.randn(1, 16, 2, 3, 3)
    save_file({name: latents, **beside}, tmp_path / "latents.safetensors")
    assert torch.equal(read_latents(tmp_path / "latents.safetensors"), latents)


def test_one_picture_without_its_batch_is_read(tmp_path):
    save_file({"x": torch.zeros(16, 3, 3)}, tmp_path / "latents.safetensors")
    assert read_latents(tmp_path / "latents.safetensors").shape == (16, 3, 3)


def test_a_models_weights_are_no_latents(tmp_path):
    tensors = {f"decoder.{i}.weight": torch.zeros(1, 1, 1, 1, 1) for i in range(6)}
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(LatentError, match=r"has 6 tensors, a model's weights and no latents; name a \.latent"):
        read_latents(tmp_path / "vae.safetensors")
