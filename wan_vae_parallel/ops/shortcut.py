"""Wan 2.2's shortcut around an upsampling block.

T frames, H rows, W columns, C channels in, O channels out
"""

from __future__ import annotations

import torch

from .dispatch import kernels_run, say_once


def add_duplicated(
    x: torch.Tensor, *, time_factor: int, phases: tuple[int, int], transposed: bool = False, out: torch.Tensor
) -> None:
    """Adds channels spread over frames, rows and columns by repeating them.

    Reading ``x``'s channels, each repeated equally often, in the order (output channel, frame, row, column) fills
    an output of twice the rows and columns and ``time_factor`` times the frames ("DupUp3D" in Wan 2.2's code).

    Args:
        x: ``[T, H, W, C]``, contiguous.
        time_factor: 1 or 2: frames that each frame of ``x`` makes.
        phases: first and last (exclusive) of these frames that ``out`` has.
        transposed: rows and columns have changed places in ``x`` and ``out``.
        out: ``[T * (phases[1] - phases[0]), 2H, 2W, O]``, contiguous; added to. O divides C, and C divides
            ``4 * time_factor * O``.

    Raises:
        ValueError: the shapes don't fit.
    """
    frames, rows, columns, channels = x.shape
    first, stop = phases
    out_channels = out.shape[-1]
    factor = 4 * time_factor
    if (
        not 0 <= first < stop <= time_factor
        or out.shape[:3] != (frames * (stop - first), 2 * rows, 2 * columns)
        or channels % out_channels
        or factor * out_channels % channels
    ):
        raise ValueError(
            f"add_duplicated can't spread {tuple(x.shape)} over {tuple(out.shape)}, time x{time_factor}, {phases}"
        )
    if kernels_run(x):
        from .kernels import shortcut as kernels

        if kernels.takes(x, out):
            kernels.add_duplicated(x, time_factor=time_factor, phases=phases, transposed=transposed, out=out)
            return
        say_once(f"the shortcut of {str(x.dtype).removeprefix('torch.')} tensors runs on PyTorch's kernels, slower")
    group = channels // out_channels
    repeats = factor // group
    spread = out.unflatten(1, (rows, 2)).unflatten(3, (columns, 2))
    for offset in range(factor):
        phase, row, column = offset // 4, offset // 2 % 2, offset % 2
        if transposed:
            row, column = column, row
        if first <= phase < stop:
            spread[phase - first :: stop - first, :, row, :, column].add_(x[..., offset // repeats :: group])
