"""What ranks must have in common before they exchange bytes."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..errors import WorkerError

# Of each tensor: enough to tell other weights, whatever their size.
_SAMPLE = 1024

_boards: collections.Counter[tuple[int, ...]] = collections.Counter()


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short text that differs where names, shapes, dtypes or the beginnings of values do."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:_SAMPLE].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


class Board:
    """Words that the ranks of a group leave for one another in the store through which they found each other.

    No device waits for them and no group of its own is needed. Each call is made by all ranks, in the same order.

    Args:
        group: the ranks; making a board is a call that all of them make.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        # All members made as many boards before, so they count alike.
        number = _boards[tuple(ranks)]
        _boards[tuple(ranks)] += 1
        name = f"wan-vae-parallel/{'-'.join(map(str, ranks))}/{number}"
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # torch does not list it
        self._count = 0
        self._own: list[str] = []

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (plain data), by rank."""
        self._say(value)
        values = [json.loads(self._store.get(self._key(rank))) for rank in range(self.world_size)]
        self._count += 1
        # Who answers in this round has read all of the rounds before.
        for key in self._own[:-1]:
            self._store.delete_key(key)
        del self._own[:-1]
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's ``value``, on all; the first does not wait for the others."""
        if self.rank == 0:
            self._say(value)
        else:
            value = json.loads(self._store.get(self._key(0)))
        self._count += 1
        return value

    def _key(self, rank: int) -> str:
        return f"{self._count}/{rank}"

    def _say(self, value: Any) -> None:
        self._own.append(self._key(self.rank))
        self._store.set(self._own[-1], json.dumps(value))


def check_agreement(facts: Mapping[str, str], board: Board) -> None:
    """Compares ``facts`` among all ranks; all must call.

    Args:
        facts: what must be alike, by what it is called.
        board: the ranks'.

    Raises:
        WorkerError: on every rank, where ranks differ: neighbours would take each other's bytes for what they
            are not.
    """
    everyone = board.exchange(dict(facts))
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise WorkerError(
                    f"ranks disagree on the {name}: rank 0 has {first}, rank {rank} has {other}; use the same files "
                    f"and the same version on all of them"
                )
