"""Frames that are to be encoded: checking them, cutting them to what latents can hold.

B videos, T frames, H x W pixels, C colours
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence

import torch

from .architecture import Architecture
from .errors import FrameError
from .ops.dispatch import say_once

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Sharpening and the like overshoot a little; what goes farther is no picture in [0, 1].
_LEAST, _MOST = -0.5, 1.5


def check_frames(frames: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Makes sure that ``frames`` can be encoded, and takes of them what an encode uses.

    Rows and columns that don't make whole latent ones are cut off on both sides, as ComfyUI does, and said. So are
    channels beyond the VAE's colours, such as alpha, and frames beyond a multiple of four and one. A VAE with alpha
    takes frames without as opaque.

    Args:
        frames: ``[B, T, H, W, C]``, or ``[T, H, W, C]`` for one video; any float dtype, strides and device.
        architecture: the VAE that will encode them.

    Returns:
        ``[B, T', H', W', C']``, a view but where alpha was added.

    Raises:
        FrameError: wrong type, number of axes, colours, an empty axis, pictures smaller than a latent voxel, or several
            frames for a VAE of images.
    """
    frames = _usable(frames, architecture)
    check_length(frames.shape[1], architecture)
    return frames[:, : architecture.encoded_frames(frames.shape[1])]


def check_length(frames: int, architecture: Architecture) -> None:
    """Raises `FrameError` if a video of so many ``frames`` is none that the VAE can encode."""
    if architecture.images_only and frames > 1:
        raise FrameError(
            f"frames of a video have {frames} frames, and {architecture.name} knows no time; encode each as a picture "
            f"of its own",
            in_python="pass pictures as a batch, [B, 1, H, W, C]",
        )


def _usable(frames: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """`check_frames` up to the number of frames."""
    if not isinstance(frames, torch.Tensor):
        kind = type(frames).__name__
        raise FrameError(f"frames are of the type {kind}; they must be a torch tensor [B, T, H, W, C]")
    if frames.is_nested:
        raise FrameError("frames are a nested tensor; they must be an ordinary, dense one, of one size")
    shape = tuple(frames.shape)
    if frames.dim() == 4:
        frames = frames.unsqueeze(0)
    if frames.dim() != 5:
        raise FrameError(
            f"frames have {len(shape)} axes {shape}; they must have five, [B, T, H, W, C], or four for one video",
            "give a single picture as frame[None]" if len(shape) == 3 else "",
        )
    check_values(frames)
    if frames.numel() == 0:
        raise _empty(shape)
    if frames.layout != torch.strided or frames.is_meta:
        kind = "meta" if frames.is_meta else str(frames.layout)
        raise FrameError(f"frames are a {kind} tensor; they must be an ordinary, dense one")
    colours = architecture.input_channels
    if colours == 4 and frames.shape[4] == 3:
        say_once("frames have 3 channels, and this VAE has 4: they are encoded as opaque, with an alpha of 1")
        frames = torch.cat([frames, torch.ones_like(frames[..., :1])], dim=-1)
    if frames.shape[4] not in (colours, colours + 1):
        raise FrameError(
            f"frames {shape} have {frames.shape[4]} channels, and this {architecture.name} VAE takes {colours}, or "
            f"one more, alpha, which it leaves out; the channels come last",
            _way_to_channels(frames.shape, colours),
        )
    if frames.shape[4] > colours:
        say_once(f"frames have {colours + 1} channels: the last, alpha, is left out, as this VAE has {colours} colours")
    check_size(frames.shape, architecture)
    ratio = architecture.encode_ratio
    height, width = frames.shape[2:4]
    rows, columns = height // ratio * ratio, width // ratio * ratio
    if (rows, columns) != (height, width):
        say_once(
            f"frames of {width}x{height} are cut to {columns}x{rows}, the middle of them: {architecture.name} encodes "
            f"multiples of {ratio} pixels"
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[:, :, top : top + rows, left : left + columns, :colours]


def _way_to_channels(shape: torch.Size, colours: int) -> str:
    """What to do in Python with frames ``[B, T, H, W, C]`` whose channels are not last, or grey."""
    if shape[2] == colours:
        return "take frames.movedim(-3, -1), if that is where they are"
    if shape[1] == colours:
        return "take frames.movedim(-4, -1), if that is where they are"
    return f"take frames.expand(*frames.shape[:-1], {colours}) of grey ones" if shape[4] == 1 else ""


def check_size(shape: Sequence[int], architecture: Architecture) -> None:
    """Raises `FrameError` if frames of ``shape`` ``[B, T, H, W, C]`` have an empty axis, or make no latent voxel."""
    if min(shape) < 1:
        raise _empty(tuple(shape))
    ratio, (height, width) = architecture.encode_ratio, shape[2:4]
    if min(height, width) < ratio:
        raise FrameError(
            f"frames of {width}x{height} are smaller than a latent voxel of {architecture.name}, which has "
            f"{ratio}x{ratio} pixels; enlarge them"
        )


def frames_shape(shape: Sequence[int], architecture: Architecture) -> tuple[int, ...]:
    """``[B, T, H, W, C]`` of what is a shape of frames; of ``[T, H, W, C]`` with a B of 1.

    Raises:
        FrameError: it is none, or makes no latent voxel.
    """
    numbers = whole_numbers(shape)
    if numbers is None or len(numbers) not in (4, 5):
        raise FrameError(f"a shape of frames has five whole numbers, [B, T, H, W, C], or four, and is not {shape!r}")
    numbers = (1, *numbers) if len(numbers) == 4 else numbers
    check_size(numbers, architecture)
    return numbers


def whole_numbers(shape: Sequence[int]) -> tuple[int, ...] | None:
    """``shape`` as whole numbers; None if it is anything else."""
    try:
        return tuple(operator.index(number) for number in shape)
    except TypeError:
        return None


def _empty(shape: tuple[int, ...]) -> FrameError:
    return FrameError(f"frames are empty, {shape}; every axis must be at least 1")


def check_part(frames: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """`check_frames` for a part of a video, of any number of frames: ``[T, H', W', C']``.

    Args:
        frames: ``[T, H, W, C]``, or ``[1, T, H, W, C]``.
        architecture: as there.

    Raises:
        FrameError: as there, or there are several videos.
    """
    if isinstance(frames, torch.Tensor) and frames.dim() == 5:
        if len(frames) != 1:
            raise FrameError(f"a stream has the frames of one video, not of {len(frames)}; encode the others as such")
        frames = frames[0]
    if isinstance(frames, torch.Tensor) and frames.dim() != 4:
        raise FrameError(
            f"a part of a stream has {frames.dim()} axes {tuple(frames.shape)}; it must have four, [t, H, W, C]",
            "give a single picture as frame[None]" if frames.dim() == 3 else "",
        )
    return _usable(frames, architecture)[0]


def check_values(frames: torch.Tensor) -> None:
    """Raises `FrameError` unless ``frames`` are of a float dtype."""
    if frames.dtype not in _DTYPES:
        name = str(frames.dtype).removeprefix("torch.")
        # Wider integers seldom count to the end of their range.
        white = {torch.int8: 127, torch.uint16: 65535, torch.int16: 32767}.get(frames.dtype, 255)
        whole = not (frames.is_floating_point() or frames.is_complex() or frames.dtype == torch.bool)
        way = f"divide them by what white is, {white} as a rule" if whole else "look at what made them"
        raise FrameError(
            f"frames are {name}; they must be floating point in [0, 1]: {way}",
            f"take frames.float() / {white}" if whole else "convert them",
        )


def check_range(least: float, most: float) -> None:
    """Looks at the least and the largest value of pixels, NaN if one is.

    Raises:
        FrameError: one is not finite.
    """
    if not (math.isfinite(least) and math.isfinite(most)):
        raise FrameError(
            "frames have NaN or infinite values, where pictures have [0, 1], and so would all latents behind them: "
            "look at what made them",
            "put other numbers there (torch.nan_to_num)",
        )
    if least < _LEAST or most > _MOST:
        # Without the values, which differ from step to step.
        say_once(
            f"frames have values below {_LEAST} or above {_MOST}, where pictures have [0, 1]; they are encoded so: if "
            f"they are in [-1, 1], or count to 255, change them before"
        )
