"""Frames into files: videos, pictures, tensors.

B videos, t frames of a step, H x W pixels, C colours; frames [B, t, H, W, C] in [0, 1]
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import OutOfMemoryError, OutputError, about_file
from ..memory import free_memory, gibibytes
from .formats import FORMATS, VIDEO_SUFFIXES, choose_format
from .kinds import user_path
from .settings import Check, OutputSettings, no_check
from .video_out import PictureOutput, VideoOutput, Write
from .whole import check_writable, replacing

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"([^%]*)%(0?\d*)d([^%]*)")


def plan_output(
    path: str | Path, shape: Sequence[int], settings: OutputSettings | None = None, check: Check = no_check
) -> Output:
    """Makes sure that frames can be written to ``path``, before any is decoded.

    - ``.mp4``, ``.mkv``, ``.mov``, ``.webm``: a video, see `formats.FORMATS`, with alpha in VP9, ProRes (4444) and
      FFV1. Of several videos each gets a file, with ``_1``, ``_2`` before the suffix.
    - ``.safetensors``: one tensor ``frames`` ``[B, T, H, W, C]``, exact.
    - a name with ``%04d`` or alike that ends in ``.png``: pictures from 0 on, one video after the other.

    Args:
        path: where to.
        shape: ``[B, T, H, W, C]`` of all frames.
        settings: how.
        check: called several times a second while ffmpeg tries it out; what it raises ends that.

    Raises:
        OutputError: an unknown kind of file, a folder that is missing or read-only, a full disk, or something that the
            format or this ffmpeg can't do.
        OutOfMemoryError: a tensor that the host has no room for.
    """
    path = user_path(path, OutputError, another="name a file such as video.mp4")
    settings = settings or OutputSettings()
    suffix = path.suffix.lower()
    files = output_files(path, shape)
    if suffix == ".safetensors":
        return TensorOutput(path, shape, settings)
    if not (is_sequence(path) or suffix in VIDEO_SUFFIXES):
        raise OutputError(
            about_file(
                path,
                f"is no kind of file that frames are written to; name a {', '.join(VIDEO_SUFFIXES)}, "
                f".safetensors or a numbered frames/%04d.png",
            )
        )
    chosen = choose_format(path, settings.format)
    if not chosen.pictures and shape[4] < 3:
        raise OutputError(about_file(path, f"can't hold frames of {shape[4]} colours; write .safetensors or pictures"))
    if chosen.pictures and shape[4] not in (1, 3, 4):
        raise OutputError(about_file(path, f"can't hold frames of {shape[4]} colours; write .safetensors"))
    if not chosen.pictures:
        for file in files:
            check_writable(file)
        if shape[4] > 3 and chosen.of_colours(shape[4]).colours == 3:
            logger.warning("%s has no alpha: the fourth colour is left out; %s keep it", path, _formats_with_alpha())
        return VideoOutput(files, chosen, shape, settings, check)
    later = []
    # The folder of a sequence is made when it is written; what it would lie in must be there.
    if os.path.isdir(path.parent):  # of a name that is too long, pathlib's raises until Python 3.14
        for file in files:
            check_writable(file)
        later = _later(path, len(files))
        if later and settings.old_pictures == "refuse":
            raise OutputError(
                about_file(
                    path.parent,
                    f"has {later[0].name} to {later[-1].name} of an older video, which would follow the "
                    f"{len(files)} new pictures; choose another folder, or have older ones cleared",
                )
            )
    else:
        check_writable(path.parent)
    return PictureOutput(files, chosen, shape, settings, later, check)


@contextlib.contextmanager
def open_output(path: str | Path, *, shape: Sequence[int], fps: float, **options: Any) -> Iterator[Write]:
    """Opens ``path`` for frames that come in steps, as floats.

    Nothing is there under its final name before all of it is written.

    Args:
        path: where to, see `plan_output`.
        shape: ``[B, T, H, W, C]`` of all frames.
        fps: frames a second of a video.
        options: see `OutputSettings`.

    Yields:
        A function to call with each step's ``[B, t, H, W, C]`` in [0, 1].

    Raises:
        OutputError, OutOfMemoryError: as `plan_output` does, or what was written is not all of it.
    """
    settings = OutputSettings(fps=fps, **options)
    height, width = fitted_size(path, shape[2], shape[3], settings)
    output = plan_output(path, (*shape[:2], height, width, shape[4]), settings)
    with output.open(no_check) as write:

        def write_frames(frames: torch.Tensor) -> None:
            if output.pixels is not None:
                frames = output.pixels.convert(_fitted(frames, height, width))
            write(frames)

        yield write_frames


def fitted_size(path: str | Path, height: int, width: int, settings: OutputSettings) -> tuple[int, int]:
    """The size that frames of ``height`` and ``width`` have in a file at ``path``; said where it is another one."""
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES or not choose_format(path, settings.format).even:
        return height, width
    fitted = [side + (side % 2 if settings.odd == "pad" else -(side % 2)) for side in (height, width)]
    if fitted != [height, width]:
        # H.264 and H.265 with halved chroma can't say that a last single row or column is not to be shown.
        what = "repeating the last one" if settings.odd == "pad" else "leaving out the last one"
        logger.info(
            "%s: frames of %dx%d are %dx%d there, as the format has even numbers of rows and columns: by %s",
            path, width, height, fitted[1], fitted[0], what,
        )  # fmt: skip
    return fitted[0], fitted[1]


def _fitted(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Frames with a row or a column more, which repeats the last one, or fewer."""
    if frames.shape[2:4] == (height, width):
        return frames
    rows = torch.arange(height, device=frames.device).clamp_(max=frames.shape[2] - 1)
    columns = torch.arange(width, device=frames.device).clamp_(max=frames.shape[3] - 1)
    return frames[:, :, rows][:, :, :, columns]


def check_keeps_alpha(path: Path, settings: OutputSettings) -> None:
    """Raises `OutputError` if frames at ``path`` would lose their alpha; other kinds of files are for `plan_output`."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return
    chosen = choose_format(path, settings.format)
    if chosen.alpha is None:
        raise OutputError(about_file(path, f"can't hold alpha as {chosen.title}; choose {_formats_with_alpha()}"))


def _formats_with_alpha() -> str:
    return ", ".join(one.name for one in FORMATS.values() if one.alpha or one.pictures)


def output_files(path: str | Path, shape: Sequence[int]) -> list[Path]:
    """The files that frames of ``shape`` ``[B, T, H, W, C]`` become."""
    path, (batch, total) = Path(path), shape[:2]
    if is_sequence(path):
        return [path.parent / (path.name % i) for i in range(batch * total)]
    if batch == 1 or path.suffix.lower() == ".safetensors":
        return [path]
    return [path.with_stem(f"{path.stem}_{video + 1}") for video in range(batch)]


def is_sequence(path: str | Path) -> bool:
    """Whether it is the name of numbered pictures."""
    path = Path(path)
    return path.suffix.lower() == ".png" and _NUMBER.fullmatch(path.name) is not None


def _later(path: Path, count: int) -> list[Path]:
    """Pictures of a numbered name from number ``count`` on."""
    match = _NUMBER.fullmatch(path.name)
    assert match
    named = re.compile(re.escape(match[1]) + r"(\d+)" + re.escape(match[3]))
    numbers = sorted(
        int(found[1])
        for file in path.parent.iterdir()
        if (found := named.fullmatch(file.name)) and path.name % int(found[1]) == file.name and file.is_file()
    )
    return [path.parent / (path.name % number) for number in numbers if number >= count]


class TensorOutput:
    """A safetensors file; see `video_out.VideoOutput`."""

    pixels = None

    def __init__(self, path: Path, shape: Sequence[int], settings: OutputSettings) -> None:
        self.files = [path]
        self._shape = shape
        self._settings = settings
        if settings.format is not None or settings.audio is not None:
            raise OutputError(
                about_file(path, "holds frames as they are, without a format and sound; leave these away")
            )
        size = 4 * torch.Size(shape).numel()
        check_writable(path, needed=size)
        free = free_memory(torch.device("cpu"))
        if size > free:
            raise OutOfMemoryError(
                about_file(
                    path,
                    f"takes {gibibytes(size)} of memory to be written, and {gibibytes(free)} are free; "
                    f"write a video or pictures, which take one step's frames",
                )
            )

    @contextlib.contextmanager
    def open(self, _: Check) -> Iterator[Callable[[torch.Tensor], None]]:
        frames, done = torch.empty(0, device="cpu"), 0

        def write(newest: torch.Tensor) -> None:
            nonlocal frames, done
            if not done:
                frames = torch.empty(tuple(self._shape), dtype=newest.dtype, device="cpu")
            frames[:, done : done + newest.shape[1]] = newest
            done += newest.shape[1]

        path = self.files[0]
        with replacing(path) as temporary:
            yield write
            if done != self._shape[1]:
                raise OutputError(
                    about_file(path, f"would have {done} of {self._shape[1]} frames, so it is not written")
                )
            texts = {**self._settings.metadata, "fps": str(float(self._settings.fps))}
            save_file({"frames": frames}, temporary, metadata=texts)


Output = VideoOutput | TensorOutput
