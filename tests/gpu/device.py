"""The one device of the tests that decode on one, and its memory."""

from __future__ import annotations

import gc

import torch

CUDA = torch.device("cuda", 0)


def clear():
    gc.collect()
    # cuBLAS keeps a workspace in torch's memory (32 MiB on Hopper), which would count as the decode's.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
