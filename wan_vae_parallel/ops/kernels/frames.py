"""The decoder's last activations as pictures, in one pass in Triton.

T frames, H rows, W columns, K colours, p patch
Layout  in [T, H, W, K * p * p], channels contiguous, out contiguous [T, H * p, W * p, K]; one read, one write.
Tile    1024 values of as many rows of the frame as a patch has; transposed, 128 values of 32 rows, so that the lines
        that are read and those that are written are both used whole. 3.7 to 4.0 TB/s on H200 either way.
Bits    those of frames.py: every value by itself, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _to_frames_kernel(
    x_ptr,
    out_ptr,
    rows,
    row_values,
    x_frame,
    x_row,
    x_column,
    COLOURS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    frame = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # One value of a row of the frame: a column and a colour.
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    column, colour = value // COLOURS, value % COLOURS
    channel = colour[None, :] * (PATCH * PATCH) + (column % PATCH)[None, :] * PATCH + (row % PATCH)[:, None]
    mask = (row < rows)[:, None] & (value < row_values)[None, :]
    at = (row // PATCH)[:, None] * x_row + (column // PATCH)[None, :] * x_column + channel
    x = tl.load(x_ptr + frame * x_frame + at, mask=mask).to(tl.float32)
    picture = (x + 1.0) / 2.0
    # As clamp_ does it: NaN stays NaN.
    picture = tl.minimum(tl.maximum(picture, 0.0, tl.PropagateNan.ALL), 1.0, tl.PropagateNan.ALL)
    out_at = frame * rows * row_values + row.to(tl.int64)[:, None] * row_values + value[None, :]
    tl.store(out_ptr + out_at, picture, mask=mask)


def why_not(x: torch.Tensor, patch: int) -> str | None:
    """Why `to_frames` does not take ``x``, if so."""
    if x.dim() != 4 or x.dtype not in _DTYPES:
        return f"takes [T, H, W, C] in bf16, fp16 or fp32, not {tuple(x.shape)} in {x.dtype}"
    if 0 in x.shape or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return f"takes neighbouring channels and at least one of each, not {tuple(x.shape)} with strides {x.stride()}"
    if patch not in (1, 2) or x.shape[-1] % patch**2:
        return f"unfolds patches of 1 or 2, not {patch}, from a multiple of p * p channels, not {x.shape[-1]}"
    rows, columns = (extent * patch for extent in x.shape[1:3])
    # Within a frame addresses are 32 bits wide.
    if max(x.stride(1) * x.shape[1], x.stride(2) * x.shape[2], x[0].numel()) >= 2**31:
        return f"takes frames under 2^31 values, not {tuple(x.shape)} with strides {x.stride()}"
    if x.shape[0] > 65535 or max(rows, columns) > 65535:
        return f"takes up to 65535 frames, rows and columns, not {tuple(x.shape)}"
    return None


def to_frames(x: torch.Tensor, patch: int, *, transposed: bool = False) -> torch.Tensor:
    """Unfolds patches and maps [-1, 1] to [0, 1], clamped, as `frames.to_frames` does.

    Args:
        x: ``[T, H, W, K * p * p]`` with channels in the order (colour, column, row) of the patch; bf16, fp16 or fp32,
            of any strides but with neighbouring channels.
        patch: p, rows and columns of a patch.
        transposed: rows and columns have changed places in ``x``; in the frames they are back.

    Returns:
        ``[T, H * p, W * p, K]``, contiguous, fp32.

    Raises:
        ValueError: ``x`` is none of the above.
    """
    if reason := why_not(x, patch):
        raise ValueError(f"to_frames {reason}; frames.to_frames takes it")
    colours = x.shape[-1] // patch**2
    frames, rows, columns = x.shape[:3]
    x_frame, x_row, x_column, _ = x.stride()
    if transposed:
        rows, columns, x_row, x_column = columns, rows, x_column, x_row
    rows, row_values = rows * patch, columns * patch * colours
    out = torch.empty((frames, rows, columns * patch, colours), dtype=torch.float32, device=x.device)
    tile_rows, tile_values = (32, 128) if transposed else (patch, 1024)
    launch(
        _to_frames_kernel,
        (triton.cdiv(row_values, tile_values), triton.cdiv(rows, tile_rows), frames),
        x,
        out,
        rows,
        row_values,
        x_frame,
        x_row,
        x_column,
        COLOURS=colours,
        PATCH=patch,
        ROWS=tile_rows,
        VALUES=tile_values,
        num_warps=8 if transposed else 4,
    )
    return out
