"""Frames into files: videos, pictures, tensors.

B videos, t frames of a step, H x W pixels, C colours; frames [B, t, H, W, C] in [0, 1]
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import OutOfMemoryError, OutputError
from ..memory import free_memory, gibibytes
from .pictures import to_bytes, to_picture
from .whole import check_writable, replacing, unfinished_folder

Write = Callable[[torch.Tensor], None]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
# Visually lossless for x264; frames that must be exact go to .safetensors or .png.
_CRF = 14
_MOST_FPS = 1000


def check_output(path: str | Path, shape: Sequence[int]) -> None:
    """Makes sure that frames of ``shape`` ``[B, T, H, W, C]`` can be written to ``path``, before any is decoded.

    Raises:
        OutputError: an unknown kind of file, a folder that is missing or read-only, or a full disk.
    """
    path = Path(path)
    if _is_sequence(path):
        # The folder of a sequence is made when it is written; what it would lie in must be there.
        if path.parent.is_dir():
            for file in output_files(path, shape):
                check_writable(file)
        else:
            check_writable(path.parent)
    elif path.suffix.lower() == ".safetensors":
        size = 4 * torch.Size(shape).numel()
        check_writable(path, needed=size)
        free = free_memory(torch.device("cpu"))
        if size > free:
            raise OutOfMemoryError(
                f"{path} takes {gibibytes(size)} of memory to be written, and {gibibytes(free)} are free; "
                f"write a video or pictures, which take one step's frames"
            )
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        check_writable(path)
    else:
        raise OutputError(
            f"{path} is no kind of file that frames are written to; name a {', '.join(VIDEO_SUFFIXES)}, "
            f".safetensors or a numbered frames/%04d.png"
        )


def open_output(path: str | Path, *, shape: Sequence[int], fps: float) -> contextlib.AbstractContextManager[Write]:
    """Opens ``path`` for the frames of a decode, which come in steps.

    - ``.mp4``, ``.mkv``, ``.mov``: H.264, 8 bits, without alpha. Of several videos each gets a file, with ``_1``,
      ``_2`` before the suffix.
    - ``.safetensors``: one tensor ``frames`` ``[B, T, H, W, C]``, exact.
    - a name with ``%04d`` or alike that ends in ``.png``: 8-bit pictures from 0 on, one video after the other.

    Nothing is there under its final name before all of it is written.

    Args:
        path: where to.
        shape: ``[B, T, H, W, C]`` of all frames.
        fps: frames a second of a video.

    Returns:
        A context manager that gives a function to call with each step's ``[B, t, H, W, C]``.

    Raises:
        OutputError: it can't be written, or what was written is not all of it.
    """
    path = Path(path)
    check_output(path, shape)
    if _is_sequence(path):
        return _open_pictures(path, shape)
    if path.suffix.lower() == ".safetensors":
        return _open_tensor(path, shape, fps)
    return _open_videos(path, shape, fps)


def output_files(path: str | Path, shape: Sequence[int]) -> list[Path]:
    """The files that `open_output` writes."""
    path, (batch, total) = Path(path), shape[:2]
    if _is_sequence(path):
        return [path.parent / (path.name % i) for i in range(batch * total)]
    if batch == 1 or path.suffix.lower() == ".safetensors":
        return [path]
    return [path.with_stem(f"{path.stem}_{video + 1}") for video in range(batch)]


def _is_sequence(path: Path) -> bool:
    return path.suffix.lower() == ".png" and re.fullmatch(r"[^%]*%0?\d*d[^%]*", path.name) is not None


@contextlib.contextmanager
def _open_videos(path: Path, shape: Sequence[int], fps: float) -> Iterator[Write]:
    import imageio_ffmpeg  # only videos need it, and it brings a program of 60 MB

    _, total, height, width, colours = shape
    if colours < 3:
        raise OutputError(f"{path} can't hold frames of {colours} colours; write .safetensors")
    if not 0 < fps <= _MOST_FPS:
        raise OutputError(f"{path} can't have {fps} frames a second; name a rate of up to {_MOST_FPS}")
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            temporaries = [stack.enter_context(replacing(file)) for file in output_files(path, shape)]
            writers = []
            for temporary in temporaries:
                writer = imageio_ffmpeg.write_frames(
                    str(temporary),
                    (width, height),
                    fps=fps,
                    codec="libx264",
                    quality=None,
                    macro_block_size=2,
                    # Without a random number in the file: the same frames are the same bytes.
                    output_params=["-crf", str(_CRF), "-movflags", "+faststart", "-fflags", "+bitexact"],
                    ffmpeg_log_level="error",
                )
                stack.callback(writer.close)
                writer.send(None)
                writers.append(writer)

            def write(frames: torch.Tensor) -> None:
                nonlocal done
                done += frames.shape[1]
                for writer, video in zip(writers, to_bytes(frames[..., :3]), strict=True):
                    for frame in video:
                        writer.send(frame.contiguous().numpy())

            yield write
            _check_count(path, done, total)
            for writer, temporary in zip(writers, temporaries, strict=True):
                writer.close()
                _check_video(temporary, total / fps)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} could not be written: {error}") from error


def _check_video(path: Path, seconds: float) -> None:
    """Raises if ffmpeg stopped early, which it does not always tell."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        found = next(reader)["duration"]
    finally:
        reader.close()
    if abs(found - seconds) > max(0.1, 0.02 * seconds):
        raise OSError(f"ffmpeg wrote {found:.2f} s of {seconds:.2f} s; the disk may be full")


@contextlib.contextmanager
def _open_tensor(path: Path, shape: Sequence[int], fps: float) -> Iterator[Write]:
    frames, done = torch.empty(0), 0

    def write(newest: torch.Tensor) -> None:
        nonlocal frames, done
        if not done:
            frames = torch.empty(tuple(shape), dtype=newest.dtype)
        frames[:, done : done + newest.shape[1]] = newest
        done += newest.shape[1]

    with replacing(path) as temporary:
        yield write
        _check_count(path, done, shape[1])
        save_file({"frames": frames}, temporary, metadata={"fps": str(fps)})


@contextlib.contextmanager
def _open_pictures(path: Path, shape: Sequence[int]) -> Iterator[Write]:
    total, done = shape[1], 0
    made = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    moved: list[Path] = []
    try:
        # Beside the final place, so that moving them there is only a new name.
        with unfinished_folder(path.parent, "frames") as folder:

            def write(newest: torch.Tensor) -> None:
                nonlocal done
                for index, video in enumerate(newest):
                    for step, frame in enumerate(video):
                        to_picture(frame).save(folder / (path.name % (index * total + done + step)))
                done += newest.shape[1]

            yield write
            _check_count(path, done, total)
            for file in output_files(path, shape):
                (folder / file.name).replace(file)
                moved.append(file)
            moved.clear()
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}; free some room or choose another place") from error
    finally:
        for file in moved:  # not all of them: none
            file.unlink(missing_ok=True)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _check_count(path: Path, done: int, total: int) -> None:
    if done != total:
        raise OutputError(f"{path} would have {done} of {total} frames, so it is not written")
