"""The weights of a VAE that ComfyUI holds, as they were before other nodes wrapped, patched or replaced its modules."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import comfy.lora
import torch

from ..wan_vae_parallel.errors import CheckpointError
from ..wan_vae_parallel.files.checkpoint import Checkpoint, checkpoint_from_state_dict

# What messages call them.
SOURCE = "the connected VAE"
_MOST_NAMED = 3
# Modules of these packages are what ComfyUI's own VAE is made of.
_USUAL = ("comfy", "torch")


def unwrapped(model: torch.nn.Module | None) -> torch.nn.Module | None:
    """The module that torch.compile was called with, if ``model`` is what it returned."""
    while isinstance(original := getattr(model, "_orig_mod", None), torch.nn.Module):
        model = original
    return model


def patches_of(patcher: Any) -> Hashable:
    """What tells one set of weight patches, such as a LoRA's, from another; None if there are none."""
    return patcher.patches_uuid if getattr(patcher, "patches", None) else None


class LoadedWeights:
    """Reads the weights of ``model`` whenever it is called, without keeping the model alive.

    Object patches that a patcher has put in are looked through, weight patches are applied, as core's own decode does.

    Args:
        model: what core's VAE calls its first stage model, not compiled.
        patcher: its ModelPatcher.
    """

    def __init__(self, model: torch.nn.Module, patcher: Any) -> None:
        self._model = weakref.ref(model)
        belongs = unwrapped(getattr(patcher, "model", None)) is model
        # All clones of a patcher share these two, and fill them while the model is patched.
        self._objects: Mapping[str, Any] = getattr(patcher, "object_patches_backup", {}) if belongs else {}
        self._weights: Mapping[str, Any] = getattr(patcher, "backup", {}) if belongs else {}
        self._patches = {key: list(patches) for key, patches in patcher.patches.items()} if belongs else {}
        self._functions = list(getattr(patcher, "weight_wrapper_patches", ())) if belongs else []

    def __call__(self) -> Checkpoint:
        """The weights, checked.

        Raises:
            CheckpointError: they are not a Wan VAE's, or another node has put other modules in their place.
        """
        model = self._model()
        if model is None:
            raise CheckpointError("the VAE that was connected is no longer loaded; queue the graph again")
        if self._functions:
            raise CheckpointError(
                f"another node changes weights of {SOURCE} while they are used ({_listed(self._functions)}); connect "
                f"the VAE as its loader gives it, before that node"
            )
        tensors = self._tensors(model)
        try:
            return checkpoint_from_state_dict(tensors, source=SOURCE)
        except CheckpointError as error:
            foreign = _foreign_modules(model)
            if not foreign:
                raise
            try:
                return checkpoint_from_state_dict(_without_holders(tensors, foreign), source=SOURCE)
            except CheckpointError:
                named = [f"{name or 'all of it'} is a {type(m).__qualname__}" for name, m in foreign.items()]
                raise CheckpointError(
                    f"another node has replaced modules of {SOURCE}: {_listed(named)}, so its weights can't be read "
                    f"({error}); connect the VAE as its loader gives it, before that node"
                ) from error

    def _tensors(self, model: torch.nn.Module) -> dict[str, Any]:
        tensors: dict[str, Any] = dict(model.state_dict())
        for path, module in _parametrized(model).items():
            for name in module.parametrizations:
                for key in [key for key in tensors if key.startswith(f"{path}.parametrizations.{name}.")]:
                    del tensors[key]
                tensors[f"{path}.{name}"] = getattr(module, name).detach()
        for key, backup in self._weights.items():
            if key in tensors:
                tensors[key] = backup.weight
        # The last one in may lie within an earlier one's module.
        for path, was in reversed(list(self._objects.items())):
            if isinstance(was, torch.nn.Module):
                for key in [key for key in tensors if key.startswith(path + ".")]:
                    del tensors[key]
                tensors.update(was.state_dict(prefix=path + "."))
            elif isinstance(was, torch.Tensor):
                tensors[path] = was
        for key, patches in self._patches.items():
            if key in tensors:
                weight = tensors[key].detach().to("cpu", torch.float32, copy=True)
                tensors[key] = comfy.lora.calculate_weight(patches, weight, key).to(tensors[key].dtype)
        return tensors


def changed_padding(model: torch.nn.Module, part: str) -> str:
    """What other nodes have changed in how the convolutions of ``part`` pad, for a message; empty if nothing.

    Args:
        model: what core's VAE calls its first stage model.
        part: ``"decoder"`` or ``"encoder"``; one alone, since this is looked up at each decode and encode.
    """
    changed = []
    for name, module in getattr(model, part, model).named_modules(prefix=part):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            if module.padding_mode != "zeros":
                changed.append(f"{name} has padding_mode {module.padding_mode}")
            elif "_conv_forward" in vars(module):
                changed.append(f"{name} has a _conv_forward of its own")
    return _listed(changed)


def _parametrized(model: torch.nn.Module) -> dict[str, Any]:
    """Modules whose weights are computed from others, as by weight normalisation."""
    parametrized = torch.nn.utils.parametrize.is_parametrized
    return {name: module for name, module in model.named_modules() if parametrized(module)}


def _foreign_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules of classes that are neither ComfyUI's nor PyTorch's, by their paths."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] not in _USUAL
    }


def _without_holders(tensors: Mapping[str, Any], foreign: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """``tensors`` by the keys that they had before modules went into such that only hold them."""
    held = []
    for path, module in foreign.items():
        children = [name for name, _ in module.named_children()]
        if path and len(children) == 1 and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            held.append((f"{path}.{children[0]}.", f"{path}."))
    plain = {}
    # The innermost first: the outer ones' paths stay as they are.
    for key, tensor in tensors.items():
        name = key
        for inside, outside in sorted(held, key=lambda pair: len(pair[0]), reverse=True):
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
        plain[name] = tensor
    return plain


def _listed(items: list[str]) -> str:
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
