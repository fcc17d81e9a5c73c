"""Videos into frames, one after the other, through ffmpeg.

H x W pixels, C colours; frames [1, H, W, C] in [0, 1]
"""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy
import torch

from ..errors import FrameError, OutputError, about_file
from ..ops.dispatch import say_once
from .ffmpeg import complaints, describe_video, find_ffmpeg

# Pixel formats by the number of colours: RGB of 8 bits, and of 16 where a video has more than 8, or no RGB.
_FORMATS = {3: "rgb24", 4: "rgba"}
_WIDE_FORMATS = {3: "rgb48be", 4: "rgba64be"}
# What that is made in from YUV: ffmpeg's short ways to packed RGB repeat colours instead of interpolating them, and one
# of them, to 16 bits by two rows, is wrong (seen in 7.0).
_PLANAR_FORMATS = {3: "gbrp16be", 4: "gbrap16be"}
# Between a video's colours, of which there are fewer than pixels: as ComfyUI's Load Video does.
_INTERPOLATION = "bilinear+accurate_rnd+full_chroma_int"
_NO_VIDEO = "matches no streams"
# What its filter showinfo says of each frame as it was decoded, before that is stretched to the first one's size.
_DECODED = re.compile(rb"^\[Parsed_showinfo[^\n]*\] n: *\d+ pts:[^\n]* s:(\d+)x(\d+) ", re.MULTILINE)


class VideoInput:
    """A video's frames as they come, each once and in order, whatever times the file gives them.

    A context manager with an ffmpeg process, which reads as far ahead as a pipe holds; the process ends with it.
    Iterate it once. Colours are those that ffmpeg converts to RGB, of 8 bits if the video is RGB of 8, else of 16,
    interpolated from where the file says that they lie; where that is the middle of their pixels they are those of
    ComfyUI's Load Video, up to 1/65535. Rotation that the file asks for is applied.

    Args:
        path: of the file.
        colours: C, 3 or 4; a video without alpha is opaque, and of 3 it is left out.
        most: frames to read, the first ones; None for all.

    Raises:
        FrameError: ffmpeg can't be started.
    """

    def __init__(self, path: Path, *, colours: int, most: int | None = None) -> None:
        if colours not in _FORMATS:
            raise FrameError(
                about_file(path, f"is a video, and this VAE's frames have {colours} colours; name a .safetensors")
            )
        self._path = path
        self._colours = colours
        self._most = most
        self._expected: int | None = None
        # Of what ffmpeg has said, how much was looked through; width and height of the first frame, how many frames
        # had these, and those of the one behind them if it has others.
        self._looked_through = 0
        self._size: tuple[int, int] | None = None
        self._alike = 0
        self._other_size: tuple[int, int] | None = None
        try:
            self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        except OSError as error:
            raise FrameError(
                about_file(
                    path,
                    "can't be read, as the folder for temporary files can't be used; free some room there, or name "
                    "another by TMPDIR",
                    error,
                )
            ) from error
        try:
            self._process = self._start()
        except BaseException:
            self._said.close()
            raise

    def __enter__(self) -> VideoInput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, wherever it is."""
        self._process.kill()
        if self._process.stdout:
            self._process.stdout.close()
        self._process.wait()
        self._said.close()

    @property
    def expected(self) -> int | None:
        """How many frames there will be, by what the file tells of its length; None if it does not."""
        if self._expected is not None:
            return self._expected
        text = self._text()
        length = re.search(r"Duration: (\d+):(\d+):(\d+\.?\d*)", text)
        rate = re.search(r" Video: .*?([\d.]+) fps", text)
        if not length or not rate:
            return self._most
        hours, minutes, seconds = map(float, length.groups())
        frames = max(1, round((3600 * hours + 60 * minutes + seconds) * float(rate[1])))
        self._expected = min(frames, self._most or frames)
        return self._expected

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields ``[1, H, W, C]``, float32.

        Raises:
            FrameError: there is no video in the file, it is damaged or cut short, or its frames change their size.
        """
        done = 0
        while (self._most is None or done < self._most) and (frame := self._next(done)) is not None:
            done += 1
            yield frame
        if done != self._most:  # what comes behind those that were asked for does not matter
            code = self._process.wait()
            reason = self._reason()
            if code or reason or not done:
                raise self._failed(done, reason or f"ffmpeg ended with code {code}")

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            program = find_ffmpeg()
        except OutputError as error:
            raise FrameError(error.text) from error
        stream = describe_video(program, self._path)
        if stream.alpha and self._colours == 3:
            say_once(f"{self._path} has alpha, which is left out, as this VAE has 3 colours")
        if stream.hdr:
            say_once(
                f"{self._path} is HDR ({stream.hdr}), whose values are encoded as they are: pictures are pale and too "
                f"dark; to have them as on an ordinary screen, tone-map the video before"
            )
        decoder = stream.decoder if self._colours == 4 else None
        pixels = (_WIDE_FORMATS if stream.wide or stream.yuv else _FORMATS)[self._colours]
        filters = ["showinfo=checksum=0"]
        if stream.yuv:
            filters += [f"scale=flags={_INTERPOLATION}", f"format={_PLANAR_FORMATS[self._colours]}"]
        command = [
            program, "-nostdin", "-hide_banner", "-nostats", "-v", "level+info",
            *(["-c:V", decoder] if decoder else []),
            # Whatever the name looks like, it is a file's; "V": no cover pictures.
            "-i", f"file:{self._path}", "-map", "0:V:0", "-fps_mode", "passthrough",
            *(["-frames:v", str(self._most)] if self._most else []),
            "-vf", ",".join(filters),
            # Pictures that tell their own size.
            "-c:v", "pam", "-pix_fmt", pixels, "-f", "image2pipe", "-",
        ]  # fmt: skip
        try:
            # In a session of its own: a Ctrl-C is this process's to act upon.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            raise FrameError(
                about_file(
                    self._path,
                    "can't be read, as ffmpeg does not start; fetch it again, or see that ffmpeg is whole",
                    error,
                )
            ) from error

    def _next(self, done: int) -> torch.Tensor | None:
        """The next frame, ``done`` being there; None at the end."""
        stream = self._process.stdout
        assert stream
        header = {}
        for line in stream:
            if line == b"ENDHDR\n":
                break
            name, _, value = line.decode("ascii", "replace").strip().partition(" ")
            header[name] = value
        if not header:
            return None
        self._check_size(done)
        try:
            shape = 1, int(header["HEIGHT"]), int(header["WIDTH"]), self._colours
            most = int(header["MAXVAL"])
            values = bytearray(math.prod(shape) * (1 if most < 256 else 2))
            if cast(io.BufferedReader, stream).readinto(values) != len(values):
                raise ValueError("end of the stream")
        except (KeyError, ValueError) as error:
            self._process.wait()
            raise self._failed(done, self._reason() or "ffmpeg ended in the middle of a frame") from error
        whole = numpy.frombuffer(values, dtype=numpy.uint8 if most < 256 else ">u2").astype(numpy.float32)
        return torch.from_numpy(whole).view(shape).div_(most)

    def _check_size(self, done: int) -> None:
        """Raises `FrameError` if the frame behind ``done`` others was stretched to their size."""
        new = self._bytes_said(self._looked_through)
        new = new[: new.rfind(b"\n") + 1]
        self._looked_through += len(new)
        for width, height in _DECODED.findall(new):
            size = int(width), int(height)
            self._size = self._size or size
            if self._other_size is None and size == self._size:
                self._alike += 1
            elif self._other_size is None:
                self._other_size = size
        if self._other_size is not None and self._size is not None and done >= self._alike:
            (width, height), (other_width, other_height) = self._size, self._other_size
            raise FrameError(
                about_file(
                    self._path,
                    f"changes its size: {done} frames have {width}x{height} pixels, and frame {done + 1} "
                    f"{other_width}x{other_height}; export it in one size, or take the first {done} frames alone",
                )
            )

    def _text(self) -> str:
        """What ffmpeg has said so far."""
        return self._bytes_said(0).decode(errors="replace")

    def _bytes_said(self, start: int) -> bytes:
        size = os.fstat(self._said.fileno()).st_size
        if hasattr(os, "pread"):  # leaves alone where ffmpeg writes next, which is a place that both share
            return os.pread(self._said.fileno(), size - start, start)
        self._said.seek(start)
        return self._said.read()

    def _reason(self) -> str:
        """What ffmpeg complains of, in a line; empty if it does not."""
        return complaints(self._text())

    def _failed(self, done: int, reason: str) -> FrameError:
        if _NO_VIDEO in reason:
            return FrameError(
                about_file(
                    self._path, "has no video stream that ffmpeg can find; name a file with a video, or fetch it again"
                )
            )
        if not done:
            return FrameError(
                about_file(
                    self._path, f"can't be read as a video (ffmpeg: {reason}); name a video, pictures or a .safetensors"
                )
            )
        return FrameError(
            about_file(
                self._path,
                f"is damaged or cut short behind frame {done} (ffmpeg: {reason}); fetch or export it again, "
                f"or take the first {done} frames alone",
            )
        )
