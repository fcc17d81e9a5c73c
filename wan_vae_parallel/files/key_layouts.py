"""The keys that tensors of a Wan VAE come under, and their way to Wan's own.

Two layouts are in use: Wan's own, which ComfyUI's files have, and diffusers'. Either may stand behind a prefix, as in a
checkpoint of several models, and hold the names of wrappers, as torch.compile's.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

Layout = Literal["original", "diffusers"]

# Names that wrappers put into the keys of what they wrap: torch.compile, data parallelism, sharding, checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What a VAE's keys begin with, in either layout; all else belongs to other models, or to no layer.
_OWN = ("encoder.", "decoder.", "conv1.", "conv2.", "quant_conv.", "post_quant_conv.")
# Counters that training leaves.
_IDLE = (".num_batches_tracked",)
# Keys that tell other models' files, and what to call these.
_OTHERS = (
    (r"^(samples|latents?|latent_tensor)$", "latents, which a VAE decodes"),
    (r"lora_|\.lora\.|\.(alpha|diff)$", "a LoRA"),
    (r"^model\.diffusion_model\.", "a diffusion model, not its VAE"),
    (
        r"(^|\.)(embed_tokens|token_embedding|shared)\.weight$|(^|\.)text_model\.|\.SelfAttention\.",
        "a text encoder, not the VAE",
    ),
    (r"(^|\.)(visual|vision_model|vision_tower)\.", "an image encoder (CLIP), not the VAE"),
    (r"(^|\.)(self_attn|cross_attn|ffn)\.", "a diffusion model, not its VAE"),
    (
        r"(^|\.)(taesd_)?decoder\.(layers\.)?\d+\.",
        "a small VAE for previews (TAE, as taew2_1, taew2_2 and lighttaew2_1), another architecture",
    ),
    (r"(^|\.)decoder\.conv_in\.conv\.", "the VAE of another video model"),
    (r"(^|\.)encoder\.(downsamples|down_blocks)\.", "an encoder alone, without its decoder"),
    (r"(^|\.)(vocoder|audio_vae)\.|\.weight_[gv]$", "the VAE of sound"),
    (r"(^|\.)(encoder|decoder|first_stage_model)\.", "the VAE of another model"),
    (r"^(params_ema\.)?(model\.\d+|conv_first|body\.\d+)\.", "a model that enlarges pictures"),
)
MOST_NAMED = 5


def own_keys(state_dict: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """Those of the keys, as they are in ``state_dict``, that belong to the VAE.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    names = _unwrapped(state_dict, source)
    _, prefix = _found({name: state_dict[key] for name, key in names.items()}, source)
    return [key for name, key in names.items() if _is_own(name, prefix)]


def own_tensors(state_dict: Mapping[str, torch.Tensor], source: str) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The VAE's tensors without a prefix or wrappers, and the layout of their keys; what else there is is said once.

    Raises:
        CheckpointError: they are no Wan VAE's, or several VAEs'.
    """
    names = {name: state_dict[key] for name, key in _unwrapped(state_dict, source).items()}
    layout, prefix = _found(names, source)
    own = {name.removeprefix(prefix): tensor for name, tensor in names.items() if _is_own(name, prefix)}
    if left := [name for name in names if not _is_own(name, prefix)]:
        _say_once(f"{source}: {len(left)} tensors belong to no layer of the VAE and are left out: {listed(left)}")
    return layout, own


def listed(items: Iterable[str]) -> str:
    """The first few, and how many more."""
    items = list(items)
    more = len(items) - MOST_NAMED
    return ", ".join(items[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


@functools.cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def _is_own(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name[len(prefix) :].startswith(_OWN) and not name.endswith(_IDLE)


def _unwrapped(state_dict: Mapping[str, torch.Tensor], source: str) -> dict[str, str]:
    """The keys by those that they were before modules were wrapped, as by torch.compile."""
    plain: dict[str, str] = {}
    for key in state_dict:
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in plain:
            raise CheckpointError(
                f"{source} has both {plain[name]} and {key}, which are the same tensor wrapped; save the VAE anew"
            )
        plain[name] = key
    return plain


def _found(names: Mapping[str, torch.Tensor], source: str) -> tuple[Layout, str]:
    """The layout and the prefix of the one VAE that there is."""
    found: list[tuple[Layout, str]] = []
    for name, tensor in names.items():
        if name.endswith("decoder.conv1.weight"):
            prefix = name.removesuffix("decoder.conv1.weight")
            if not prefix or prefix.endswith("."):
                found.append(("original", prefix))
        elif name.endswith("decoder.conv_in.weight"):
            prefix = name.removesuffix("decoder.conv_in.weight")
            # Of image VAEs' four axes one kind is a relative.
            video = tensor.dim() == 5 or f"{prefix}decoder.mid_block.resnets.0.norm1.gamma" in names
            if (not prefix or prefix.endswith(".")) and video and f"{prefix}decoder.norm_out.gamma" in names:
                found.append(("diffusers", prefix))
    if len(found) > 1:
        # Others may have a layer of that name.
        ends = {"original": "decoder.head.0.gamma", "diffusers": "decoder.norm_out.gamma"}
        found = [one for one in found if one[1] + ends[one[0]] in names] or found
    if len(found) > 1:
        prefixes = ", ".join(repr(prefix) for _, prefix in found)
        raise CheckpointError(f"{source} has several VAEs, under the prefixes {prefixes}; save one of them alone")
    if not found:
        raise CheckpointError(
            f"{source} is not a Wan VAE: {_what_else(names)}; take the VAE that came with the Wan model"
        )
    return found[0]


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
                    f"Stable Diffusion's, Flux's or Ming's"
                )
            if len(shape) != 5:
                return f"its {key} has {len(shape)} axes {shape}, where five belong"
            return (
                f"it has {key}, as in diffusers' layout, but lacks {key.removesuffix('conv_in.weight')}norm_out.gamma, "
                f"so it is incomplete or the VAE of another video model"
            )
    why = f"it has neither decoder.conv1.weight nor decoder.conv_in.weight, but {listed(keys)}"
    for pattern, name in _OTHERS:
        if any(re.search(pattern, key) for key in keys):
            return f"{why}: {name}"
    return why


def originally_named(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Tensors of diffusers' layout by Wan's own keys.

    Raises:
        CheckpointError: two keys mean one layer.
    """
    residual = any(re.match(r"decoder\.up_blocks\.\d+\.upsampler\.", key) for key in tensors)
    renamed: dict[str, str] = {}
    for key in tensors:
        original = _original_key(key, residual=residual)
        if original in renamed:
            raise CheckpointError(
                f"{source} has both {renamed[original]} and {key}, which are the same layer; save the VAE anew"
            )
        renamed[original] = key
    return {original: tensors[key] for original, key in renamed.items()}


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
