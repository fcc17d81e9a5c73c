"""The smallest kernel there is: whether Triton can compile and launch one here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _trial_kernel(out):
    tl.store(out, 1)


def why_not(device: torch.device) -> str:
    """What keeps kernels from running on ``device``, such as a missing C compiler; nothing if they run."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device(device):
            _trial_kernel[(1,)](out)
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        return f"Triton can't compile kernels ({' '.join(str(error).split()) or type(error).__name__})"
    return "" if out.item() == 1 else "a kernel of Triton's did nothing"
