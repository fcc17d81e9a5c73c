"""A decoder's weights in memory that workers share: one copy for all, which they take to their devices."""

from __future__ import annotations

from typing import Any

import torch

from ..cancel import check_cancelled
from ..files.checkpoint import Checkpoint, checkpoint_from_state_dict
from .shared_memory import SharedMemory

# Bytes between tensors begin at multiples of this.
_ALIGNMENT = 64

# What a worker must know besides: plain values, and dtypes.
Manifest = dict[str, Any]


def share_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[SharedMemory, Manifest]:
    """Copies the decoder's tensors in ``dtype``; returns the copy, and where in it each of them lies."""
    places, size = {}, 0
    for name, tensor in checkpoint.decoder.items():
        places[name] = tuple(tensor.shape), dtype, size
        size += -(-tensor.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    memory = SharedMemory.create(max(1, size))
    try:
        for name, (shape, _, offset) in places.items():
            check_cancelled()
            memory.tensor(torch.Size(shape), dtype, offset).copy_(checkpoint.decoder[name].detach())
    except BaseException:
        memory.close()
        raise
    return memory, {"tensors": places, "size": memory.size, "source": checkpoint.source}


def shared_checkpoint(descriptor: int, manifest: Manifest) -> Checkpoint:
    """The checkpoint behind a descriptor that was handed over; it closes that, and its tensors keep the memory."""
    memory = SharedMemory(descriptor, manifest["size"])
    tensors = {
        name: memory.tensor(torch.Size(shape), dtype, offset)
        for name, (shape, dtype, offset) in manifest["tensors"].items()
    }
    memory.close()
    return checkpoint_from_state_dict(tensors, source=manifest["source"])
