"""What ranks must have in common before they exchange bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..errors import WorkerError

# Of each tensor: enough to tell other weights, whatever their size.
_SAMPLE = 1024


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short text that differs where names, shapes, dtypes or the beginnings of values do."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:_SAMPLE].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_agreement(facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Compares ``facts`` among all ranks of ``group``; all must call.

    Args:
        facts: what must be alike, by what it is called.
        group: the ranks, of any backend.

    Raises:
        WorkerError: on every rank, where ranks differ: neighbours would take each other's bytes for what they
            are not.
    """
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, dict(facts), group=group)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise WorkerError(
                    f"ranks disagree on the {name}: rank 0 has {first}, rank {rank} has {other}; use the same files "
                    f"and the same version on all of them"
                )
