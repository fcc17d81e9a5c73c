"""What nodes put into a LATENT beside the latents, and what its decode is to make of it.

Core's own nodes add what decoding does not look at: noise_mask, batch_index, type, downscale_ratio_spacial. The sampler
of WanVideoWrapper adds words that its decode node follows, so this one does too:

| word | what the wrapper's decode does |
| --- | --- |
| ``has_ref`` | leaves the first latent frame out: a reference picture |
| ``drop_last`` | leaves the last latent frame out |
| ``end_image`` | the last latent frame is the end picture's: decoded apart, and its frame left out |
| ``looped`` | decodes the end and the beginning once more, joined, and takes its first frames from there |
| ``video`` | frames in [-1, 1] that are decoded already, in place of ``samples`` |
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..wan_vae_parallel.architecture import Architecture
from ..wan_vae_parallel.errors import LatentError
from ..wan_vae_parallel.files.latents import ordered_latents
from ..wan_vae_parallel.latent_statistics import PUBLISHED

logger = logging.getLogger(__name__)

_WORDS = ("has_ref", "drop_last", "end_image", "looped")
# Of a loop: latent frames of the end and of the beginning that are decoded once more, joined; frames of that which make
# room for the causal past, and frames of the whole that these then stand for.
_LOOP_END, _LOOP_START, _LOOP_PAST, _LOOP_REPLACED = 3, 2, 9, 5


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A LATENT, as a decode wants it.

    Attributes:
        latents: ``[B, C, T, h, w]``, without what is to be left out; None if there are frames already.
        frames: ``[T, H, W, C]`` in [0, 1] that were decoded before.
        from_wrapper: WanVideoWrapper's sampler made it.
        looped: the last frame leads to the first.
    """

    latents: torch.Tensor | None
    frames: torch.Tensor | None = None
    from_wrapper: bool = False
    looped: bool = False


def read_samples(latent: Any, architecture: Architecture) -> Samples:
    """What is to be decoded of a LATENT with a VAE of an architecture; all but its values are checked.

    Raises:
        LatentError: there is nothing to decode in it, or what it says can't be followed.
    """
    if not isinstance(latent, dict):
        raise LatentError(f"samples are a {type(latent).__name__}; connect a node's LATENT")
    if (video := latent.get("video")) is not None:
        return Samples(latents=None, frames=_decoded_before(video))
    latents = latent.get("samples")
    if latents is None:
        raise LatentError(
            f"the LATENT has no samples, but {', '.join(map(str, latent)) or 'nothing'}; connect a sampler's"
        )
    if getattr(latents, "is_nested", False):
        # Video and sound, say: the first is the picture's, as core's VAE Decode takes it.
        latents = latents.unbind()[0]
    latents = ordered_latents(latents, architecture)  # in the order of axes in which something can be left out
    said = {word for word in _WORDS if _is_set(latent.get(word))}
    from_wrapper = any(word in latent for word in ("has_ref", "drop_last", "looped"))
    if said - {"looped"}:
        latents = _trimmed(latents, said)
    if "looped" in said and ("end_image" in said or latents.shape[2] < _LOOP_END + _LOOP_START):
        raise LatentError(
            f"the LATENT is of a loop (looped), which takes {_LOOP_END + _LOOP_START} latent frames and no end "
            f"picture, not {tuple(latents.shape)}; decode it with WanVideoWrapper's own node"
        )
    return Samples(latents=latents, from_wrapper=from_wrapper, looped="looped" in said)


def loop_latents(latents: torch.Tensor) -> torch.Tensor:
    """The latent frames that lead from the end of a loop to its beginning."""
    return torch.cat([latents[:, :, -_LOOP_END:], latents[:, :, :_LOOP_START]], dim=2)


def join_loop(frames: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Frames ``[B, T, H, W, C]`` of a loop, from those of its latents and those of `loop_latents`."""
    return torch.cat([turn[:, _LOOP_PAST:], frames[:, _LOOP_REPLACED:]], dim=1)


def look_normalized(latents: torch.Tensor) -> bool:
    """Whether latents ``[B, C, T, h, w]`` look as the diffusion model made them: nearer to N(0, 1) than to published.

    A node of WanVideoWrapper's applies mean and deviation and leaves all else in the LATENT as it was.
    """
    found = next(((mean, std) for (_, z), (mean, std) in PUBLISHED.items() if z == latents.shape[1]), None)
    if found is None:
        return True
    mean, std = (torch.tensor(one) for one in found)
    values = latents.detach().movedim(1, 0).flatten(1).float().cpu()
    average, variance = values.mean(dim=1), values.var(dim=1, correction=0)
    # Negative log likelihoods, but for what both have.
    as_made = (variance + average**2) / 2
    as_decoded = std.log() + (variance + (average - mean) ** 2) / (2 * std**2)
    return bool(as_made.sum() < as_decoded.sum())


def _is_set(value: Any) -> bool:
    return value is not None if isinstance(value, torch.Tensor) else bool(value)


def _trimmed(latents: torch.Tensor, said: set[str]) -> torch.Tensor:
    first, last = int("has_ref" in said), int("drop_last" in said) + int("end_image" in said)
    if latents.shape[2] <= first + last:
        raise LatentError(
            f"latents {tuple(latents.shape)} have {latents.shape[2]} latent frames, and their LATENT says to leave out "
            f"{first + last} of them ({', '.join(sorted(said))}), so that none is left; have the sampler make more"
        )
    _say_once(
        f"Wan VAE Parallel: leaving out {first} latent frames at the beginning and {last} at the end, as "
        f"WanVideoWrapper's decode does ({', '.join(sorted(said - {'looped'}))})"
    )
    return latents[:, :, first : latents.shape[2] - last]


def _decoded_before(video: Any) -> torch.Tensor:
    if not isinstance(video, torch.Tensor) or video.dim() != 4 or video.shape[-1] not in (3, 4):
        shape = tuple(video.shape) if isinstance(video, torch.Tensor) else type(video).__name__
        raise LatentError(
            f"the LATENT has a video that is decoded already, and it is {shape} where [T, H, W, C] belongs; decode it "
            f"with the node that belongs to its sampler"
        )
    _say_once("Wan VAE Parallel: the LATENT has frames that are decoded already (video); they are passed on")
    return (video.detach().to("cpu", torch.float32).clamp(-1, 1) + 1) / 2


@functools.cache
def _say_once(message: str) -> None:
    logger.info("%s", message)
