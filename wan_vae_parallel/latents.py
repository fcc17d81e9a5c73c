"""Checks on latents, and the published normalisation undone."""

from __future__ import annotations

import torch

from .architecture import Architecture
from .errors import LatentError


def check_latents(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Makes sure that ``latents`` can be decoded.

    Args:
        latents: ``[B, z, T, h, w]``, or ``[B, z, h, w]`` for one latent frame each; any float dtype and device.
        architecture: the VAE that will decode them.

    Returns:
        ``[B, z, T, h, w]``, a view.

    Raises:
        LatentError: wrong type, number of axes, channels, an empty axis, or values that are not finite.
    """
    if not isinstance(latents, torch.Tensor):
        raise LatentError(f"latents are a {type(latents).__name__}; they must be a torch tensor [B, C, T, h, w]")
    shape = tuple(latents.shape)
    if latents.dim() == 4:
        latents = latents.unsqueeze(2)
    if latents.dim() != 5:
        raise LatentError(
            f"latents have {len(shape)} axes {shape}; they must have five, [B, C, T, h, w], or four for one frame"
        )
    if not latents.is_floating_point():
        raise LatentError(f"latents are {latents.dtype}; they must be floating point, as the sampler made them")
    if latents.numel() == 0:
        raise LatentError(f"latents are empty, {shape}; every axis must be at least 1")
    if latents.shape[1] != architecture.z_dim:
        raise LatentError(_wrong_channels(latents.shape[1], architecture))
    finite = int(latents.isfinite().sum())
    if finite != latents.numel():
        raise LatentError(
            f"latents have {latents.numel() - finite} NaN or infinite values of {latents.numel()}; "
            f"the frames would be black or noise: look at the sampler's settings or precision"
        )
    return latents


def denormalize(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Applies the published mean and standard deviation to normalised latents ``[B, z, T, h, w]``.

    ComfyUI's LATENT has had this applied already; WanVideoWrapper's and diffusers' pipelines' have not.

    Raises:
        LatentError: no statistics were published for this number of channels.
    """
    if architecture.latents_mean is None or architecture.latents_std is None:
        raise LatentError(
            f"normalized latents need a mean and standard deviation, and none are published for "
            f"{architecture.name} with {architecture.z_dim} channels; de-normalise them yourself"
        )
    wide = torch.promote_types(latents.dtype, torch.float32)
    mean = torch.tensor(architecture.latents_mean, dtype=wide, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(architecture.latents_std, dtype=wide, device=latents.device).view(1, -1, 1, 1, 1)
    return latents * std + mean


def _wrong_channels(channels: int, architecture: Architecture) -> str:
    text = f"latents have {channels} channels, but this is a {architecture.name} VAE and takes {architecture.z_dim}"
    models = {16: "Wan 2.1 (and the Wan 2.2 14B models)", 48: "the Wan 2.2 5B model"}
    if channels in models:
        return f"{text}; these are latents of {models[channels]}: load the VAE that belongs to it"
    return f"{text}; connect the VAE that the video was sampled for"
