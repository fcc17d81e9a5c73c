"""Decodes within what a host program may have set up: autocast, a default device, torch.compile; and dtypes' limits."""

from __future__ import annotations

import functools

import pytest
import torch

import wan_vae_parallel as wvp
from tests.oracle import load, oracle_vae, random_latents


@pytest.fixture(scope="module")
def oracle():
    return oracle_vae("wan2.1")


@pytest.fixture(scope="module")
def vae(oracle):
    with load(oracle, chunk=2) as vae:
        yield vae


@pytest.fixture(scope="module")
def latents():
    return random_latents("wan2.1", frames=6, rows=2, columns=3)


def test_nan_in_any_chunk_is_told(oracle, latents):
    # fp16 overflows from the second latent frame on.
    weights = dict(oracle.state_dict())
    weights["post_quant_conv.weight"] = 100 * weights["post_quant_conv.weight"]
    large = latents.clone()
    large[:, :, 1:] *= 1e4
    with wvp.vae_from_state_dict(weights, devices="cpu", chunk=1, dtype="float16") as vae:
        assert vae.decode(latents).isfinite().all()
        seen = []
        with pytest.raises(wvp.DeviceError, match="frames are NaN: in float16 the activations overflow"):
            vae.decode(large, on_chunk=lambda done, *_: seen.append(done))
        assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(vae, latents, dtype):
    expected = vae.decode(latents)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(vae.decode(latents), expected)
        assert torch.is_autocast_enabled("cpu")


def test_a_default_device_changes_nothing(oracle, latents):
    with load(oracle) as vae:
        expected = vae.decode(latents)
    with torch.device("meta"), load(oracle) as vae:
        decoded = vae.decode(latents)
        assert decoded.device == torch.device("cpu")
        assert torch.equal(torch.cat(list(vae.decode_stream(latents)), dim=1), expected)
    assert torch.equal(decoded, expected)


def test_a_default_device_and_inference_mode_change_nothing_of_files(vae, latents, tmp_path):
    sound = torch.rand(1, 48000) - 0.5
    vae.decode_to_video(latents, tmp_path / "a.mkv", format="ffv1", audio=(sound, 48000))
    vae.decode_to_video(latents, tmp_path / "a.safetensors")
    with torch.device("meta"), torch.inference_mode():
        taken = []
        options = {"format": "ffv1", "audio": (sound, 48000), "on_chunk": lambda *call: taken.append(call[2](2))}
        vae.decode_to_video(latents, tmp_path / "b.mkv", **options)
        vae.decode_to_video(latents, tmp_path / "b.safetensors")
    assert {picture.device.type for picture in taken} == {"cpu"}
    for suffix in (".mkv", ".safetensors"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_compiled_function_may_decode(vae, latents):
    expected = vae.decode(latents)

    @functools.partial(torch.compile, backend="eager")
    def decode(latents):
        return vae.decode(latents * 1.0) + 0.0

    for _ in range(2):
        assert torch.equal(decode(latents), expected)
