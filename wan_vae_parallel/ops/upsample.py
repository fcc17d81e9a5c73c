"""Nearest upsampling, in space and where a time convolution made it so in time, without passes of its own.

T frames, H rows, W columns, C channels
"""

from __future__ import annotations

import torch


def upsample_nearest(x: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes each position of ``x`` to 2x2 positions of ``out``.

    Args:
        x: ``[T, P, H, W, C]``, of any strides: P is 2 for frames that `interleave_time` split, else 1.
        out: ``[T * P, 2H, 2W, C]``, of any strides, such as the interior of a bordered buffer.

    Raises:
        ValueError: the shapes don't fit.
    """
    frames, phases, rows, columns, channels = x.shape
    if out.shape != (frames * phases, 2 * rows, 2 * columns, channels):
        raise ValueError(
            f"upsample_nearest takes x {tuple(x.shape)} to twice its rows and columns, not to {tuple(out.shape)}"
        )
    doubled = out.unflatten(0, (frames, phases)).unflatten(2, (rows, 2)).unflatten(4, (columns, 2))
    doubled.copy_(x[:, :, :, None, :, None])


def interleave_time(x: torch.Tensor) -> torch.Tensor:
    """Turns the two halves of the channels into alternating frames.

    Args:
        x: ``[T, H, W, 2C]``, contiguous: the first half of the channels is the earlier frame.

    Returns:
        ``[T, 2, H, W, C]``, a view; its first two axes together are the ``2T`` frames.
    """
    return x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4)


def add_duplicated(
    x: torch.Tensor, *, time_factor: int, drop_first: bool, transposed: bool = False, out: torch.Tensor
) -> None:
    """Adds Wan 2.2's upsampling shortcut: channels spread over frames, rows and columns by repeating them.

    Reading ``x``'s channels, each repeated equally often, in the order (output channel, frame, row, column) fills
    an output of twice the rows and columns and ``time_factor`` times the frames ("DupUp3D" in Wan 2.2's code).

    Args:
        x: ``[T, H, W, C]``.
        time_factor: 1 or 2.
        drop_first: leave out the first ``time_factor - 1`` frames, as the video's first frame wants it.
        transposed: rows and columns have changed places in ``x`` and ``out``.
        out: ``[time_factor * T - dropped, 2H, 2W, O]``, contiguous; added to. O divides C, and C divides
            ``4 * time_factor * O``.

    Raises:
        ValueError: the shapes don't fit.
    """
    frames, rows, columns, channels = x.shape
    dropped = time_factor - 1 if drop_first else 0
    out_channels = out.shape[-1]
    factor = 4 * time_factor
    if (
        out.shape[:3] != (frames * time_factor - dropped, 2 * rows, 2 * columns)
        or channels % out_channels
        or factor * out_channels % channels
        or (dropped and frames != 1)
    ):
        raise ValueError(f"add_duplicated can't spread {tuple(x.shape)} over {tuple(out.shape)}, time x{time_factor}")
    group = channels // out_channels
    repeats = factor // group
    phases = out.unflatten(1, (rows, 2)).unflatten(3, (columns, 2))
    for offset in range(factor):
        phase, row, column = offset // 4 - dropped, offset // 2 % 2, offset % 2
        if transposed:
            row, column = column, row
        if phase >= 0:
            phases[phase :: time_factor - dropped, :, row, :, column].add_(x[..., offset // repeats :: group])
