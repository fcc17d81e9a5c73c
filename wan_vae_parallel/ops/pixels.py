"""Pixels as the encoder's first convolution reads them: each position's 3x3 neighbourhood side by side.

T frames, H rows, W columns of positions, p x p pixels each (p the patch), C colours, K values of a neighbourhood

Layout  the arena is ``[S, H, W, K]``: at every position the pixels of its neighbourhood as the picture has them, row by
        row, of each its colours, then zeros up to K. The convolution is then one of 3x1x1, whose products are as deep
        as a GPU wants them, and which needs no border.
Bits    fp32 (fp64 in fp64) up to one rounding; a position's values do not depend on shard or axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dispatch import KERNEL_DTYPES, FallingBack, kernels_run, say_once

# K is a multiple of so many: a GPU's products take no fewer at once.
_MULTIPLE = 16
# Positions of a neighbourhood, in each direction and in all.
_SIDE = 3
_TAPS = _SIDE**2


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Rows and columns of positions that pixels have beyond those that are wanted: each 0 (the picture's edge) or 1."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def tap_channels(channels: int) -> int:
    """K for ``channels`` values a position."""
    return -(-_TAPS * channels // _MULTIPLE) * _MULTIPLE


def spread_pixel_weight(weight: torch.Tensor, patch: int) -> torch.Tensor:
    """Makes the first convolution's weight one for neighbourhoods.

    Args:
        weight: ``[O, C, 3, 3, 3]``, where C counts (colour, pixel column, pixel row) of a patch.
        patch: p.

    Returns:
        ``[O, K, 3, 1, 1]`` in channels_last_3d, zeros for what `gather_taps` leaves zero.
    """
    out_channels, channels, frames = weight.shape[:3]
    # O, colour, pixel column, pixel row, frame, row, column
    parts = weight.unflatten(1, (-1, patch, patch))
    taps = parts.permute(0, 4, 5, 3, 6, 2, 1).reshape(out_channels, frames, _TAPS * channels)
    spread = taps.new_zeros((out_channels, frames, tap_channels(channels)))
    spread[:, :, : taps.shape[2]] = taps
    return spread.permute(0, 2, 1)[..., None, None].contiguous(memory_format=torch.channels_last_3d)


def gather_taps(
    pixels: torch.Tensor,
    *,
    patch: int,
    margins: Margins,
    transposed: bool = False,
    arena: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Maps [0, 1] to [-1, 1] and writes each position's neighbourhood into an arena's slots; outside it is zero.

    Args:
        pixels: ``[T, (top + H + bottom) * p, (left + W + right) * p, C]``, contiguous, as the picture stands.
        patch: p.
        margins: what ``pixels`` have beyond the positions that are wanted.
        transposed: the arena's rows are the picture's columns.
        arena: ``[S, H, W, K]``, contiguous (``[S, W, H, K]`` if transposed); other slots stay as they are.
        slots: ``[T]`` int32 on the arena's device, all different.

    Raises:
        ValueError: the shapes don't fit.
    """
    frames, height, width, colours = pixels.shape
    rows = height // patch - margins.top - margins.bottom
    columns = width // patch - margins.left - margins.right
    channels = colours * patch**2
    shape = (columns, rows) if transposed else (rows, columns)
    if (
        height % patch
        or width % patch
        or min(rows, columns) < 1
        or arena.shape[1:] != (*shape, tap_channels(channels))
        or slots.shape != (frames,)
    ):
        raise ValueError(
            f"gather_taps takes pixels {tuple(pixels.shape)}, patch {patch}, {margins} to no arena "
            f"{tuple(arena.shape)}, {slots.numel()} slots, transposed {transposed}"
        )
    if kernels_run(arena):
        from .kernels import pixels as kernels

        reason = kernels.why_not(pixels, arena)
        if not reason:
            with FallingBack(arena):
                kernels.gather_taps(
                    pixels, patch=patch, margins=margins, transposed=transposed, arena=arena, slots=slots
                )
                return
        elif arena.dtype in KERNEL_DTYPES:
            say_once(f"pixels are gathered by PyTorch's kernels, which is slower: ours {reason}")
    wide = torch.promote_types(arena.dtype, torch.float32)
    indices = slots.tolist()
    for frame in range(frames):  # a neighbourhood is nine times as large as its position
        values = (pixels[frame].to(wide) * 2 - 1).to(arena.dtype)
        padded = values.new_zeros(((rows + 2) * patch, (columns + 2) * patch, colours))
        top, left = (1 - margins.top) * patch, (1 - margins.left) * patch
        padded[top : top + height, left : left + width] = values
        # H, W, colours, pixel rows and columns
        taps = padded.unfold(0, _SIDE * patch, patch).unfold(1, _SIDE * patch, patch)
        gathered = taps.permute(0, 1, 3, 4, 2).reshape(rows, columns, _TAPS * channels)
        target = arena[indices[frame]]
        target[..., _TAPS * channels :] = 0
        target[..., : _TAPS * channels] = gathered.transpose(0, 1) if transposed else gathered
