"""Safetensors in, a strict state dict in Wan's original key layout out. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..errors import CheckpointError, about_file
from ..model.decoder import WanDecoder
from ..model.encoder import WanEncoder
from .key_layouts import Layout, listed, originally_named, own_keys, own_tensors
from .kinds import user_path
from .locate import ANOTHER, Located, locate_weights
from .quantised import dequantised
from .tensor_file import FileVersion, TensorFile

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The encoder's keys.
_ENCODER_PREFIXES = ("encoder.", "conv1.")
# A config's statistics that differ by less are the published ones.
_SAME_STATISTICS = 1e-6

Version = tuple[FileVersion, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Wan VAE's weights, checked against its architecture.

    Attributes:
        architecture: read off the shapes.
        decoder: the decoder's tensors by their original keys, complete and of the right shapes.
        encoder: the encoder's tensors by their original keys, complete and of the right shapes; empty if there is none.
        layout: the key layout that they came in.
        source: what to call it in messages.
        version: of the files that it was read from, if it was.
    """

    architecture: Architecture
    decoder: Mapping[str, torch.Tensor] = field(repr=False)
    encoder: Mapping[str, torch.Tensor] = field(repr=False)
    layout: Layout
    source: str
    version: Version | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights (of the first convolution's, if they differ)."""
        return self.decoder["decoder.conv1.weight"].dtype

    @property
    def parameters(self) -> int:
        """Number of the decoder's parameters."""
        return sum(tensor.numel() for tensor in self.decoder.values())


def read_checkpoint(path: str | Path, version: Version | None = None) -> Checkpoint:
    """Reads a Wan VAE from a safetensors file or its shards, or from a folder in diffusers' format.

    The tensors are in this process's own memory: whatever becomes of the file, they stay as they are. Of a file that
    holds other models too only the VAE is read.

    Args:
        path: of the file, of one of its shards, of their index, or of the folder, which may be a whole pipeline's.
        version: what the files were when they were loaded; others are refused.

    Raises:
        CheckpointError: there is no such file, it is a pickle or another kind of file, it is damaged, it is no Wan VAE,
            it changed while it was read, or it is not the ``version`` that it was.
        OutOfMemoryError: the host has no room for it.
    """
    with _opened(path, version) as (located, files):
        # All is checked by the headers, so that no more of another model's large file is read.
        described = _described(files, located.name)
        _checked(located, files, described, described=True)
        own = own_keys(described, located.name)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            there = file.described() if len(files) > 1 else described
            tensors |= file.read([key for key in own if key in there])
        return _checked(located, files, tensors)


def describe_checkpoint(path: str | Path, version: Version | None = None) -> Checkpoint:
    """Like `read_checkpoint`, but its tensors are on the meta device, without values: only headers are read."""
    with _opened(path, version) as (located, files):
        return _checked(located, files, _described(files, located.name), described=True)


@contextlib.contextmanager
def _opened(path: str | Path, version: Version | None) -> Iterator[tuple[Located, Sequence[TensorFile]]]:
    """Within it the files are open."""
    given = user_path(path, CheckpointError, another=ANOTHER)
    located = locate_weights(given)
    if "NVFP4" in str(located.settings().get("quant_algo", located.settings().get("quantization", ""))).upper():
        raise CheckpointError(
            about_file(
                given,
                "has weights in NVFP4, as its config.json says, which TensorRT and ModelOpt make for their "
                "own kernels; take the VAE in bf16, fp16 or fp32",
            )
        )
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(TensorFile(file, CheckpointError, holds="VAE", another=ANOTHER, again="fetch it again"))
            for file in located.files
        ]
        if version not in (None, tuple(file.version for file in files)):
            raise CheckpointError(about_file(given, "was replaced since it was loaded; load the VAE again"))
        yield located, files


def _described(files: Sequence[TensorFile], name: str) -> dict[str, torch.Tensor]:
    """All tensors of the files without values."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        described = file.described()
        if twice := sorted(tensors.keys() & described.keys()):
            raise CheckpointError(f"{name} has tensors in several of its shards: {listed(twice)}; fetch it again")
        tensors |= described
    return tensors


def _checked(
    located: Located, files: Sequence[TensorFile], tensors: Mapping[str, torch.Tensor], *, described: bool = False
) -> Checkpoint:
    checkpoint = checkpoint_from_state_dict(tensors, source=located.name, described=described)
    return dataclasses.replace(
        checkpoint,
        version=tuple(file.version for file in files),
        architecture=with_statistics(checkpoint.architecture, located.settings(), f"{located.name}'s config.json"),
    )


def with_statistics(architecture: Architecture, settings: Mapping[str, Any], source: str) -> Architecture:
    """``architecture`` with the ``latents_mean`` and ``latents_std`` of ``settings``, if it has some of its own.

    Raises:
        CheckpointError: they can't be used.
    """
    given = {name: settings.get(name) for name in ("latents_mean", "latents_std")}
    if all(one is None for one in given.values()):
        return architecture
    # Of one alone the other is the published one, as diffusers' classes have it.
    mean, std = (getattr(architecture, name) if one is None else one for name, one in given.items())
    if mean is None or std is None:
        there, missing = ("latents_std", "latents_mean") if mean is None else ("latents_mean", "latents_std")
        raise CheckpointError(
            f"{source} has {there} and no {missing}, and none is published for this VAE: add it, or leave both out and "
            f"normalise latents elsewhere"
        )
    try:
        own = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source} has statistics of latents that are no numbers ({error})") from None
    if [len(one) for one in own] != [architecture.z_dim] * 2:
        # What diffusers' classes say where nobody said otherwise.
        logger.debug("%s has statistics of %d channels, and latents %d", source, len(own[0]), architecture.z_dim)
        return architecture
    if not all(abs(value) < float("inf") for one in own for value in one) or min(own[1]) <= 0:
        raise CheckpointError(f"{source} has statistics of latents that are not finite, or deviations of 0 or less")
    published = architecture.latents_mean, architecture.latents_std
    if published[0] is not None and published[1] is not None:
        pairs = zip((*own[0], *own[1]), (*published[0], *published[1]), strict=True)
        if all(abs(a - b) <= _SAME_STATISTICS for a, b in pairs):
            return architecture
    return dataclasses.replace(architecture, mean=own[0], std=own[1])


def checkpoint_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, source: str, described: bool = False
) -> Checkpoint:
    """Checks tensors in either key layout and brings them into the original one.

    Args:
        state_dict: the tensors.
        source: what messages call them.
        described: they need no values, only shapes and dtypes.

    Raises:
        CheckpointError: they are not the tensors of one Wan VAE; ``source`` is what the message calls them.
    """
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in state_dict.items()
    ):
        raise CheckpointError(
            f"{source} is no mapping of names to tensors; take a VAE's weights", "a module's state dict"
        )
    layout, tensors = own_tensors(state_dict, source)
    tensors = dequantised(tensors, source)
    if layout == "diffusers":
        tensors = originally_named(tensors, source)
    try:
        architecture = Architecture.from_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{source} is not a Wan VAE: {error}") from None
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith(_ENCODER_PREFIXES)}
    decoder = {key: tensor for key, tensor in tensors.items() if key not in encoder}
    named = f"{source}, read as a {architecture.name} VAE of width {architecture.width},"
    decoder = _fitted(_shapes(WanDecoder, architecture), decoder, named)
    if any(key.startswith("encoder.") for key in encoder):
        # All of an encoder or nothing: whoever encodes with part of one gets noise.
        whole = architecture
        if whole.encoder_width is None:  # its first convolution is missing
            whole = dataclasses.replace(whole, encoder_width=whole.width)
        encoder = _fitted(_shapes(WanEncoder, whole), encoder, named)
    else:
        encoder = {}
    empty = [key for key, tensor in (*decoder.items(), *encoder.items()) if tensor.is_meta]
    if empty and not described:
        raise CheckpointError(
            f"{named} has weights without values (on the meta device): {listed(empty)}; something has moved them "
            f"away: take the VAE from its file"
        )
    return Checkpoint(architecture=architecture, decoder=decoder, encoder=encoder, layout=layout, source=source)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of those of ``tensors`` that hold NaN or infinity."""
    return [key for key, tensor in tensors.items() if not tensor.is_meta and not bool(tensor.isfinite().all())]


@functools.lru_cache(maxsize=64)
def _shapes(model: type[WanDecoder | WanEncoder], architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the model's parameters."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in model(architecture).state_dict().items()}


def _fitted(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], named: str
) -> dict[str, torch.Tensor]:
    """``tensors`` if they are the expected ones; what differs in axes of size 1 alone gets them.

    Raises:
        CheckpointError: they are not.
    """
    fitted = {}
    for key, tensor in tensors.items():
        shape = expected.get(key)
        alike = shape is not None and _long_axes(tensor.shape) == _long_axes(shape)
        fitted[key] = tensor.reshape(shape) if shape is not None and alike else tensor
    problems = []
    if missing := [key for key in expected if key not in fitted]:
        problems.append(f"lacks {listed(missing)}")
    if unexpected := [key for key in fitted if key not in expected]:
        problems.append(f"has unexpected {listed(unexpected)}")
    misshapen = [
        f"{key} {tuple(fitted[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in fitted and tuple(fitted[key].shape) != shape
    ]
    if misshapen:
        problems.append(f"has misshapen {listed(misshapen)}")
    if problems:
        # A damaged or edited file differs in a few.
        other = len(missing) + len(misshapen) > len(expected) // 4
        advice = (
            "it is built otherwise, as LightVAE Pro and Lite are, and can't be decoded exactly here: take Wan's own "
            "VAE, or one that was only pruned in width"
            if other
            else "take the VAE as it was published"
        )
        raise CheckpointError(f"{named} {'; '.join(problems)}; {advice}")
    odd = [f"{key} {tensor.dtype}" for key, tensor in fitted.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise CheckpointError(
            f"{named} has weights that are no fp32, bf16, fp16 or fp8: {listed(odd)}; take the VAE in one of these"
        )
    return fitted


def _long_axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)
