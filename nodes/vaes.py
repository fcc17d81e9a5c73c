"""Core's VAE object, decoding with our engine.

B videos, T latent frames, z channels, h x w latent rows and columns; frames [B, T', H, W, C]
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import weakref
from collections.abc import Mapping
from typing import Any

import comfy.model_management as model_management
import comfy.sd
import torch

from ..wan_vae_parallel import VAE, load_vae
from ..wan_vae_parallel.checkpoint import Checkpoint, checkpoint_from_state_dict, read_checkpoint
from ..wan_vae_parallel.errors import CheckpointError
from .engines import Engine, Source, shared_engine

logger = logging.getLogger(__name__)

# Engines live as long as the model whose weights they took, so that a Decode node finds its own again.
_engines_of: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, str], Engine]] = weakref.WeakKeyDictionary()


class ParallelVAE:
    """What is added to a VAE's own class: decoding. All else stays the VAE's, encoding too."""

    _engine: Engine
    _chunk: int
    output_device: torch.device

    def decode(
        self,
        samples_in: torch.Tensor,
        vae_options: Mapping[str, Any] | None = None,  # noqa: ARG002 (core's signature)
    ) -> torch.Tensor:
        """``[B, z, T, h, w]`` to ``[B, T', H, W, C]``, exact; in the place of core's ``VAE.decode``."""
        return self.decode_latents(samples_in)

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Like `decode`: tiles are for VAEs that run out of memory, and this one takes smaller chunks instead."""
        _say_once("Wan VAE Parallel: decoding whole frames; tile sizes and overlaps are not needed")
        return self.decode_latents(samples)

    def decode_latents(self, samples: torch.Tensor, *, normalized: bool = False) -> torch.Tensor:
        """`decode` with a word on whether mean and deviation are still to be applied."""
        frames = self._engine.decode(samples, normalized=normalized, chunk=self._chunk)
        return frames.to(self.output_device)


class _DecoderOnly:
    """Core's VAE has no model for these weights, so it can't encode with them."""

    def encode(self, *_: Any, **__: Any) -> torch.Tensor:
        raise CheckpointError(
            "this VAE can only decode: its file has no encoder, or one that ComfyUI has no model for; "
            "encode with the full Wan VAE"
        )

    encode_tiled = encode

    def get_sd(self) -> dict[str, torch.Tensor]:
        """Core's nodes that save a VAE ask for its weights."""
        raise CheckpointError("this VAE was loaded for decoding only, so it can't be saved; copy its file")

    def throw_exception_if_invalid(self) -> None:
        pass


def load_parallel(path: str, *, devices: str = "auto", dtype: str = "auto", chunk: int = 0) -> Any:
    """Loads a Wan VAE from ``path`` as core's VAE that decodes with our engine.

    Raises:
        CheckpointError: the file is not a Wan VAE that can be decoded with.
        DeviceError: ``devices`` is no list of devices.
    """
    checkpoint = read_checkpoint(path)

    def make(places: list[torch.device], compute_dtype: torch.dtype, predecessor: VAE | None) -> VAE:
        return load_vae(path, places, compute_dtype, predecessor=predecessor)

    engine = shared_engine(Source((path, checkpoint.version), make), devices, dtype)
    core = _core_vae(checkpoint)
    if core is None:
        logger.info("Wan VAE Parallel: %s is loaded for decoding only", checkpoint.source)
        core = _decoder_only(engine)
    return _parallel(core, engine, chunk)


def apply_parallel(vae: Any, *, devices: str = "auto", dtype: str = "auto", chunk: int = 0) -> Any:
    """Returns ``vae``, untouched itself, as one that decodes with our engine and the same weights.

    Raises:
        CheckpointError: it is not a Wan VAE.
        DeviceError: ``devices`` is no list of devices.
    """
    if not isinstance(vae, comfy.sd.VAE):
        raise CheckpointError(
            f"the connected VAE is a {type(vae).__name__}, not one of ComfyUI's own; take it from Load VAE, or from "
            f"Load Wan VAE (Parallel)"
        )
    model = vae.first_stage_model
    if model is None:
        if not isinstance(vae, ParallelVAE):
            raise CheckpointError(
                "ComfyUI could make nothing of the connected VAE's file; if it is a Wan VAE, of diffusers or with a "
                "prefix, take it from Load Wan VAE (Parallel)"
            )
        return _parallel(vae, shared_engine(vae._engine.source, devices, dtype), chunk)
    # Not the model itself: the engine must not keep it alive beyond its VAE.
    weak = weakref.ref(model)

    def weights() -> Checkpoint:
        return checkpoint_from_state_dict(weak().state_dict(), source="the connected VAE")

    def make(places: list[torch.device], compute_dtype: torch.dtype, predecessor: VAE | None) -> VAE:
        return VAE(weights, devices=places, dtype=compute_dtype, chunk="auto", predecessor=predecessor)

    engine = shared_engine(Source(weak, make), devices, dtype)
    _engines_of.setdefault(model, {})[(str(engine.devices), dtype)] = engine
    return _parallel(vae, engine, chunk)


def _parallel(vae: Any, engine: Engine, chunk: int) -> Any:
    parallel = copy.copy(vae)
    # Whatever class the VAE is of, another pack's too, it stays one: ours only goes in front.
    parallel.__class__ = _parallel_class(next(c for c in type(vae).__mro__ if not issubclass(c, ParallelVAE)))
    parallel._engine, parallel._chunk = engine, chunk
    return parallel


@functools.cache
def _parallel_class(base: type) -> type:
    return type("ParallelVAE", (ParallelVAE, base), {})


def _core_vae(checkpoint: Checkpoint) -> Any:
    """Core's own VAE of the same weights, or None where core has no model for them."""
    architecture = checkpoint.architecture
    encoder = checkpoint.encoder.get("encoder.conv1.weight")
    published = (256, 160, 48) if architecture.residual else (architecture.width, architecture.width, 16)
    if encoder is None or (architecture.width, encoder.shape[0], architecture.z_dim) != published:
        return None
    vae = comfy.sd.VAE(sd={**checkpoint.decoder, **checkpoint.encoder})
    vae.throw_exception_if_invalid()
    return vae


@functools.cache
def _decoder_only_class() -> type:
    return type("DecoderOnlyVAE", (_DecoderOnly, comfy.sd.VAE), {})


def _decoder_only(engine: Engine) -> Any:
    """A VAE object without core's model, with the attributes that core's nodes read."""
    architecture = engine.architecture
    cls = _decoder_only_class()
    vae = cls.__new__(cls)
    spatial, temporal = architecture.spatial_ratio, architecture.temporal_ratio
    vae.first_stage_model = None
    vae.patcher = engine.patcher
    vae.device = engine.devices[0]
    vae.output_device = model_management.intermediate_device()
    vae.vae_dtype = torch.float32
    vae.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae.process_input = lambda image: image * 2.0 - 1.0
    vae.process_output = lambda image: torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)
    vae.memory_used_decode = lambda shape, _: engine.memory_needed(shape)
    vae.memory_used_encode = lambda *_: 0
    vae.size = engine.weights_size()
    vae.latent_channels, vae.latent_dim = architecture.z_dim, 3
    vae.output_channels = architecture.output_channels
    vae.not_video, vae.crop_input, vae.disable_offload = False, True, False
    vae.extra_1d_channel, vae.pad_channel_value = None, None
    vae.upscale_ratio = (lambda frames: max(0, architecture.frame_count(frames)), spatial, spatial)
    vae.downscale_ratio = (lambda frames: max(0, math.floor((frames + temporal - 1) / temporal)), spatial, spatial)
    vae.upscale_index_formula = vae.downscale_index_formula = (temporal, spatial, spatial)
    return vae


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
