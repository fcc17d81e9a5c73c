"""Wan's relatives against their oracles: diffusers' classes, or the published formula on top of them.

What loads without a difference in structure (Qwen-Image, pruned widths, alpha) is here too, by the names people know.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21

import wan_vae_parallel as wvp
from tests.oracle import max_error, oracle_vae, original_state_dict, randomise
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.memory import decode_memory, largest_chunk

FP32_BOUND = 1e-4
FP64_BOUND = 1e-9


def seeded(*shape, of=torch.randn):
    return of(shape, generator=torch.Generator().manual_seed(1))


def pictures(sample: torch.Tensor) -> torch.Tensor:
    """``[B, C, T, H, W]`` in [-1, 1] as frames; checked to be worth comparing with."""
    frames = ((sample + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert frames.std() > 0.05
    assert ((frames == 0) | (frames == 1)).float().mean() < 0.4
    return frames


@pytest.fixture(scope="module")
def qwen21():
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=12)
    return randomise(vae)


@pytest.fixture(scope="module")
def qwen21_layouts(qwen21):
    """Its tensors under diffusers' keys, with convolutions of four axes, and under Wan 2.2's, with five."""
    original = {}
    for key, tensor in original_state_dict(qwen21).items():
        if key.endswith("weight") and tensor.dim() == 4 and ".resample." not in key and "to_qkv" not in key:
            tensor = tensor if ".proj." in key else tensor.unsqueeze(2)
        original[key] = tensor
    return {"diffusers": dict(qwen21.state_dict()), "original": original}


@torch.no_grad()
def qwen21_images(qwen21, latents):
    return pictures(qwen21.decode(latents).sample)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("batch", [1, 3])
def test_qwen_image_21_decodes(qwen21, qwen21_layouts, layout, batch):
    latents = seeded(batch, 64, 1, 3, 2)
    with wvp.vae_from_state_dict(qwen21_layouts[layout], "cpu", "float32", 2) as vae:
        assert vae.architecture == wvp.Architecture(
            family="qwen-image-2.1", z_dim=64, width=12, output_channels=4, encoder_width=8
        )
        assert vae.architecture.multipliers == (8, 8, 4, 2, 1)
        images = vae.decode(latents)
        assert images.shape == (batch, 1, 48, 32, 4)
        assert max_error(images, qwen21_images(qwen21, latents)) <= FP32_BOUND
        # Without the axis of time: what ComfyUI passes for images.
        assert torch.equal(vae.decode(latents[:, :, 0]), images)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_qwen_image_21_encodes(qwen21, qwen21_layouts, layout):
    images = seeded(2, 1, 48, 32, 4, of=torch.rand)
    expected = qwen21.encode((images * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    assert expected.std() > 0.05
    with wvp.vae_from_state_dict(qwen21_layouts[layout], "cpu", "float32") as vae:
        assert max_error(vae.encode(images), expected) <= FP32_BOUND
        mean, std = (
            torch.tensor(one).view(1, -1, 1, 1, 1) for one in (qwen21.config.latents_mean, qwen21.config.latents_std)
        )
        torch.testing.assert_close(vae.encode(images, normalized=True), (expected - mean) / std, atol=1e-4, rtol=1e-4)


def test_qwen_image_21_on_two_devices(qwen21, qwen21_layouts):
    latents = seeded(2, 64, 1, 4, 3)
    with wvp.vae_from_state_dict(qwen21_layouts["original"], "cpu,cpu", "float32") as vae:
        images = vae.decode(latents)
        assert max_error(images, qwen21_images(qwen21, latents)) <= FP32_BOUND
        with torch.no_grad():
            expected = qwen21.encode((images * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        assert max_error(vae.encode(images), expected) <= FP32_BOUND


def test_qwen_image_21_makes_pictures_alone(qwen21_layouts):
    with wvp.vae_from_state_dict(qwen21_layouts["original"], "cpu") as vae:
        with pytest.raises(
            wvp.LatentError, match=r"have 2 latent frames, and Qwen-Image-2\.1 knows no time.*\[B, C, 1, h"
        ):
            vae.decode(torch.zeros(1, 64, 2, 2, 2))
        with pytest.raises(wvp.FrameError, match=r"have 5 frames, and Qwen-Image-2\.1 knows no time.*\[B, 1, H, W, C"):
            vae.encode(torch.zeros(1, 5, 32, 32, 4))
        with pytest.raises(wvp.FrameError, match="have 3 frames, and"):
            list(vae.encode_stream(iter([torch.zeros(1, 32, 32, 4), torch.zeros(2, 32, 32, 4)])))
        with pytest.raises(wvp.LatentError, match=r"takes 64; these are latents of Wan 2.1"):
            vae.decode(torch.zeros(1, 16, 1, 2, 2))


def test_qwen_image_21s_statistics_are_published():
    published = wvp.Architecture.published("qwen-image-2.1")
    with torch.device("meta"):
        config = AutoencoderKLQwenImage21().config
    assert published.latents_mean == tuple(config.latents_mean)
    assert published.latents_std == tuple(config.latents_std)
    assert (published.width, published.encoder_width) == (config.decoder_base_dim, config.base_dim)


def test_qwen_image_21_as_published_is_read_off_its_shapes():
    with torch.device("meta"):
        published = AutoencoderKLQwenImage21()
    checkpoint = checkpoint_from_state_dict(published.state_dict(), source="the published", described=True)
    assert checkpoint.architecture == wvp.Architecture.published("qwen-image-2.1")
    parameters = sum(t.numel() for t in (*checkpoint.decoder.values(), *checkpoint.encoder.values()))
    assert parameters == sum(parameter.numel() for parameter in published.parameters())


@pytest.fixture(scope="module")
def upscaler():
    """A Wan 2.1 VAE whose decoder makes 12 channels, its encoder three colours as any."""
    return oracle_vae("wan2.1", colours=3, colours_out=12)


@torch.no_grad()
def doubled(upscaler, latents):
    """The published formula: `pixel_shuffle` of the decoder's channels, frame by frame."""
    sample = upscaler.decode(latents).sample
    frames = F.pixel_shuffle(sample.movedim(2, 1).flatten(0, 1), 2).unflatten(0, (len(latents), -1)).movedim(1, 2)
    return pictures(frames)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("encoder", [True, False], ids=["whole", "decoder alone"])
def test_upscale2x_makes_frames_of_twice_the_size(upscaler, layout, encoder):
    tensors = dict(upscaler.state_dict()) if layout == "diffusers" else original_state_dict(upscaler)
    if not encoder:
        tensors = {key: t for key, t in tensors.items() if not key.startswith(("encoder.", "quant_conv.", "conv1."))}
    latents = seeded(1, 16, 3, 3, 2)
    with wvp.vae_from_state_dict(tensors, "cpu", "float32") as vae:
        assert (vae.architecture.upscale, vae.architecture.output_channels) == (2, 3)
        assert (vae.architecture.spatial_ratio, vae.architecture.encode_ratio) == (16, 8)
        assert vae.architecture.name == "Wan 2.1 upscale2x"
        frames = vae.decode(latents)
        assert frames.shape == (1, 9, 48, 32, 3)
        assert max_error(frames, doubled(upscaler, latents)) <= FP32_BOUND
        # One latent frame: images.
        assert max_error(vae.decode(latents[:, :, :1]), doubled(upscaler, latents[:, :, :1])) <= FP32_BOUND


def test_upscale2x_encodes_frames_of_the_ordinary_size(upscaler):
    frames = seeded(1, 5, 24, 16, 3, of=torch.rand)
    with torch.no_grad():
        expected = upscaler.encode((frames * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    with wvp.vae_from_state_dict(upscaler.state_dict(), "cpu", "float32") as vae:
        assert vae.latent_shape(frames.shape) == expected.shape
        assert max_error(vae.encode(frames), expected) <= FP32_BOUND


def test_upscale2x_on_two_devices_along_either_axis(upscaler):
    with wvp.vae_from_state_dict(upscaler.state_dict(), "cpu,cpu", "float32") as vae:
        for rows, columns in ((4, 2), (3, 4)):  # rows are split, and columns
            latents = seeded(1, 16, 2, rows, columns)
            assert max_error(vae.decode(latents), doubled(upscaler, latents)) <= FP32_BOUND
        frames = seeded(1, 5, 32, 16, 3, of=torch.rand)
        with torch.no_grad():
            expected = upscaler.encode((frames * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        assert max_error(vae.encode(frames), expected) <= FP32_BOUND


@pytest.mark.parametrize(("made", "taken"), [(12, 12), (6, None), (5, 3), (2, 2), (27, 3), (3, 12)])
def test_heads_and_encoders_of_other_numbers_of_colours_are_refused(made, taken):
    """They would give frames that nothing takes, as patches that were not put together do."""
    tensors = original_state_dict(oracle_vae("wan2.1", colours=taken or 3, colours_out=made))
    if taken is None:
        tensors = {key: t for key, t in tensors.items() if not key.startswith(("encoder.", "conv1."))}
    with pytest.raises(
        wvp.CheckpointError, match=r"its pictures have \d+ colours by .*; known are 1, 3 and 4, and of an up"
    ):
        checkpoint_from_state_dict(tensors, source="vae.safetensors")


def test_upscale2x_is_planned_with_the_memory_of_its_frames():
    ordinary = wvp.Architecture.published("wan2.1")
    double = dataclasses.replace(ordinary, upscale=2)
    assert double.frame_size(90, 160) == (1440, 2560)
    settings = {"chunk": 4, "dtype": torch.bfloat16, "kernels": True}
    more = (
        decode_memory(double, (1, 21, 90, 160), **settings).step
        - decode_memory(ordinary, (1, 21, 90, 160), **settings).step
    )
    # Three times as many pixels more: of four frames in fp32 twice, and once in bf16.
    assert more == 3 * 4 * 720 * 1280 * 3 * (2 * 4 + 2)
    # And with the chunk of the ordinary one, which computes as many positions.
    chunks = [
        largest_chunk(one, (1, 21, 90, 160), dtype=torch.bfloat16, free=2**40, kernels=True)
        for one in (ordinary, double)
    ]
    assert chunks == [4, 4]


def test_upscale2x_needs_the_hosts_memory_before_it_starts(upscaler, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.memory.free_memory", lambda _: 200_000)
    with wvp.vae_from_state_dict(upscaler.state_dict(), "cpu", "float32") as vae:
        with pytest.raises(wvp.OutOfMemoryError, match="9 frames of 64x64 take"):
            vae.decode(torch.zeros(1, 16, 3, 4, 4))
        assert not vae.loaded


@pytest.mark.parametrize("chunk", ["auto", 1])
@pytest.mark.parametrize(
    ("oracle", "shape"),
    [
        (lambda: oracle_vae("wan2.1", colours=4), (1, 16, 2, 5, 4)),
        (lambda: oracle_vae("wan2.1", width=6), (1, 16, 2, 3, 5)),
        (lambda: oracle_vae("wan2.2", width=12), (1, 48, 2, 4, 3)),
        (lambda: qwen_image(), (3, 16, 1, 3, 4)),
    ],
    ids=["layered", "pruned Wan 2.1", "pruned Wan 2.2", "images of Qwen-Image"],
)
def test_relatives_on_two_devices(oracle, shape, chunk):
    oracle, latents = oracle(), seeded(*shape)
    with torch.no_grad():
        expected = pictures(oracle.decode(latents).sample)
        frames = seeded(*expected.shape, of=torch.rand)
        means = [oracle.encode((one[None] * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode() for one in frames]
    with wvp.vae_from_state_dict(oracle.state_dict(), "cpu,cpu", "float32", chunk) as vae:
        assert max_error(vae.decode(latents), expected) <= FP32_BOUND
        assert max_error(vae.encode(frames), torch.cat(means)) <= FP32_BOUND


def test_layered_images_have_alpha():
    """qwen_image_layered_vae: four colours both ways; layers are frames."""
    oracle = oracle_vae("wan2.1", colours=4)
    latents = seeded(1, 16, 2, 3, 2)
    with torch.no_grad():
        expected = pictures(oracle.decode(latents).sample)
    with wvp.vae_from_state_dict(oracle.state_dict(), "cpu", "float32") as vae:
        frames = vae.decode(latents)
        assert frames.shape == (1, 5, 24, 16, 4)
        assert max_error(frames, expected) <= FP32_BOUND
        # A picture without alpha is opaque, as ComfyUI has it.
        opaque = torch.cat([frames[..., :3], torch.ones_like(frames[..., :1])], dim=-1)
        assert torch.equal(vae.encode(frames[..., :3]), vae.encode(opaque))


def qwen_image():
    with torch.device("meta"):
        oracle = AutoencoderKLQwenImage(base_dim=8, z_dim=16)
    return randomise(oracle)


def test_qwen_image_is_wan_21_by_another_name(tmp_path):
    oracle = qwen_image()
    oracle.save_pretrained(tmp_path / "vae")
    latents = seeded(3, 16, 1, 3, 2)
    with torch.no_grad():
        expected = pictures(oracle.decode(latents).sample)
    with wvp.load_vae(tmp_path, "cpu", "float32") as vae:  # of the pipeline's root folder
        assert vae.architecture == wvp.Architecture.published("wan2.1", width=8)
        assert max_error(vae.decode(latents), expected) <= FP32_BOUND


@pytest.mark.parametrize("width", [8, 12])
def test_pruned_wan_22(width):
    oracle = oracle_vae("wan2.2", width=width, encoder_width=12)
    latents = seeded(1, 48, 2, 2, 2)
    with torch.no_grad():
        expected = pictures(oracle.decode(latents).sample)
    with wvp.vae_from_state_dict(original_state_dict(oracle), "cpu", "float32") as vae:
        assert max_error(vae.decode(latents), expected) <= FP32_BOUND
