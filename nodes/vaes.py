"""Core's VAE object, decoding and encoding with our engine.

B videos, T latent frames, z channels, h x w latent rows and columns; frames [B, T', H, W, C]
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management as model_management
import comfy.sd
import torch

from ..wan_vae_parallel import VAE, load_vae
from ..wan_vae_parallel.errors import CheckpointError, FrameError, LatentError
from ..wan_vae_parallel.files.checkpoint import read_checkpoint
from ..wan_vae_parallel.to_video import check_alike as check_same_frames
from .core_vaes import core_patcher, core_vae, without_model
from .engines import Engine, Source, shared_engine, source_of_weights
from .graph_errors import in_graph_words
from .latents import join_loop, look_normalized, loop_latents, read_samples
from .report import tell_decoded, tell_encoded
from .weights import SOURCE, LoadedWeights, changed_padding, patches_of, unwrapped
from .wrapper import wrapper_source

logger = logging.getLogger(__name__)

# Engines live as long as the model whose weights they took, so that a Decode node finds its own again.
_engines_of: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Engine]] = weakref.WeakKeyDictionary()
# Models whose changed padding the log has told of.
_told_of: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class ParallelVAE:
    """What is added to a VAE's own class: decoding and encoding. All else stays the VAE's.

    Attributes:
        _engine: what decodes and encodes.
        _chunk: latent frames at once; 0 chooses.
        _asked: devices, dtype and encode_dtype, as the node was asked.
        _home: the device that the VAE's loader put it on; on another one it was put by a node.
        _normalized: its latents are as the diffusion model makes them, as WanVideoWrapper's are.
        _seen: the state (`_state`) that the engine was chosen for.
        _weights_of: the model that the engine reads its weights from, kept alive; None if they are a file's.
    """

    _engine: Engine
    _chunk: int
    _asked: tuple[str, str, str]
    _home: torch.device
    _normalized: bool = False
    _seen: Any
    _weights_of: torch.nn.Module | None
    first_stage_model: torch.nn.Module | None
    output_device: torch.device
    not_video: bool
    vae_encode_crop_pixels: Callable[[torch.Tensor], torch.Tensor]

    # What core adds later is for its own models.
    def decode(self, samples_in: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """``[B, z, T, h, w]`` to ``[B, T', H, W, C]``, exact; in the place of core's ``VAE.decode``."""
        return self._decode_and_tell(samples_in)

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Like `decode`: tiles are for VAEs that run out of memory, and this one takes smaller chunks instead."""
        _say_once("Wan VAE Parallel: decoding whole frames; tile sizes and overlaps are not needed")
        return self._decode_and_tell(samples)

    def _decode_and_tell(self, samples: torch.Tensor) -> torch.Tensor:
        since = time.monotonic()
        frames = self.decode_latents(samples)
        tell_decoded(frames, since, self._engine.worked_on)
        return frames

    @in_graph_words()
    def decode_latents(
        self, samples: torch.Tensor, *, normalized: bool = False, workers_of: ParallelVAE | None = None
    ) -> torch.Tensor:
        """`decode` with a word on whether mean and deviation are still to be applied.

        Args:
            samples: the latents.
            normalized: they are; always of a VAE of WanVideoWrapper's.
            workers_of: a VAE whose worker processes it may take over, where they are on the same devices.
        """
        engine = self._current_engine("decoder")
        if workers_of is not None:
            engine.take_workers(workers_of._engine)
        frames = engine.decode(samples, normalized=normalized or self._normalized, chunk=self._chunk)
        return frames.to(self.output_device, _output_dtype(self))

    @in_graph_words()
    def decode_samples(
        self, latent: Any, *, normalized: bool = False, workers_of: ParallelVAE | None = None
    ) -> torch.Tensor:
        """``[B * T', H, W, C]`` of a LATENT, with all that it says; see `latents`. The arguments are the above's."""
        since = time.monotonic()
        samples = read_samples(latent, self._current_engine("decoder").architecture)
        if samples.frames is not None:
            return samples.frames.to(self.output_device, _output_dtype(self))
        latents = samples.latents
        assert latents is not None, "a LATENT has latents or frames"
        if samples.from_wrapper and not normalized and not self._normalized:
            normalized = look_normalized(latents)
            if normalized:
                _say_once("Wan VAE Parallel: WanVideoWrapper's latents get the published mean and deviation")
        frames = self.decode_latents(latents, normalized=normalized, workers_of=workers_of)
        if samples.looped:
            turn = self.decode_latents(loop_latents(latents), normalized=normalized)
            frames = join_loop(frames, turn)
        tell_decoded(frames, since, self._engine.worked_on)
        return frames.flatten(0, 1)

    def encode(self, pixel_samples: torch.Tensor, *_: Any, not_video: bool | None = None, **__: Any) -> torch.Tensor:
        """``[T', H, W, C]``, one video, or ``[B, T', H, W, C]`` to ``[B, z, T, h, w]``; in the place of core's.

        Args:
            pixel_samples: the frames.
            not_video: ``[N, H, W, C]`` are N pictures; None for what the VAE's attribute of this name says.
        """
        return self.encode_pixels(pixel_samples, not_video=not_video)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, *_: Any, not_video: bool | None = None, **__: Any
    ) -> torch.Tensor:
        """Like `encode`, for the same reason as `decode_tiled`."""
        _say_once("Wan VAE Parallel: encoding whole frames; tile sizes and overlaps are not needed")
        return self.encode_pixels(pixel_samples, not_video=not_video)

    @in_graph_words()
    def encode_pixels(self, pixels: torch.Tensor, *, chunk: int = 0, not_video: bool | None = None) -> torch.Tensor:
        """`encode` with so many latent frames' pictures at once; 0 for as many as the VAE was made with."""
        since = time.monotonic()
        engine = self._current_engine("encoder")
        if not isinstance(pixels, torch.Tensor):
            raise FrameError(f"the pixels are a {type(pixels).__name__}; connect a node's IMAGE")
        pixels = _cropped(self, pixels)
        if pixels.dim() == 4:
            pixels = pixels.unsqueeze(1 if (self.not_video if not_video is None else not_video) else 0)
        latents = engine.encode(pixels, chunk=chunk or self._chunk, normalized=self._normalized)
        tell_encoded(latents, engine.architecture, since, engine.worked_on)
        return latents.to(self.output_device, _output_dtype(self))

    def _current_engine(self, part: str) -> Engine:
        """The engine for this VAE as it is now, of which it will use ``part``."""
        if _state(self) != self._seen:  # a node has copied this VAE and put it elsewhere, or patched its weights
            _choose_engine(self, self, *self._asked)
        _warn_of_changed_padding(self, part)
        return self._engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy works with the same engine, and so with the weights of the model that it reads.
        shared = ("_engine", "_weights_of")
        copied = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            setattr(copied, name, value if name in shared else copy.deepcopy(value, memo))
        return copied


def load_parallel(
    path: str, *, devices: str = "auto", dtype: str = "auto", chunk: int = 0, encode_dtype: str = "auto"
) -> Any:
    """Loads a Wan VAE from ``path`` as core's VAE that decodes and encodes with our engine.

    Raises:
        CheckpointError: the file is not a Wan VAE that can be decoded with.
        DeviceError: ``devices`` is no list of devices.
    """
    checkpoint = read_checkpoint(path)

    def make(
        places: list[torch.device], decode_dtype: torch.dtype, encode_dtype: torch.dtype, predecessor: VAE | None
    ) -> VAE:
        return load_vae(path, places, decode_dtype, predecessor=predecessor, encode_dtype=encode_dtype)

    source = Source((path, checkpoint.version), checkpoint.source, make)
    asked = (devices, dtype, encode_dtype)
    vae = core_vae(checkpoint)
    if vae is None:
        if checkpoint.architecture.encoder_width is None:
            logger.info("Wan VAE Parallel: %s has no encoder and is loaded for decoding only", checkpoint.source)
        return _parallel(without_model(shared_engine(source, *asked)), asked, chunk, source=source)
    # Core's nodes that put a VAE on another device load it anew.
    vae.patcher.cached_patcher_init = (core_patcher, (path,))
    return _parallel(vae, asked, chunk, source=source)


def apply_parallel(
    vae: Any, *, devices: str = "auto", dtype: str = "auto", chunk: int = 0, encode_dtype: str = "auto"
) -> Any:
    """Returns ``vae``, untouched itself, as one that decodes and encodes with our engine and the same weights.

    WanVideoWrapper's VAE becomes one of core's that takes and makes latents as the wrapper's nodes do, normalised.

    Raises:
        CheckpointError: it is not a Wan VAE.
        DeviceError: ``devices`` is no list of devices.
    """
    asked = (devices, dtype, encode_dtype)
    if not isinstance(vae, comfy.sd.VAE):
        source, model = wrapper_source(vae)
        parallel = _parallel(without_model(shared_engine(source, *asked)), asked, chunk, source=source)
        parallel._normalized, parallel._weights_of = True, model
        _warn_of_rounded_weights(parallel)
        return parallel
    if vae.first_stage_model is None and not isinstance(vae, ParallelVAE):
        raise CheckpointError(
            "ComfyUI could make nothing of the connected VAE's file; if it is a Wan VAE, of diffusers or with a "
            "prefix, take it from Load Wan VAE (Parallel)"
        )
    parallel = _parallel(vae, asked, chunk)
    _warn_of_rounded_weights(parallel)
    return parallel


def _parallel(vae: Any, asked: tuple[str, str, str], chunk: int, source: Source | None = None) -> Any:
    """A copy of ``vae`` that works with an engine of ``source``, or else of the weights that it has."""
    parallel = copy.copy(vae)
    # Whatever class the VAE is of, another pack's too, it stays one: ours only goes in front.
    parallel.__class__ = _parallel_class(next(c for c in type(vae).__mro__ if not issubclass(c, ParallelVAE)))
    parallel._chunk = chunk
    _choose_engine(parallel, vae, *asked, source=source)
    return parallel


def _choose_engine(
    parallel: Any, vae: Any, devices: str, dtype: str, encode_dtype: str, source: Source | None = None
) -> None:
    """Gives ``parallel`` the engine that suits ``vae``, of which it is a copy, where and as it is now."""
    state = _state(vae)
    home, weights_of = _home(vae), None
    if source is None and isinstance(vae, ParallelVAE) and state[1] == vae._seen[1]:
        source, weights_of = vae._engine.source, vae._weights_of
    elif source is None:
        weights_of = unwrapped(vae.first_stage_model)
        source = _source_of(weights_of, vae.patcher)
    asked = (devices, dtype, encode_dtype)
    engine = shared_engine(source, *asked, put_on=None if state[0] == home else state[0])
    if weights_of is not None:
        _engines_of.setdefault(weights_of, {})[source.key, engine.devices, dtype, encode_dtype] = engine
    parallel._engine, parallel._asked, parallel._weights_of = engine, asked, weights_of
    parallel._home, parallel._seen = home, state


def _source_of(model: torch.nn.Module, patcher: Any) -> Source:
    # Not the model itself: the engine must not keep it alive beyond its VAE.
    weights = LoadedWeights(model, patcher)
    stored = next((parameter.dtype for parameter in model.parameters()), None)
    return source_of_weights(weights, SOURCE, (weakref.ref(model), patches_of(patcher)), stored)


def _cropped(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``pixels`` as core's encode takes them: cut to multiples of the ratio, with as many channels as the model has.

    Core does that with each axis but the first and the last, of videos ``[B, T, H, W, C]`` with the time as well.
    """
    cropped = vae.vae_encode_crop_pixels(pixels)
    if cropped.numel() == 0:
        return pixels  # the engine takes short videos, and has words for small pictures
    if cropped.shape[1:-1] != pixels.shape[1:-1]:
        before, after = ("x".join(map(str, reversed(p.shape[1:-1]))) for p in (pixels, cropped))
        _say_once(f"Wan VAE Parallel: frames of {before} are cut to {after}, the middle of them, as ComfyUI's VAE does")
    return cropped


def _state(vae: Any) -> tuple[torch.device, Any]:
    """What nodes may change on a VAE that was made parallel already: its device, patches of its weights."""
    return torch.device(vae.device), patches_of(vae.patcher)


def _home(vae: Any) -> torch.device:
    """The device that the VAE's loader put it on."""
    if hasattr(vae, "_home"):
        return vae._home
    # Core's device selector notes it before it puts the VAE elsewhere.
    return torch.device(getattr(vae, "_select_base_device", None) or model_management.vae_device())


def _output_dtype(vae: Any) -> torch.dtype:
    """The dtype of what core's VAE returns: float32, before a core that lets users choose."""
    chosen = getattr(vae, "vae_output_dtype", None)
    return chosen() if chosen else torch.float32


def _warn_of_changed_padding(vae: ParallelVAE, part: str) -> None:
    model = unwrapped(vae.first_stage_model)
    if model is None or model in _told_of or not (changed := changed_padding(model, part)):
        return
    _told_of.add(model)
    logger.warning(
        "Wan VAE Parallel: another node has changed how this VAE pads at the frame's edges (%s), as for frames that "
        "tile. This pack pads with zeros, as published, so the frames will not tile; for that, use a VAE that was "
        "not made parallel",
        changed,
    )


def check_alike(latent: Any, rgb: ParallelVAE, alpha: ParallelVAE) -> None:
    """Raises an error if two VAEs can't make the colours and the alpha of the same frames, before either decodes."""
    if isinstance(latent, dict) and latent.get("video") is not None:
        raise LatentError(
            "the LATENT has frames that are decoded already (video), and they have no alpha; connect the latents that "
            "Wan-Alpha's sampler made"
        )
    engines = [vae._current_engine("decoder") for vae in (rgb, alpha)]
    check_same_frames(engines[0].architecture, engines[1].architecture, ("vae_rgb", "vae_alpha"))


def _warn_of_rounded_weights(vae: ParallelVAE) -> None:
    """Says it where a VAE is asked to compute in more digits than its loader has left its weights."""
    engine = vae._engine
    held = engine.source.stored
    for name, asked in (("dtype", engine.dtype), ("encode_dtype", engine.encode_dtype)):
        if held is not None and torch.finfo(asked).eps < torch.finfo(held).eps:
            _say_once(
                f"Wan VAE Parallel: {name} {_name(asked)} is asked for, and the connected VAE holds its weights in "
                f"{_name(held)}, which results can differ by 0.01 for; if the file has more digits, take the VAE from "
                f"Load Wan VAE (Parallel)"
            )
            return


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _parallel_class(base: type) -> type:
    return type("ParallelVAE", (ParallelVAE, base), {})


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
