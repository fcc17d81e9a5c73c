"""The decoder's last activations as pictures.

T frames, H rows, W columns, C colours, p patch
"""

from __future__ import annotations

import torch

from .dispatch import KERNEL_DTYPES, FallingBack, kernels_run, say_once


def to_frames(x: torch.Tensor, patch: int, *, transposed: bool = False) -> torch.Tensor:
    """Unfolds patches and maps [-1, 1] to [0, 1], clamped.

    Args:
        x: ``[T, H, W, C * p * p]`` with channels in the order (colour, column, row) of the patch.
        patch: p, rows and columns of a patch.
        transposed: rows and columns have changed places in ``x``; in the frames they are back.

    Returns:
        ``[T, H * p, W * p, C]``, contiguous, fp32 (fp64 for an fp64 ``x``).
    """
    if kernels_run(x):
        from .kernels import frames as kernels

        reason = kernels.why_not(x, patch)
        if not reason:
            with FallingBack(x):
                return kernels.to_frames(x, patch, transposed=transposed)
        elif x.dtype in KERNEL_DTYPES:
            say_once(f"frames are converted by PyTorch's kernels, which is slower: ours {reason}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if transposed:
        x = x.transpose(1, 2)
    frames, rows, columns, channels = x.shape
    colours = channels // patch**2
    patches = x.unflatten(3, (colours, patch, patch)).permute(0, 1, 5, 2, 4, 3)
    pictures = torch.empty((frames, rows, patch, columns, patch, colours), dtype=wide, device=x.device)
    pictures.copy_(patches).add_(1).div_(2).clamp_(0, 1)
    return pictures.view(frames, rows * patch, columns * patch, colours)
