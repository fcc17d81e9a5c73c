"""Safetensors in, a strict state dict in Wan's original key layout out.

Two layouts are in use: Wan's own, which ComfyUI's files have, and diffusers'. Either may carry a ``model.`` or
``vae.`` prefix. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..architecture import Architecture
from ..errors import CheckpointError
from ..model.decoder import WanDecoder
from ..model.encoder import WanEncoder
from .tensor_file import FileVersion, TensorFile

Layout = Literal["original", "diffusers"]

_PREFIXES = ("", "model.", "vae.")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
# A diffusers model folder keeps its VAE's weights under this name.
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# Names that wrappers put into the keys of what they wrap: torch.compile, data parallelism, sharding, checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Keys that tell other models' files, and what to call these.
_OTHERS = (
    (r"lora_|\.lora\.|\.(alpha|diff)$", "a LoRA"),
    (r"(^|\.)(self_attn|cross_attn|ffn)\.|^model\.diffusion_model\.", "a diffusion model, not its VAE"),
    (r"^taesd_decoder\.|^decoder\.\d+\.", "a small VAE for previews (TAE)"),
    (r"(^|\.)decoder\.conv_in\.conv\.", "the VAE of another video model"),
)
# The encoder's keys.
_ENCODER_PREFIXES = ("encoder.", "conv1.")
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Wan VAE's weights, checked against its architecture.

    Attributes:
        architecture: read off the shapes.
        decoder: the decoder's tensors by their original keys, complete and of the right shapes.
        encoder: the encoder's tensors by their original keys, complete and of the right shapes; empty if there is none.
        layout: the key layout that they came in.
        source: what to call it in messages.
        version: of the file that it was read from, if it was one.
    """

    architecture: Architecture
    decoder: Mapping[str, torch.Tensor] = field(repr=False)
    encoder: Mapping[str, torch.Tensor] = field(repr=False)
    layout: Layout
    source: str
    version: FileVersion | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights (of the first convolution's, if they differ)."""
        return self.decoder["decoder.conv1.weight"].dtype

    @property
    def parameters(self) -> int:
        """Number of the decoder's parameters."""
        return sum(tensor.numel() for tensor in self.decoder.values())


def read_checkpoint(path: str | Path, version: FileVersion | None = None) -> Checkpoint:
    """Reads a Wan VAE from a safetensors file, or from a folder in diffusers' format.

    The tensors are in this process's own memory: whatever becomes of the file, they stay as they are.

    Args:
        path: of the file or folder.
        version: what the file was when it was loaded; another one is refused.

    Raises:
        CheckpointError: there is no such file, it is a pickle, it is damaged, it is no Wan VAE, it changed while it was
            read, or it is not the ``version`` that it was.
        OutOfMemoryError: the host has no room for it.
    """
    with _opened(Path(path), version) as file:
        _checked(
            file, file.described(), described=True
        )  # so that of another model's large file no more than the header is read
        return _checked(file, file.read())


def describe_checkpoint(path: str | Path, version: FileVersion | None = None) -> Checkpoint:
    """Like `read_checkpoint`, but its tensors are on the meta device, without values: only the header is read."""
    with _opened(Path(path), version) as file:
        return _checked(file, file.described(), described=True)


def _opened(path: Path, version: FileVersion | None) -> TensorFile:
    file = TensorFile(
        checkpoint_file(path), CheckpointError, another="name a Wan VAE's safetensors file", again="fetch it again"
    )
    try:
        if version not in (None, file.version):
            raise CheckpointError(f"{path} was replaced since it was loaded; load the VAE again")
        _refuse_pickle(file)
    except BaseException:
        file.close()
        raise
    return file


def _checked(file: TensorFile, tensors: Mapping[str, torch.Tensor], *, described: bool = False) -> Checkpoint:
    checkpoint = checkpoint_from_state_dict(tensors, source=file.path.name, described=described)
    return dataclasses.replace(checkpoint, version=file.version)


def checkpoint_file(path: Path) -> Path:
    """The file with the weights: ``path`` itself, or the one in a folder in diffusers' format.

    Raises:
        CheckpointError: it is a folder without one.
    """
    try:
        if not path.is_dir():
            return path
        file = path / _DIFFUSERS_FILE
        if file.exists():
            return file
    except OSError as error:
        raise CheckpointError(f"{path} can't be opened ({error}); name a Wan VAE's safetensors file") from error
    raise CheckpointError(f"{path} is a folder without {_DIFFUSERS_FILE}; name the safetensors file itself")


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
        raise CheckpointError(f"{source} is no mapping of names to tensors; pass a module's state dict")
    layout, tensors = _original_layout(_unwrapped(state_dict, source), source)
    try:
        architecture = Architecture.from_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{source} is not a Wan VAE: {error}") from None
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith(_ENCODER_PREFIXES)}
    decoder = {key: tensor for key, tensor in tensors.items() if key not in encoder}
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in WanDecoder(architecture).state_dict().items()}
    named = f"{source}, read as a {architecture.name} VAE of width {architecture.width},"
    _check_against(expected, decoder, named)
    if any(key.startswith("encoder.") for key in encoder):
        # All of an encoder or nothing: whoever encodes with part of one gets noise.
        whole = architecture
        if whole.encoder_width is None:  # its first convolution is missing
            whole = dataclasses.replace(whole, encoder_width=whole.width)
        with torch.device("meta"):
            expected = {key: tuple(tensor.shape) for key, tensor in WanEncoder(whole).state_dict().items()}
        _check_against(expected, encoder, named)
    else:
        encoder = {}
    empty = [key for key, tensor in (*decoder.items(), *encoder.items()) if tensor.is_meta]
    if empty and not described:
        raise CheckpointError(
            f"{named} has weights without values (on the meta device): {_listed(empty)}; something has moved them "
            f"away: take the VAE from its file"
        )
    return Checkpoint(architecture=architecture, decoder=decoder, encoder=encoder, layout=layout, source=source)


def _refuse_pickle(file: TensorFile) -> None:
    # A safetensors file begins with its header's length in eight bytes, of any value, and the header's brace.
    pickled = file.head[8:] != b"{" and re.match(rb"PK\x03\x04|\x80[\x00-\x05]", file.head)
    if file.path.suffix.lower() in _PICKLE_SUFFIXES or pickled:
        raise CheckpointError(
            f"{file.path} is a pickle, which can run any code when it is opened, so it is not opened; "
            f"take the same VAE as .safetensors, or convert it on a machine where you trust the file"
        )


def _unwrapped(state_dict: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The same tensors by the keys that they had before modules were wrapped, as by torch.compile."""
    plain: dict[str, str] = {}
    for key in state_dict:
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in plain:
            raise CheckpointError(
                f"{source} has both {plain[name]} and {key}, which are the same tensor wrapped; save the VAE anew"
            )
        plain[name] = key
    return {name: state_dict[key] for name, key in plain.items()}


def _original_layout(state_dict: Mapping[str, torch.Tensor], source: str) -> tuple[Layout, dict[str, torch.Tensor]]:
    for prefix in _PREFIXES:
        if prefix + "decoder.conv1.weight" in state_dict:
            return "original", _stripped(state_dict, prefix, source)
        conv_in = state_dict.get(prefix + "decoder.conv_in.weight")
        if conv_in is not None and conv_in.dim() == 5 and prefix + "decoder.norm_out.gamma" in state_dict:
            tensors = _stripped(state_dict, prefix, source)
            blocks = {
                m.group(1) for m in map(re.compile(r"decoder\.up_blocks\.\d+\.(upsamplers?)\.").match, tensors) if m
            }
            residual = "upsampler" in blocks
            return "diffusers", _renamed(tensors, residual, source)
    raise CheckpointError(
        f"{source} is not a Wan VAE: {_what_else(state_dict)}; take the VAE that came with the Wan model"
    )


def _what_else(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Why the tensors are no Wan VAE's, and what they are if that can be told."""
    if not state_dict:
        return "it has no tensors at all"
    keys = sorted(state_dict)
    for key in keys:
        if key.endswith("decoder.conv_in.weight"):
            shape = tuple(state_dict[key].shape)
            if len(shape) == 4:
                return (
                    f"its {key} has four axes {shape}, where a video VAE's has five, so it is an image VAE, such as "
                    f"Stable Diffusion's or Flux's"
                )
            if len(shape) != 5:
                return f"its {key} has {len(shape)} axes {shape}, where five belong"
            if key.removesuffix("conv_in.weight") + "norm_out.gamma" in state_dict:
                return _foreign_prefix(key.removesuffix("decoder.conv_in.weight"))
            return (
                f"it has {key}, as in diffusers' layout, but lacks {key.removesuffix('conv_in.weight')}norm_out.gamma, "
                f"so it is incomplete or the VAE of another video model"
            )
        if key.endswith("decoder.conv1.weight"):
            return _foreign_prefix(key.removesuffix("decoder.conv1.weight"))
    why = f"it has neither decoder.conv1.weight nor decoder.conv_in.weight, but {_listed(keys)}"
    for pattern, name in _OTHERS:
        if any(re.search(pattern, key) for key in keys):
            return f"{why}: {name}"
    return why


def _foreign_prefix(prefix: str) -> str:
    known = ", ".join(repr(prefix) for prefix in _PREFIXES if prefix)
    return f"its keys begin with {prefix!r}, where {known} or nothing is known: save the VAE's tensors alone"


def _renamed(tensors: Mapping[str, torch.Tensor], residual: bool, source: str) -> dict[str, torch.Tensor]:
    renamed: dict[str, str] = {}
    for key in tensors:
        original = _original_key(key, residual=residual)
        if original in renamed:
            raise CheckpointError(
                f"{source} has both {renamed[original]} and {key}, which are the same layer; save the VAE anew"
            )
        renamed[original] = key
    return {original: tensors[key] for original, key in renamed.items()}


def _stripped(state_dict: Mapping[str, torch.Tensor], prefix: str, source: str) -> dict[str, torch.Tensor]:
    foreign = sorted(key for key in state_dict if not key.startswith(prefix))
    if foreign:
        raise CheckpointError(
            f"{source} has keys outside its prefix {prefix!r}: {_listed(foreign)}; "
            f"it holds more than a VAE: save the VAE's tensors alone"
        )
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}


_RESNET = {
    "norm1.gamma": "residual.0.gamma",
    "conv1.weight": "residual.2.weight",
    "conv1.bias": "residual.2.bias",
    "norm2.gamma": "residual.3.gamma",
    "conv2.weight": "residual.6.weight",
    "conv2.bias": "residual.6.bias",
    "conv_shortcut.weight": "shortcut.weight",
    "conv_shortcut.bias": "shortcut.bias",
}


def _original_key(key: str, *, residual: bool) -> str:
    """A diffusers key in Wan's original layout; unknown keys stay as they are, for the strict check to name."""
    rules: list[tuple[str, str]] = [
        (r"post_quant_conv\.", "conv2."),
        (r"quant_conv\.", "conv1."),
        (r"(encoder|decoder)\.conv_in\.", r"\1.conv1."),
        (r"(encoder|decoder)\.norm_out\.", r"\1.head.0."),
        (r"(encoder|decoder)\.conv_out\.", r"\1.head.2."),
        (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.middle.0."),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
        (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.middle.2."),
    ]
    if residual:
        rules += [
            (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.upsamples.\1.upsamples.\2."),
            (r"decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
            (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.downsamples.\1.downsamples.\2."),
            (r"encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
        ]
    else:
        rules += [(r"encoder\.down_blocks\.(\d+)\.", r"encoder.downsamples.\1.")]
        match = re.match(r"decoder\.up_blocks\.([0-3])\.(?:resnets\.([0-2])|upsamplers\.0)\.(.*)", key)
        if match:
            # Wan 2.1 numbers blocks and upsamplings through: four to a stage.
            block = match.group(2) if match.group(2) is not None else "3"
            key = f"decoder.upsamples.{4 * int(match.group(1)) + int(block)}.{match.group(3)}"
    for pattern, replacement in rules:
        key, found = re.subn("^" + pattern, replacement, key)
        if found:
            break
    if ".upsamples." in key or ".downsamples." in key or ".middle." in key:
        for theirs, ours in _RESNET.items():
            if key.endswith("." + theirs):
                return key.removesuffix(theirs) + ours
    return key


def _check_against(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], named: str) -> None:
    problems = []
    if missing := [key for key in expected if key not in tensors]:
        problems.append(f"lacks {_listed(missing)}")
    if unexpected := [key for key in tensors if key not in expected]:
        problems.append(f"has unexpected {_listed(unexpected)}")
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if misshapen:
        problems.append(f"has misshapen {_listed(misshapen)}")
    if problems:
        raise CheckpointError(f"{named} {'; '.join(problems)}; take the VAE as it was published")
    odd = [f"{key} {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise CheckpointError(
            f"{named} has weights that are no fp32, bf16 or fp16: {_listed(odd)}; take the VAE in one of these"
        )


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
