"""Weights in memory that workers share: one copy for all, which they take to their devices."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from ..architecture import Architecture
from ..cancel import check_cancelled
from ..files.checkpoint import Checkpoint
from .shared_memory import SharedMemory

# Bytes between tensors begin at multiples of this.
_ALIGNMENT = 64

# What a worker must know besides: plain values, and dtypes.
Manifest = dict[str, Any]


Part = Literal["decoder", "encoder"]


def share_weights(checkpoint: Checkpoint, part: Part, dtype: torch.dtype) -> tuple[SharedMemory, Manifest]:
    """Copies a part's tensors in ``dtype``; returns the copy, and where in it each of them lies."""
    tensors = checkpoint.decoder if part == "decoder" else checkpoint.encoder
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = tuple(tensor.shape), dtype, size
        size += -(-tensor.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    memory = SharedMemory.create(max(1, size))
    try:
        for name, (shape, _, offset) in places.items():
            check_cancelled()
            memory.tensor(torch.Size(shape), dtype, offset).copy_(tensors[name].detach())
    except BaseException:
        memory.close()
        raise
    architecture = dataclasses.asdict(checkpoint.architecture)  # a worker's class has another module's name
    return memory, {"tensors": places, "size": memory.size, "architecture": architecture, "dtype": dtype}


def shared_weights(descriptor: int, manifest: Manifest) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """What lies behind a descriptor that was handed over; it closes that, and the tensors keep the memory."""
    memory = SharedMemory(descriptor, manifest["size"])
    tensors = {
        name: memory.tensor(torch.Size(shape), dtype, offset)
        for name, (shape, dtype, offset) in manifest["tensors"].items()
    }
    memory.close()
    return Architecture(**manifest["architecture"]), tensors
