"""Frames from files: videos, pictures, tensors.

B videos, T frames, H x W pixels, C colours; frames [B, T, H, W, C] in [0, 1]
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..errors import FrameError, OutOfMemoryError, about_file
from ..frames import check_values
from ..memory import free_memory, gibibytes
from ..ops.dispatch import say_once
from .kinds import unfinished_download
from .tensor_file import TensorFile
from .video_in import VideoInput

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_NAME_ANOTHER = "name a video, a picture, numbered pictures as frames/%04d.png, a folder of pictures, or a .safetensors"
# In numbered pictures' names.
_NUMBER = re.compile(r"([^%]*)%0?\d*d([^%]*)")
_MODES = {3: "RGB", 4: "RGBA"}
# Pillow's words for 32 bits, of which its conversions keep what lies in 0 to 255.
_WIDE_MODES = {"F": "floating point", "I": "integers of 32 bits"}
_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class FrameInput(Protocol):
    """Frames that come one after the other; a context manager, iterated once for ``[1, H, W, C]`` each.

    Attributes:
        expected: how many there will be, as far as that is known.
    """

    @property
    def expected(self) -> int | None: ...

    def __enter__(self) -> FrameInput: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...


def is_tensor(path: Path) -> bool:
    """Whether ``path`` is for `read_frames`; others are for `open_frames`."""
    return path.suffix.lower() == ".safetensors" or _is_one_picture(path)


def open_video(path: Path, *, colours: int, most: int | None = None, another: str = _NAME_ANOTHER) -> VideoInput:
    """Opens a video's file, see `VideoInput`.

    Args:
        path: of the file.
        colours: C.
        most: frames to read, the first ones; None for all.
        another: what to do where it is none, as part of an error.

    Raises:
        FrameError: there is no such file, or it is another kind of file.
    """
    if path.suffix.lower() == ".latent":
        raise _are_latents(path, another)
    with _told(path, another):
        _check_file(path, another)
    return VideoInput(path, colours=colours, most=most)


def open_frames(path: Path, *, colours: int, most: int | None = None, any_size: bool = False) -> FrameInput:
    """Opens a video or several pictures.

    - numbered pictures, such as ``frames/%04d.png``: from the least number on, without gaps.
    - a folder: its pictures in natural order (``2.png`` before ``10.png``).
    - any other file: a video, see `VideoInput`.

    Args:
        path: where they are.
        colours: C.
        most: frames to read, the first ones; None for all.
        any_size: pictures may have different sizes.

    Raises:
        FrameError: there is no such file, or pictures differ in size or can't be read.
    """
    with _told(path):
        if not path.exists() and _NUMBER.fullmatch(path.name):
            return PictureInput(_numbered(path)[:most], colours, any_size=any_size)
        if path.is_dir():
            return PictureInput(_pictures_in(path)[:most], colours, any_size=any_size)
    return open_video(path, colours=colours, most=most)


def read_frames(path: Path, *, colours: int) -> torch.Tensor:
    """Reads one picture, or a safetensors file with one tensor ``frames`` (or one of any name).

    Returns:
        ``[B, T, H, W, C]``, or ``[T, H, W, C]`` if the file has that.

    Raises:
        FrameError: there is no such file, it is damaged, or it is not clear which tensor is meant.
        OutOfMemoryError: the host has no room for it.
    """
    if _is_one_picture(path):
        with _told(path):
            _check_file(path)
        return _read_picture(path, colours)
    with TensorFile(path, FrameError, holds="frames", another=_NAME_ANOTHER, again="write it again") as file:
        described = file.described()
        key = _frames_key(described, path)
        if described[key].dim() not in (4, 5):
            raise FrameError(
                about_file(
                    path,
                    f"has a tensor {key} of {described[key].dim()} axes {tuple(described[key].shape)}; frames have "
                    f"five, [B, T, H, W, C], or four for one video",
                )
            )
        check_values(described[key])
        return file.read()[key]


def resized(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames ``[..., H, W, C]`` stretched to ``size`` (width, height): bicubic, with antialiasing where they shrink.

    It is what Pillow's BICUBIC does, without its rounding to 8 bits; overshoot is clamped to [0, 1].

    Raises:
        OutOfMemoryError: the host has no room for them.
    """
    width, height = size
    if frames.shape[-3:-1] == (height, width):
        return frames
    pictures = frames.reshape(-1, *frames.shape[-3:])
    dtype = torch.promote_types(frames.dtype, torch.float32)
    shape = (*frames.shape[:-3], height, width, frames.shape[-1])
    needed, free = math.prod(shape) * dtype.itemsize, free_memory(torch.device("cpu"))
    if needed > free:
        raise OutOfMemoryError(
            f"{len(pictures)} frames of {width}x{height} take {gibibytes(needed)} of the computer's own memory (RAM), "
            f"where {gibibytes(free)} are free; take fewer or smaller ones"
        )
    out = torch.empty(shape, dtype=dtype)
    for picture, into in zip(pictures, out.view(-1, *shape[-3:]), strict=True):  # one by one: little memory
        planes = picture.to(dtype).movedim(-1, 0)[None]
        scaled = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        into.copy_(scaled[0].movedim(0, -1).clamp_(0, 1))
    return out


class PictureInput:
    """Pictures as a video's frames; see `FrameInput`."""

    def __init__(self, paths: Sequence[Path], colours: int, *, any_size: bool) -> None:
        self._paths = paths
        self._colours = colours
        self._any_size = any_size
        if not any_size:
            # Before any is encoded; those that lie on their side are looked at when they are read.
            sizes = [_stored_size(path) for path in paths]
            for path, size in zip(paths, sizes, strict=True):
                if sorted(size) != sorted(sizes[0]):
                    raise _other_size(path, size, sizes[0])

    def __enter__(self) -> PictureInput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    @property
    def expected(self) -> int:
        """How many there are."""
        return len(self._paths)

    def __iter__(self) -> Iterator[torch.Tensor]:
        size: tuple[int, int] | None = None
        for path in self._paths:
            frame = _read_picture(path, self._colours)
            height, width = frame.shape[1:3]
            size = size or (width, height)
            if not self._any_size and size != (width, height):
                raise _other_size(path, (width, height), size)
            yield frame


def _read_picture(path: Path, colours: int) -> torch.Tensor:
    """``[1, H, W, C]``, float32, turned as its EXIF data say."""
    try:
        with Image.open(path) as opened:
            if (count := getattr(opened, "n_frames", 1)) > 1:
                raise FrameError(about_file(path, f"is an animation of {count} frames; make a video of it"))
            picture = ImageOps.exif_transpose(opened)
            sixteen = picture.mode == "I" and opened.format == "PNG"  # as older versions of Pillow read it
            if picture.mode in _WIDE_MODES and not sixteen:
                raise FrameError(
                    about_file(
                        path,
                        f"has grey as {_WIDE_MODES[picture.mode]} (Pillow's mode {picture.mode}), which does not say "
                        f"what white is; make it a picture of 8 or 16 bits",
                    )
                )
            if sixteen or picture.mode.startswith("I;16"):  # grey of 16 bits, of which conversions keep the lower 8
                grey = torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 65535)
                values = grey[..., None].expand(-1, -1, min(colours, 3))
            else:
                if colours == 3 and picture.has_transparency_data:
                    say_once("pictures have alpha, which is left out, as this VAE has 3 colours")
                array = numpy.asarray(picture.convert(_MODES.get(colours, "RGB")))
                values = torch.from_numpy(array.astype(numpy.float32) / 255)
    except _READ_ERRORS as error:
        if isinstance(error, FrameError):
            raise
        raise FrameError(
            about_file(path, f"can't be read as a picture; make it again, or {_NAME_ANOTHER}", error)
        ) from error
    if values.shape[-1] < colours:
        values = torch.cat([values, values.new_ones(*values.shape[:2], colours - values.shape[-1])], dim=-1)
    return values[None]


def _stored_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except _READ_ERRORS as error:
        raise FrameError(
            about_file(path, f"can't be read as a picture; make it again, or {_NAME_ANOTHER}", error)
        ) from error


def _other_size(path: Path, size: tuple[int, int], first: tuple[int, int]) -> FrameError:
    return FrameError(
        about_file(
            path,
            f"has {size[0]}x{size[1]} pixels, and the first picture {first[0]}x{first[1]}; those of one video, "
            f"or of one file of latents, have one size: give them one with --size",
        )
    )


def _numbered(path: Path) -> list[Path]:
    """The files of a numbered name, which must be without gaps."""
    if not path.parent.is_dir():
        raise FrameError(f"there is no folder {path.parent} for {path.name}; {_NAME_ANOTHER}")
    match = _NUMBER.fullmatch(path.name)
    assert match
    named = re.compile(re.escape(match[1]) + r"(\d+)" + re.escape(match[2]))
    numbers = sorted(
        int(found[1])
        for file in path.parent.iterdir()
        if (found := named.fullmatch(file.name)) and path.name % int(found[1]) == file.name
    )
    if not numbers:
        raise FrameError(about_file(path.parent, f"has no picture named as {path.name}; {_NAME_ANOTHER}"))
    for number, expected in zip(numbers, range(numbers[0], numbers[-1]), strict=False):
        if number != expected:
            raise FrameError(
                about_file(
                    path.parent,
                    f"has {path.name % numbers[0]} to {path.name % numbers[-1]}, but no "
                    f"{path.name % expected}; make it, or name the folder to take what is there",
                )
            )
    return [path.parent / (path.name % number) for number in numbers]


def _pictures_in(folder: Path) -> list[Path]:
    """A folder's pictures in natural order."""

    def key(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name.casefold())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    if not found:
        raise FrameError(about_file(folder, f"has no pictures ({', '.join(PICTURE_SUFFIXES)}) in it; {_NAME_ANOTHER}"))
    return sorted(found, key=lambda path: (key(path), path.name))


def _frames_key(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Which of a file's tensors are the frames."""
    if "frames" in tensors:
        return "frames"
    if "latent_tensor" in tensors:
        raise _are_latents(path)
    if len(tensors) == 1:
        return next(iter(tensors))
    found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:5])
    raise FrameError(
        about_file(
            path,
            f"has {len(tensors)} tensors{': ' + found if found else ''}; it must have one named frames, "
            f"[B, T, H, W, C] or [T, H, W, C]",
        )
    )


def _is_one_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and (path.is_file() or not _NUMBER.fullmatch(path.name))


def _check_file(path: Path, another: str = _NAME_ANOTHER) -> None:
    if not path.is_file():  # a pipe would have opening it wait
        raise FrameError(about_file(path, f"{'is no file' if path.exists() else 'does not exist'}; {another}"))
    with path.open("rb") as file:
        if not file.read(1):
            raise FrameError(about_file(path, f"is empty; {another}"))
    if unfinished := unfinished_download(path):
        raise FrameError(about_file(path, unfinished))


def _are_latents(path: Path, another: str = _NAME_ANOTHER) -> FrameError:
    return FrameError(about_file(path, f"has latents in it, which are encoded already; {another}"))


@contextlib.contextmanager
def _told(path: Path, another: str = _NAME_ANOTHER) -> Iterator[None]:
    """Within it, what the system refuses is told of ``path``."""
    try:
        yield
    except OSError as error:
        raise FrameError(about_file(path, f"can't be opened; {another}", error)) from error
