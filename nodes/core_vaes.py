"""Core's VAE objects of weights that this pack has read: with core's model, or without where core has none.

B videos, T latent frames, z channels, h x w latent rows and columns
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import comfy.model_management as model_management
import comfy.sd
import torch

from ..wan_vae_parallel import Architecture
from ..wan_vae_parallel.errors import CheckpointError
from ..wan_vae_parallel.files.checkpoint import Checkpoint, read_checkpoint
from .engines import Engine


class _WithoutModel:
    """Core's VAE object without a model of core's, which has none for these weights."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        """Core's nodes that save a VAE ask for its weights."""
        raise CheckpointError("ComfyUI has no model of its own for this VAE, so it can't be saved; copy its file")

    def throw_exception_if_invalid(self) -> None:
        pass


def core_vae(checkpoint: Checkpoint) -> Any:
    """Core's own VAE of the same weights, or None where core has no model for them."""
    architecture = checkpoint.architecture
    own = dataclasses.replace(architecture, mean=None, std=None)
    known = Architecture.published("wan2.2")
    if not architecture.residual:
        # Width and colours it reads off the file, where as many go in as out.
        known = dataclasses.replace(
            Architecture.published("wan2.1", width=architecture.width),
            output_channels=architecture.output_channels,
            input_channels=architecture.output_channels,
        )
    if own != known:
        return None
    vae = comfy.sd.VAE(sd={**checkpoint.decoder, **checkpoint.encoder})
    vae.throw_exception_if_invalid()
    return vae


def core_patcher(path: str, *_: Any, **__: Any) -> Any:
    """The patcher of core's own VAE, loaded once more."""
    return core_vae(read_checkpoint(path)).patcher


@functools.cache
def _without_model_class() -> type:
    return type("VAEWithoutModel", (_WithoutModel, comfy.sd.VAE), {})


def without_model(engine: Engine) -> Any:
    """A VAE object without core's model, with the attributes that core's nodes read."""
    architecture = engine.architecture
    cls = _without_model_class()
    vae = cls.__new__(cls)
    spatial, encoded, temporal = architecture.spatial_ratio, architecture.encode_ratio, architecture.temporal_ratio
    vae.first_stage_model = None
    vae.patcher = engine.patcher
    vae.device = vae._home = engine.devices[0]
    vae.output_device = model_management.intermediate_device()
    vae.vae_dtype = torch.float32
    vae.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae.process_input = lambda image: image * 2.0 - 1.0
    vae.process_output = lambda image: torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)
    vae.memory_used_decode = lambda shape, _: engine.memory_needed(shape)
    # Core has pixels' channels in front: [B, C, T, H, W].
    vae.memory_used_encode = lambda shape, _: (
        engine.encode_memory_needed((shape[0], *shape[2:], shape[1])) if architecture.encoder_width else 0
    )
    vae.size = engine.weights_size()
    vae.latent_channels, vae.latent_dim = architecture.z_dim, 3
    # By this name core asks for the colours of pixels that are encoded; alpha that they lack is opaque.
    vae.output_channels = architecture.input_channels
    vae.not_video, vae.crop_input, vae.disable_offload = architecture.images_only, True, False
    vae.extra_1d_channel, vae.pad_channel_value = None, 1.0 if architecture.input_channels == 4 else None
    vae.upscale_ratio = (lambda frames: max(0, architecture.frame_count(frames)), spatial, spatial)
    vae.downscale_ratio = (lambda frames: max(0, math.floor((frames + temporal - 1) / temporal)), encoded, encoded)
    vae.upscale_index_formula = (temporal, spatial, spatial)
    vae.downscale_index_formula = (temporal, encoded, encoded)
    return vae
