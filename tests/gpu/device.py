"""The one device of the tests that decode on one, and its memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

CUDA = torch.device("cuda", 0)
GIB = 2**30
# GiB of a card at home that are taken: a desktop and its programs, and CUDA's context.
TAKEN = 1.5


def clear():
    gc.collect()
    # cuBLAS keeps a workspace in torch's memory (32 MiB on Hopper), which would count as the decode's.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def card_of(gib: float) -> Iterator[int]:
    """Within it the device has what a card of so many GiB has at home, and this process gets no more.

    A tensor takes the rest, so that CUDA tells little that is free, and torch's allocator has its limit.

    Yields:
        Bytes that are free; `most_reserved` tells what was taken of them.
    """
    clear()
    free, total = torch.cuda.mem_get_info(CUDA)
    room = int((gib - TAKEN) * GIB)
    ballast = torch.empty(free - room, dtype=torch.uint8, device=CUDA)
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + room) / total, CUDA)
        torch.cuda.reset_peak_memory_stats(CUDA)
        yield room
    finally:
        del ballast
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
        clear()


def most_reserved(room: int) -> int:
    """The most bytes that torch had of the device within `card_of`, beside the tensor that takes the rest."""
    free, _ = torch.cuda.mem_get_info(CUDA)
    return room - free + torch.cuda.max_memory_reserved(CUDA) - torch.cuda.memory_reserved(CUDA)
