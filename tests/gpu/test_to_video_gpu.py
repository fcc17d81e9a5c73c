"""Pixels that CUDA devices make of what they decode, and files of them; tests/vae/test_to_video.py has the rest."""

from __future__ import annotations

import pytest
import torch

import wan_vae_parallel as wvp
from tests.gpu.device import CUDA
from tests.oracle import load, random_latents
from wan_vae_parallel.ops.pixel_format import GBR_16, RGB_8, RGB_16, YUV420, YUV420_10, YUV422_10, YUVA420

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not COUNT, reason="no CUDA device is there")]
several = [pytest.mark.multigpu, pytest.mark.skipif(COUNT < 2, reason=f"needs two CUDA devices, there are {COUNT}")]

FORMATS = pytest.mark.parametrize(
    "pixels",
    # The last two are those of Wan-Alpha's second VAE.
    [YUV420, YUV420_10, YUV422_10, GBR_16, RGB_8, RGB_16, YUVA420.alpha_alone, RGB_16.alpha_alone],
    ids=lambda pixels: pixels.name,
)


@FORMATS
def test_a_device_makes_the_bytes_that_the_host_makes(pixels):
    frames = torch.rand(1, 3, 48, 80, 3, generator=torch.Generator().manual_seed(1))
    made, expected = pixels.convert(frames.to(CUDA)).cpu(), pixels.convert(frames)
    # A product and a sum may be one rounding there and two here: of a few values the next integer.
    assert (made != expected).float().mean() < 0.001


@pytest.mark.parametrize("devices", ["cuda:0", pytest.param("cuda:0,cuda:1", marks=several)])
@pytest.mark.parametrize(("rows", "columns"), [(10, 12), (12, 9)])
@FORMATS
def test_a_stream_of_pixels_is_what_its_frames_convert_to(wan21, pixels, rows, columns, devices):
    latents = random_latents("wan2.1", frames=6, rows=rows, columns=columns)
    with load(wan21, devices=devices, dtype="float32", chunk=2) as vae:
        frames = vae.decode(latents)
        parts = [part.clone() for part in vae.pixel_stream(latents, pixels)]
    assert len(parts) > 2
    made, expected = torch.cat(parts, dim=1), pixels.convert(frames.to(CUDA)).cpu()
    assert (made != expected).float().mean() < 0.001


@pytest.mark.parametrize("devices", ["cuda:0", pytest.param("cuda:0,cuda:1", marks=several)])
def test_nan_is_told_though_pixels_have_none(wan21, devices, tmp_path):
    latents = random_latents("wan2.1", frames=4, rows=8, columns=8)
    state = {key: tensor.clone() for key, tensor in wan21.state_dict().items()}
    name = next(key for key in state if key.startswith("decoder.conv_out") and key.endswith("weight"))
    state[name][:] = torch.nan
    with (
        wvp.vae_from_state_dict(state, devices=devices, dtype="float32") as vae,
        pytest.raises(wvp.WanVAEError, match="frames are NaN"),
    ):
        vae.decode_to_video(latents, tmp_path / "v.mp4")
    assert not list(tmp_path.iterdir())
