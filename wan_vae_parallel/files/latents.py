"""Latents: reading and writing them, checking them, undoing the published normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..architecture import Architecture
from ..errors import LatentError, OutputError, about_file
from ..frames import whole_numbers
from .kinds import user_path
from .latent_axes import in_order
from .tensor_file import TensorFile
from .whole import check_writable, replacing

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What latents are written to: ComfyUI's own kind, or one plain tensor.
LATENT_SUFFIXES = (".latent", ".safetensors")
# What latents are called beside other tensors, and parts of what these others are called.
_NAMES = ("samples", "latents", "latent", "z")
_NO_LATENTS = ("mask", "mean", "std", "embed", "audio", "sigma")
_MOST_TENSORS = 5
_ANOTHER = "name a .latent or .safetensors file with latents"
# The tensors in the files of ComfyUI's SaveLatent.
_COMFYUI_LATENT, _COMFYUI_VERSION = "latent_tensor", "latent_format_version_0"


def check_fits(largest: float, dtype: torch.dtype) -> None:
    """Raises `LatentError` if latents of that magnitude are beyond what ``dtype`` can hold."""
    if largest > torch.finfo(dtype).max:
        raise LatentError(
            f"latents reach {largest:.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}; real latents are of the order of 1: look at how they were made"
        )


def check_latents(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Makes sure that ``latents`` can be decoded.

    Args:
        latents: ``[B, z, T, h, w]``, or ``[B, z, h, w]`` for one latent frame each; any float dtype and device. Axes in
            another order are taken where it alone fits, see `latent_axes`.
        architecture: the VAE that will decode them.

    Returns:
        ``[B, z, T, h, w]``, a view.

    Raises:
        LatentError: as `ordered_latents` and `largest_value` do.
    """
    latents = ordered_latents(latents, architecture)
    largest_value(latents)
    return latents


def ordered_latents(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """`check_latents` without a look at the values, which is a pass over all of them.

    Raises:
        LatentError: wrong type, number of axes, channels, an empty axis, an order of axes that is not clear, or several
            latent frames for a VAE of images.
    """
    if not isinstance(latents, torch.Tensor):
        raise LatentError(f"latents are a {type(latents).__name__}; they must be a torch tensor [B, C, T, h, w]")
    shape = tuple(latents.shape)
    if latents.dim() not in (3, 4, 5):
        raise LatentError(
            f"latents have {len(shape)} axes {shape}; they must have five, [B, C, T, h, w], or four for one frame"
        )
    if latents.dtype not in _DTYPES:
        raise LatentError(f"latents are {latents.dtype}; they must be floating point: fp32, fp16, bf16 or fp64")
    if latents.layout != torch.strided or latents.is_meta:
        kind = "meta" if latents.is_meta else str(latents.layout)
        raise LatentError(f"latents are a {kind} tensor; they must be an ordinary, dense one")
    if latents.numel() == 0:
        raise LatentError(f"latents are empty, {shape}; every axis must be at least 1")
    latents = in_order(latents, architecture)
    if architecture.images_only and latents.shape[2] > 1:
        raise LatentError(
            f"latents {shape} have {latents.shape[2]} latent frames, and {architecture.name} knows no time; take the "
            f"VAE of the model that made them",
            in_python="pass pictures as a batch, [B, C, 1, h, w]",
        )
    return latents


def latents_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``[B, z, T, h, w]`` of what is a shape of latents; of ``[B, z, h, w]`` with a T of 1.

    Raises:
        LatentError: it is none.
    """
    numbers = whole_numbers(shape)
    if numbers is None or len(numbers) not in (4, 5) or min(numbers) < 1:
        raise LatentError(
            f"a shape of latents has five whole numbers of at least 1, [B, z, T, h, w], or four of images, "
            f"[B, z, h, w], and is not {shape!r}"
        )
    return numbers if len(numbers) == 5 else (*numbers[:2], 1, *numbers[2:])


def largest_value(latents: torch.Tensor) -> float:
    """The largest magnitude, in one pass and without a copy.

    Raises:
        LatentError: some are not finite.
    """
    low, high = latents.aminmax()  # both NaN if any value is
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        finite = int(latents.isfinite().sum())  # takes ten times as long
        raise LatentError(
            f"latents have {latents.numel() - finite} NaN or infinite values of {latents.numel()}; "
            f"the frames would be black or noise: look at the sampler's settings or precision"
        )
    return largest


def denormalize(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Applies the published mean and standard deviation to normalised latents ``[B, z, T, h, w]``.

    ComfyUI's LATENT has had this applied already; WanVideoWrapper's and diffusers' pipelines' have not.

    Raises:
        LatentError: no statistics were published for this number of channels.
    """
    mean, std = _statistics(latents, architecture, "de-normalise them before, with normalized off")
    return latents * std + mean


def normalize(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """The opposite of `denormalize`: latents as the diffusion model has them.

    Raises:
        LatentError: no statistics were published for this number of channels.
    """
    mean, std = _statistics(latents, architecture, "take them as they are")
    return (latents - mean) / std


def check_normalizable(architecture: Architecture) -> None:
    """Raises `LatentError` where `normalize` would."""
    normalize(torch.zeros(1, architecture.z_dim, 1, 1, 1), architecture)


def _statistics(latents: torch.Tensor, architecture: Architecture, way_out: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of ``[B, z, T, h, w]``, in at least fp32, for each channel."""
    if architecture.latents_mean is None or architecture.latents_std is None:
        raise LatentError(
            f"normalized latents need a mean and standard deviation, and none are published for "
            f"{architecture.name} with {architecture.z_dim} channels; {way_out}"
        )
    wide = torch.promote_types(latents.dtype, torch.float32)
    mean = torch.tensor(architecture.latents_mean, dtype=wide, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(architecture.latents_std, dtype=wide, device=latents.device).view(1, -1, 1, 1, 1)
    return mean, std


def read_latents(path: str | Path) -> torch.Tensor:
    """Reads latents from a file.

    Args:
        path: what ComfyUI's SaveLatent writes (``.latent``), or a safetensors file with one tensor of three to five
            axes, or with one that is called latents among others.

    Returns:
        ``[B, z, T, h, w]`` or ``[B, z, h, w]`` as they are in the file.

    Raises:
        LatentError: no such file, it is damaged, it changed while it was read, or it is not clear which tensor is
            meant.
        OutOfMemoryError: the host has no room for it.
    """
    path = user_path(path, LatentError, another=_ANOTHER)
    with TensorFile(path, LatentError, holds="latents", another=_ANOTHER, again=_ANOTHER) as file:
        key = _latents_key(file.described(), file.path)  # before all of a file that may be a whole model's is read
        return file.read()[key]


def _latents_key(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Which of a file's tensors are the latents."""
    if _COMFYUI_LATENT in tensors:
        if _COMFYUI_VERSION not in tensors and tensors[_COMFYUI_LATENT].dim() < 5:
            raise LatentError(about_file(path, "is a latent of a ComfyUI from before 2023, which made none of videos"))
        return _COMFYUI_LATENT
    if len(tensors) > _MOST_TENSORS and any(key.endswith(".weight") for key in tensors):
        words = f"has {len(tensors)} tensors, a model's weights and no latents; {_ANOTHER}"
        raise LatentError(about_file(path, words))
    # What else lies beside is a mask, statistics, or the like.
    possible = {
        key: tensor.dim()
        for key, tensor in tensors.items()
        if tensor.dim() in (3, 4, 5) and not any(word in key.lower() for word in _NO_LATENTS)
    }
    named = [key for key in possible if key.rpartition(".")[2].lower() in _NAMES]
    for several in (named, *([key for key, count in possible.items() if count == axes] for axes in (5, 4, 3))):
        if len(several) == 1:
            return several[0]
    found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:_MOST_TENSORS])
    raise LatentError(
        about_file(
            path,
            f"has {len(tensors)} tensors{': ' + found if found else ''}; "
            f"it must have exactly one with five axes, [B, C, T, h, w]",
        )
    )


def check_latent_output(path: str | Path, *, needed: int = 0) -> None:
    """Makes sure that `save_latents` can write ``needed`` bytes to ``path``, before anything is encoded.

    Raises:
        OutputError: an unknown kind of file, a folder that is missing or read-only, or a full disk.
    """
    path = Path(path)
    if path.suffix.lower() not in LATENT_SUFFIXES:
        raise OutputError(
            about_file(path, f"is no kind of file that latents are written to; name a {' or '.join(LATENT_SUFFIXES)}")
        )
    check_writable(path, needed=needed)


def save_latents(path: str | Path, latents: torch.Tensor) -> None:
    """Writes latents for `read_latents`, all of them or no file.

    A ``.safetensors`` gets one tensor ``latents``; any other file is what ComfyUI's SaveLatent writes, for its
    LoadLatent.

    Raises:
        OutputError: the file can't be written.
    """
    tensors = {_COMFYUI_LATENT: latents.contiguous(), _COMFYUI_VERSION: torch.empty(0)}
    if Path(path).suffix.lower() == ".safetensors":
        tensors = {"latents": tensors[_COMFYUI_LATENT]}
    with replacing(path, needed=latents.numel() * latents.element_size()) as temporary:
        save_file(tensors, temporary)
