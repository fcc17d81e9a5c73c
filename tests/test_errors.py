"""What counts as which error."""

from __future__ import annotations

import errno

import pytest
import torch

from wan_vae_parallel.errors import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        # NCCL makes its connections late, when a device may be full.
        (RuntimeError("NCCL error in: ... Last error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("NCCL error in: ... Last error:\nCuda failure 999 'unknown error'"), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error, counts):
    assert is_out_of_memory(error) == counts
