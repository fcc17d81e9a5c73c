"""The smallest kernel there is: whether Triton can compile and launch one here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import is_out_of_memory
from .launch import reason


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


def why_not(device: torch.device) -> str:
    """What keeps kernels from running on ``device``, such as a missing C compiler; nothing if they run.

    Raises:
        RuntimeError: the device has no memory left.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device(device):
            # Not through `launch`, which may only note it.
            _probe_kernel[(1,)](out, enable_fp_fusion=True)
        done = out.item() == 1
    except Exception as error:  # compilers fail in many ways
        if is_out_of_memory(error):  # which passes
            raise
        return f"Triton can't compile kernels ({reason('_probe_kernel', error)})"
    return "" if done else "a kernel of Triton's did nothing"
