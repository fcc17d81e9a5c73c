"""The oracle: diffusers' AutoencoderKLWan with seeded random weights, and what tests need to compare with it.

B videos, T latent frames, h x w latent rows and columns, z latent channels; frames [B, t, H, W, C]
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import AutoencoderKLWan
from torch import nn

import wan_vae_parallel as wvp

FAMILIES = ("wan2.1", "wan2.2")
Z_DIM = {"wan2.1": 16, "wan2.2": 48}
# Latent rows and columns to frame rows and columns.
RATIO = {"wan2.1": 8, "wan2.2": 16}


def oracle_vae(
    family: str,
    *,
    width: int = 8,
    z_dim: int | None = None,
    colours: int = 3,
    seed: int = 0,
    encoder_width: int = 8,
    colours_out: int | None = None,
):
    """A Wan VAE in fp32 with random weights of a size that keeps the signal's: neither constant nor saturated."""
    settings = {"base_dim": width, "z_dim": z_dim or Z_DIM[family], "in_channels": colours}
    settings["out_channels"] = colours_out or colours
    if family == "wan2.2":
        # Two widths; Wan 2.1 has one for both.
        settings.update(
            base_dim=encoder_width, decoder_base_dim=width, is_residual=True, patch_size=2, scale_factor_spatial=16
        )
        settings.update(in_channels=4 * colours, out_channels=4 * colours)
    with torch.device("meta"):
        vae = AutoencoderKLWan(**settings)
    return randomise(vae, seed)


def randomise(vae: nn.Module, seed: int = 0):
    """``vae``, made on the meta device, with weights in fp32 as `oracle_vae` says."""
    vae = vae.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        # Uniform of standard deviation 1, which is drawn much faster than a normal at width 256.
        parameter.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        if name.endswith("gamma"):
            parameter.mul_(0.1).add_(1)
        elif name.endswith("bias"):
            parameter.mul_(0.1)
        else:
            parameter.mul_(1 / math.sqrt(parameter[0].numel()))
    return vae


def random_latents(family: str, *, frames: int, rows: int, columns: int, batch: int = 1, z_dim: int | None = None):
    """``[B, z, T, h, w]``, fp32, seeded."""
    shape = (batch, z_dim or Z_DIM[family], frames, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def oracle_frames(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What the oracle decodes ``latents`` to, ``[B, t, H, W, C]`` in [0, 1]; checked to be worth comparing with."""
    frames = ((vae.decode(latents).sample + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert frames.std() > 0.05, "the oracle's frames are nearly constant: any decoder would match them"
    saturated = ((frames == 0) | (frames == 1)).float().mean()
    assert saturated < 0.4, f"{saturated:.0%} of the oracle's values are clamped: errors would not show there"
    return frames


@torch.no_grad()
def oracle_latents(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """The mean that the oracle encodes ``[T, H, W, C]`` in [0, 1] to, ``[t, h, w, z]``; checked likewise."""
    pixels = (video * 2 - 1).permute(3, 0, 1, 2)[None]
    latents = vae.encode(pixels).latent_dist.mode()[0].permute(1, 2, 3, 0)
    assert latents.std() > 0.05, "the oracle's latents are nearly constant: any encoder would match them"
    return latents


def random_video(
    family: str, *, frames: int, rows: int, columns: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[B, T, H, W, 3]`` in [0, 1], seeded, that encode to ``rows`` x ``columns``."""
    shape = (batch, frames, rows * RATIO[family], columns * RATIO[family], 3)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def original_state_dict(vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    """The oracle's weights under the keys that Wan published, found by walking modules, not by renaming keys."""
    named: dict[str, torch.Tensor] = {}

    def take(key: str, module: nn.Module) -> None:
        named.update({f"{key}.{name}": parameter for name, parameter in module.named_parameters()})

    def residual_block(key: str, block: nn.Module) -> None:
        take(f"{key}.residual.0", block.norm1)
        take(f"{key}.residual.2", block.conv1)
        take(f"{key}.residual.3", block.norm2)
        take(f"{key}.residual.6", block.conv2)
        take(f"{key}.shortcut", block.conv_shortcut)

    take("conv1", vae.quant_conv)
    take("conv2", vae.post_quant_conv)
    for key, half in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        take(f"{key}.conv1", half.conv_in)
        residual_block(f"{key}.middle.0", half.mid_block.resnets[0])
        take(f"{key}.middle.1", half.mid_block.attentions[0])
        residual_block(f"{key}.middle.2", half.mid_block.resnets[1])
        take(f"{key}.head.0", half.norm_out)
        take(f"{key}.head.2", half.conv_out)
    # Wan 2.1 has one flat list of blocks and resamplings, Wan 2.2 a list for each stage.
    flat: dict[str, list[nn.Module]] = {"encoder.downsamples": [], "decoder.upsamples": []}
    stages = (("encoder.downsamples", vae.encoder.down_blocks), ("decoder.upsamples", vae.decoder.up_blocks))
    for key, blocks in stages:
        for index, block in enumerate(blocks):
            if not hasattr(block, "resnets"):
                flat[key].append(block)
                continue
            resampling = getattr(block, "upsampler", None) or getattr(block, "downsampler", None)
            if getattr(block, "upsamplers", None) is not None:
                resampling = block.upsamplers[0]
            modules = [*block.resnets, *([resampling] if resampling is not None else [])]
            if vae.config.is_residual:
                flat[f"{key}.{index}.{key.split('.')[1]}"] = modules
            else:
                flat[key] += modules
    for key, modules in flat.items():
        for index, module in enumerate(modules):
            if hasattr(module, "conv1"):
                residual_block(f"{key}.{index}", module)
            else:
                take(f"{key}.{index}", module)
    assert len(named) == len(list(vae.parameters()))
    return named


def load(vae: AutoencoderKLWan, *, dtype: str = "float32", chunk="auto", devices: str = "cpu") -> wvp.VAE:
    """The engine with the oracle's weights."""
    return wvp.vae_from_state_dict(vae.state_dict(), devices=devices, dtype=dtype, chunk=chunk)


def max_error(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference; a NaN is infinitely wrong."""
    assert frames.shape == reference.shape
    return (frames.double() - reference.double()).abs().nan_to_num(nan=math.inf).max().item()


def decode_at_once(vae, videos):
    """What ``vae`` decodes each of ``videos`` to, asked by as many threads at the same time."""
    barrier = threading.Barrier(len(videos), timeout=60)

    def decode(video):
        barrier.wait()
        return vae.decode(video)

    with ThreadPoolExecutor(len(videos)) as threads:
        return list(threads.map(decode, videos))
