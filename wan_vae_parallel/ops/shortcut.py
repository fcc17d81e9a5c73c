"""Wan 2.2's shortcuts around blocks that double the resolution, or halve it.

T frames, H rows, W columns, C channels in, O channels out
"""

from __future__ import annotations

import torch

from .dispatch import FallingBack, kernels_run, say_once


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
            with FallingBack(x):
                kernels.add_duplicated(x, time_factor=time_factor, phases=phases, transposed=transposed, out=out)
                return
        else:
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


def add_averaged(x: torch.Tensor, *, time_factor: int, transposed: bool = False, out: torch.Tensor) -> None:
    """Adds averages over frames, rows and columns, and over channels if there are too many.

    What 2 x 2 neighbours of ``time_factor`` frames hold, in the order (channel, frame, row, column), is averaged in
    O groups of neighbours in that order ("AvgDown3D" in Wan 2.2's code). A first frame that stands alone has a blank
    one before it.

    Args:
        x: ``[T, 2H, 2W, C]``, contiguous; T is a multiple of ``time_factor``, or 1.
        time_factor: 1 or 2: frames of ``x`` that become one.
        transposed: rows and columns have changed places in ``x`` and ``out``.
        out: ``[T / time_factor, H, W, O]``, contiguous; added to. O divides ``4 * time_factor * C``.

    Raises:
        ValueError: the shapes don't fit.
    """
    frames, rows, columns, channels = x.shape
    out_channels = out.shape[-1]
    factor = 4 * time_factor
    alone = frames == 1 and time_factor == 2
    if (
        (frames % time_factor and not alone)
        or rows % 2
        or columns % 2
        or out.shape[:3] != (-(-frames // time_factor), rows // 2, columns // 2)
        or channels * factor % out_channels
    ):
        raise ValueError(f"add_averaged can't take {tuple(x.shape)} to {tuple(out.shape)}, time x{time_factor}")
    if kernels_run(x):
        from .kernels import shortcut as kernels

        if kernels.takes_average(x, out):
            with FallingBack(x):
                kernels.add_averaged(x, time_factor=time_factor, transposed=transposed, out=out)
                return
        else:
            say_once(f"the shortcut of {str(x.dtype).removeprefix('torch.')} tensors runs on PyTorch's kernels, slower")
    wide = torch.promote_types(x.dtype, torch.float32)
    for frame, into in enumerate(out):
        first = frame * time_factor
        seen = x[first : first + 1] if alone else x[first : first + time_factor]
        parts = seen.to(wide).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # frame, h, row, w, column, C
        order = (1, 3, 5, 0, 4, 2) if transposed else (1, 3, 5, 0, 2, 4)
        values = parts.permute(order)  # h, w, C, frame, row, column
        if alone:
            values = torch.cat([torch.zeros_like(values), values], dim=3)
        into.copy_(into.to(wide) + values.flatten(2).unflatten(2, (out_channels, -1)).mean(dim=-1))
