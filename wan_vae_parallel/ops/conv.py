"""Convolutions over paged frames: past frames, halo rows and zero borders lie in the input already.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena
Layout  an arena is ``[S, H + kh - 1, W + kw - 1, C]``, contiguous, and ``slots`` say in which of its slots the frames
        lie; outputs are contiguous ``[T, H, W, O]``. To torch both are channels_last_3d, as the weights are.
Bits    on GPUs, in bf16 and fp16, those of kernels/conv.py and down_conv.py; else, or if told to, those of torch's own
        convolutions. These count values in 32 bits: what has more is left to the kernels, or done in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .dispatch import KERNEL_DTYPES, FallingBack, kernels_run, say_once
from .limits import MOST_VALUES


def conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_slots: torch.Tensor | None = None,
    halves: int = 1,
    time_stride: int = 1,
    transposed: bool = False,
    cudnn: bool = False,
) -> torch.Tensor:
    """Convolves the frames that lie in an arena's slots.

    Args:
        arena: ``[S, H + kh - 1, W + kw - 1, C]``, contiguous, with its borders.
        slots: ``[(T - 1) * time_stride + kt]`` int32 on the arena's device: where each input frame lies, past ones
            first.
        weight: ``[O, C, kt, kh, kw]`` in channels_last_3d (without kernels of our own any), for the picture as it
            stands.
        bias: ``[O]``.
        residual: ``[T, H, W, O]``, contiguous: added before the result is rounded.
        out: where to write: ``[T, H, W, O]``, contiguous, which may be ``residual``; or with ``out_slots`` an arena
            ``[S', H + b, W + b, O]`` whose borders are left alone. Made if None.
        out_slots: ``[T]`` int32.
        halves: 2 makes two frames of O / 2 channels of each, the earlier one first: where T stands above it is 2T
            then, and O is O / 2 but in ``weight`` and ``bias``.
        time_stride: input frames from one output frame to the next.
        transposed: the arena's rows are the picture's columns.
        cudnn: leave it to PyTorch's convolution, even where a kernel of ours would take it, if it can count the values.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape or layout that can't be.
    """
    kernel = weight.shape[2:]
    frames = ((slots.numel() - kernel[0]) // time_stride + 1) * halves
    shape = (frames, arena.shape[1] - kernel[1] + 1, arena.shape[2] - kernel[2] + 1, weight.shape[0] // halves)
    if (
        not arena.is_contiguous()
        or arena.shape[3] != weight.shape[1]
        or min(shape) < 1
        or (weight.shape[0] % halves or (slots.numel() - kernel[0]) % time_stride)
    ):
        raise ValueError(
            f"conv takes a contiguous arena of {weight.shape[1]} channels, not {tuple(arena.shape)} with strides "
            f"{arena.stride()}, {slots.numel()} slots, a weight {tuple(weight.shape)}, {halves} halves and a stride of "
            f"{time_stride} frames"
        )
    _check(arena, shape, residual, out, out_slots)

    def values(frames: int, rows: int) -> int:
        """Of the input or of the output, whichever has more, for so many frames, halves together, and rows."""
        seen = ((frames - 1) * time_stride + kernel[0]) * (rows + kernel[1] - 1) * arena.shape[2] * arena.shape[3]
        return max(seen, frames * rows * shape[2] * weight.shape[0])

    cudnn = cudnn and values(frames // halves, shape[1]) <= MOST_VALUES
    if not cudnn and kernels_run(arena):
        from .kernels import conv as kernels

        if kernels.takes(arena, weight, time_stride=time_stride):
            with FallingBack(arena):
                into = arena.new_empty(shape) if out is None else out
                kernels.conv(
                    arena, slots, weight, bias, residual=residual, out=into, out_slots=out_slots, halves=halves,
                    time_stride=time_stride, transposed=transposed,
                )  # fmt: skip
                return into
        else:
            _say_slower(arena)
    result = _convolved(arena, slots, weight, bias, transposed, time_stride, values)
    if halves > 1:
        result = result.unflatten(3, (halves, -1)).permute(0, 3, 1, 2, 4).reshape(shape)
    return _put(result, residual, out, out_slots)


def upsample_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    folded: torch.Tensor | None,
    transposed: bool = False,
    cudnn: bool = False,
) -> torch.Tensor:
    """Doubles rows and columns by repeating them, then convolves each frame.

    Args:
        arena: ``[S, H + 2, W + 2, C]``, contiguous, with its borders.
        slots: ``[T]`` int32.
        weight: ``[O, C, 3, 3]``, for the picture as it stands.
        bias: ``[O]``.
        folded: `fold_upsample_weight` of ``weight``, which the GPU's kernel takes; needed only there.
        transposed: the arena's rows are the picture's columns.
        cudnn: as in `conv`.

    Returns:
        ``[T, 2H, 2W, O]``, contiguous.

    Raises:
        ValueError: a shape or layout that can't be.
    """
    if not arena.is_contiguous() or arena.shape[3] != weight.shape[1]:
        raise ValueError(
            f"upsample_conv takes a contiguous arena of {weight.shape[1]} channels, not {tuple(arena.shape)} with "
            f"strides {arena.stride()}"
        )
    frames, rows, columns = slots.numel(), 2 * (arena.shape[1] - 2), 2 * (arena.shape[2] - 2)

    def values(frames: int, rows: int) -> int:
        return max(frames * (rows + 2) * (columns + 2) * arena.shape[3], frames * rows * columns * weight.shape[0])

    cudnn = cudnn and values(1, rows) <= MOST_VALUES
    if not cudnn and kernels_run(arena):
        from .kernels import conv as kernels

        if folded is not None and kernels.takes(arena, weight.unsqueeze(2), scale=2):
            with FallingBack(arena):
                out = arena.new_empty((frames, rows, columns, weight.shape[0]))
                kernels.upsample_conv(arena, slots, folded, bias, out=out, transposed=transposed)
                return out
        else:
            _say_slower(arena)
    if transposed:
        weight = weight.transpose(2, 3).contiguous(memory_format=torch.channels_last)
    out = arena.new_empty((frames, rows, columns, weight.shape[0]))
    # What lies around the picture is in the arena, so it is doubled too, and cut to one row and column. Frame by
    # frame: a doubled one is as large as four.
    for frame in range(frames):
        for _, (top, bottom) in _parts(1, rows, values):
            # Of the doubled rows, with those around, these are top + 1 to bottom + 2.
            first, last = (top + 1) // 2, (bottom + 2) // 2
            seen = arena[:, first : last + 1].index_select(0, slots[frame : frame + 1])
            doubled = seen[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
            doubled = doubled.reshape(1, 2 * (last + 1 - first), columns + 4, -1)
            begin = top + 1 - 2 * first
            doubled = doubled[:, begin : begin + bottom + 2 - top, 1:-1].contiguous()
            out[frame, top:bottom] = F.conv2d(doubled.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)[0]
    return out


def down_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_slots: torch.Tensor | None = None,
    transposed: bool = False,
    cudnn: bool = False,
) -> torch.Tensor:
    """Convolves every other row and column of each frame, padded by a row below and a column on the right.

    Output position (h, w) sees the rows 2h to 2h + 2 and the columns 2w to 2w + 2 of the picture, which lies within
    the arena's borders; the borders above and on the left are not read.

    Args:
        arena: ``[S, 2H + 2, 2W + 2, C]``, contiguous, with its borders.
        slots: ``[T]`` int32.
        weight: ``[O, C, 3, 3]`` in channels_last (without kernels of our own any), for the picture as it stands.
        bias: ``[O]``.
        out: where to write, as in `conv`: ``[T, H, W, O]``, or an arena with ``out_slots``. Made if None.
        out_slots: ``[T]`` int32.
        transposed: the arena's rows are the picture's columns.
        cudnn: as in `conv`.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape or layout that can't be.
    """
    rows, columns = arena.shape[1] - 2, arena.shape[2] - 2
    shape = (slots.numel(), rows // 2, columns // 2, weight.shape[0])
    if not arena.is_contiguous() or arena.shape[3] != weight.shape[1] or min(shape) < 1 or rows % 2 or columns % 2:
        raise ValueError(
            f"down_conv takes a contiguous arena of {weight.shape[1]} channels and even rows and columns, not "
            f"{tuple(arena.shape)} with strides {arena.stride()} and {slots.numel()} slots"
        )
    _check(arena, shape, None, out, out_slots)

    def values(frames: int, rows: int) -> int:
        return max(frames * (2 * rows + 1) * (columns + 1) * arena.shape[3], frames * rows * shape[2] * weight.shape[0])

    cudnn = cudnn and values(shape[0], shape[1]) <= MOST_VALUES
    if not cudnn and kernels_run(arena):
        from .kernels import down_conv as kernels

        if kernels.takes(arena, weight):
            with FallingBack(arena):
                into = arena.new_empty(shape) if out is None else out
                kernels.down_conv(arena, slots, weight, bias, out=into, out_slots=out_slots, transposed=transposed)
                return into
        else:
            _say_slower(arena)
    if transposed:
        weight = weight.transpose(2, 3).contiguous(memory_format=torch.channels_last)

    def convolved(first: int, last: int, top: int, bottom: int) -> torch.Tensor:
        seen = arena[:, 2 * top + 1 : 2 * bottom + 2].index_select(0, slots[first:last])
        seen = seen[:, :, 1:].contiguous().permute(0, 3, 1, 2)
        return F.conv2d(seen, weight, bias, stride=2).permute(0, 2, 3, 1)

    return _put(_in_parts(convolved, shape, values), None, out, out_slots)


@dataclass(frozen=True)
class PreparedHead:
    """A head's weights as the GPU's kernel takes them, for ``frames`` output frames and ``rows`` rows at once."""

    spread: torch.Tensor
    frames: int
    rows: int
    transposed: bool


def prepare_head(weight: torch.Tensor, count: int, *, transposed: bool) -> PreparedHead | None:
    """The weights that `head_conv` wants to have for calls of ``count`` frames (all above 4 are alike); maybe none."""
    if not kernels_run(weight) or weight.dtype not in KERNEL_DTYPES:
        return None
    from .kernels import head_conv as kernels

    if weight.shape[0] > kernels.MAX_COLUMNS:
        return None
    frames, rows = kernels.tiling(count, weight.shape[0])
    return PreparedHead(kernels.spread_weight(weight, frames, rows, transposed=transposed), frames, rows, transposed)


def head_conv(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    prepared: PreparedHead | None,
    transposed: bool = False,
    cudnn: bool = False,
) -> torch.Tensor:
    """`conv` with a 3x3x3 or 1x3x3 kernel to a few channels, for which GPUs have a kernel of its own.

    Args:
        arena: ``[S, H + 2, W + 2, C]``, contiguous, with its borders; finite in the slots named.
        slots: ``[T + kt - 1]`` int32.
        weight: ``[O, C, kt, 3, 3]``.
        bias: ``[O]``.
        prepared: what `prepare_head` made of ``weight``.
        transposed: as in `conv`.
        cudnn: as in `conv`.

    Returns:
        ``[T, H, W, O]``, contiguous.
    """
    if prepared and prepared.transposed != transposed:
        raise ValueError(f"weights were prepared for transposed={prepared.transposed}, not {transposed}")
    if prepared is None or (cudnn and slots.numel() * arena[0].numel() <= MOST_VALUES):
        return conv(arena, slots, weight, bias, transposed=transposed, cudnn=cudnn)
    from .kernels import head_conv as kernels

    with FallingBack(arena):
        count = slots.numel() - weight.shape[2] + 1
        out = arena.new_empty((count, arena.shape[1] - 2, arena.shape[2] - 2, weight.shape[0]))
        kernels.head_conv(
            arena, slots, prepared.spread, bias, frames=prepared.frames, rows=prepared.rows, out=out,
            transposed=transposed,
        )  # fmt: skip
        return out
    return conv(arena, slots, weight, bias, transposed=transposed, cudnn=True)


def pointwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 1x1(x1) convolution, which is a matrix product over channels.

    Args:
        x: ``[T, H, W, C]``, contiguous.
        weight: ``[O, C, 1, 1(, 1)]``.
        bias: ``[O]``.
        residual: ``[T, H, W, O]``, contiguous, as in `conv`.
        out: as in `conv`.
        out_slots: as in `conv`.

    Returns:
        ``out``, ``[T, H, W, O]`` if it was made.
    """
    shape = (*x.shape[:3], weight.shape[0])
    _check(x, shape, residual, out, out_slots)
    if kernels_run(x):
        from .kernels import conv as kernels

        weight3d = weight.flatten(1)[:, :, None, None, None]
        if kernels.takes(x, weight3d) and x.is_contiguous():
            with FallingBack(x):
                into = x.new_empty(shape) if out is None else out
                slots = torch.arange(len(x), dtype=torch.int32, device=x.device)
                kernels.conv(
                    x, slots, weight3d, bias, residual=residual, out=into, out_slots=out_slots, halves=1,
                    transposed=False,
                )  # fmt: skip
                return into
        else:
            _say_slower(x)
    return _put(F.linear(x, weight.flatten(1), bias), residual, out, out_slots)


def fold_upsample_weight(weight: torch.Tensor) -> torch.Tensor:
    """Sums the taps that meet the same position of a frame whose rows and columns were doubled.

    Output row 2h sees input rows (h - 1, h) with (w0, w1 + w2), row 2h + 1 sees (h, h + 1) with (w0 + w1, w2);
    columns likewise. The sums are made in fp32 and rounded once.

    Args:
        weight: ``[O, C, 3, 3]``.

    Returns:
        ``[2, 2, 2, 2, O, C]``, contiguous: row phase, column phase, row tap, column tap.
    """

    def fold(w: torch.Tensor, dim: int) -> torch.Tensor:
        first, middle, last = w.unbind(dim)
        return torch.stack([torch.stack([first, middle + last]), torch.stack([first + middle, last])])

    rows = fold(weight.detach().float(), 2)  # row phase, row tap, O, C, 3
    both = fold(rows, 4)  # column phase, column tap, row phase, row tap, O, C
    return both.permute(2, 0, 3, 1, 4, 5).to(weight.dtype).contiguous()


def _convolved(
    arena: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    transposed: bool,
    time_stride: int,
    values: Callable[[int, int], int],
) -> torch.Tensor:
    kt, kh, kw = weight.shape[2:]
    if transposed:
        weight = weight.transpose(3, 4).contiguous(memory_format=torch.channels_last_3d)

    def convolved(first: int, last: int, top: int, bottom: int) -> torch.Tensor:
        used = slots[first * time_stride : (last - 1) * time_stride + kt]
        # The batch axis is put in front while the tensor is contiguous: added later its stride would be C, which
        # torch reads as "not channels_last" and answers with NCDHW kernels and copies around them.
        seen = arena[:, top : bottom + kh - 1].index_select(0, used).unsqueeze(0).permute(0, 4, 1, 2, 3)
        # A copy only where torch has no channels-last kernel (fp64 on the CPU); on CUDA a test counts none.
        return F.conv3d(seen, weight, bias, stride=(time_stride, 1, 1)).permute(0, 2, 3, 4, 1).squeeze(0)

    frames = (slots.numel() - kt) // time_stride + 1
    shape = (frames, arena.shape[1] - kh + 1, arena.shape[2] - kw + 1, weight.shape[0])
    return _in_parts(convolved, shape, values)


def _in_parts(
    convolved: Callable[[int, int, int, int], torch.Tensor],
    shape: tuple[int, ...],
    values: Callable[[int, int], int],
) -> torch.Tensor:
    """``[T, H, W, O]`` of what ``convolved`` makes of frames ``[first, last)`` and rows ``[top, bottom)``."""
    parts = list(_parts(shape[0], shape[1], values))
    if len(parts) == 1:
        return convolved(*parts[0][0], *parts[0][1]).contiguous()
    out: torch.Tensor | None = None
    for (first, last), (top, bottom) in parts:
        part = convolved(first, last, top, bottom)
        out = part.new_empty(shape) if out is None else out
        out[first:last, top:bottom] = part
    assert out is not None
    return out


def _parts(
    frames: int, rows: int, values: Callable[[int, int], int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Frames and rows of an output whose convolution has at most `MOST_VALUES` ``values(frames, rows)``."""
    count, height = frames, rows
    while values(count, height) > MOST_VALUES and (count > 1 or height > 1):
        count, height = (-(-count // 2), height) if count > 1 else (1, -(-height // 2))
    for first in range(0, frames, count):
        for top in range(0, rows, height):
            yield (first, min(frames, first + count)), (top, min(rows, top + height))


def _check(
    like: torch.Tensor,
    shape: tuple[int, ...],
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    out_slots: torch.Tensor | None,
) -> None:
    """Raises ValueError unless a result of ``shape`` can be added to and written to these."""
    frames, rows, columns, channels = shape
    fits = out_slots is None if out is None else out.dim() == 4 and out.is_contiguous() and out.dtype == like.dtype
    if out is not None and fits:
        border = out.shape[1] - rows if out_slots is not None else 0
        count = frames if out_slots is None else out.shape[0]
        fits = border in (0, 2) and out.shape == (count, rows + border, columns + border, channels)
        fits = fits and (out_slots is None or out_slots.shape == (frames,))
    if not fits:
        raise ValueError(
            f"out must be contiguous {like.dtype} {shape}, or an arena of such frames with {frames} slots, not "
            f"{None if out is None else (out.dtype, tuple(out.shape))} with "
            f"{'no' if out_slots is None else out_slots.numel()} slots"
        )
    if residual is not None and (
        residual.shape != shape or residual.dtype != like.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"a residual must be contiguous {like.dtype} {shape}, not {residual.dtype} {tuple(residual.shape)}"
        )


def _put(
    result: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None, out_slots: torch.Tensor | None
) -> torch.Tensor:
    if residual is not None:
        result = result.add_(residual)
    if out is None:
        return result
    if out_slots is None:
        return out.copy_(result)
    put_frames(out, out_slots, result)
    return out


def put_frames(arena: torch.Tensor, slots: torch.Tensor, frames: torch.Tensor) -> None:
    """Writes ``frames`` ``[T, H, W, C]`` inside the borders of an arena's slots."""
    border = (arena.shape[1] - frames.shape[1]) // 2
    interior = arena[:, border : arena.shape[1] - border, border : arena.shape[2] - border]
    interior.index_copy_(0, slots.long(), frames)


def _say_slower(arena: torch.Tensor) -> None:
    if arena.dtype in KERNEL_DTYPES:
        what, instead = "frames as large as these", "on more devices each has a smaller part of them"
    else:
        what = f"{str(arena.dtype).removeprefix('torch.')} tensors"
        instead = "bfloat16 and float16 have kernels of their own"
    say_once(
        f"convolutions of {what} run on cuDNN, which is slower and whose last bits depend on chunks and devices; "
        f"{instead}"
    )
