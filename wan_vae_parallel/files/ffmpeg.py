"""ffmpeg: where it is, what it can, what it complains of, and a process of it that is fed frames."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ..errors import OutputError, about_file

logger = logging.getLogger(__name__)

# "[h264 @ 0x5581] [error] text": who says it, how grave it is, what.
_GRAVE = re.compile(r"(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] (.*)")
# What an ffmpeg says that had to end: the cause is in the lines before.
_CONSEQUENCES = re.compile(
    r"Error opening (in|out)put file|Error parsing options|Failed to set value|Decoding error|Task finished with error|"
    r"Terminating thread with|Nothing was written into|Error sending frames|Could not open encoder|Conversion failed|"
    r"Error muxing a packet|Error submitting a packet|Error closing file|Error writing trailer"
)
_LONGEST = 200
# In names of pixel formats: yuv420p10le, gbrp16be, p010le, rgb48be, rgba64le, gray16be, x2rgb10le, gbrpf32le.
_WIDE = re.compile(r"(9|10|12|14|16|32|48|64)(le|be)$")
# Pixel formats such as yuv420p, nv12, p010le, uyvy422, ayuv64le, vuya, y210le, xv36le.
_YUV = re.compile(r"a?yuv|yuy|yvy|uyv|uyy|vuy|vyu|nv\d|p[024]\d|y2\d|xv\d|v30")
_ALPHA = re.compile(r"yuva|gbrap|rgba|bgra|argb|abgr|ya(8|16)|ayuv|vuya")
_HDR = re.compile(r"smpte2084|arib-std-b67")
# Of codecs whose alpha is a stream within the stream: ffmpeg's own decoders leave it where it is.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Seconds between two looks whether a wait is over or cancelled.
_LOOK_SECONDS = 0.1
# Parts of a video that wait for the encoder: it works beside the decode, which is held back when these are full.
_WAITING = 2
# Seconds without any progress after which a log tells who is waited for.
_SLOW_SECONDS = 30.0


def find_ffmpeg(asked: str | Path | None = None) -> str:
    """The program to run.

    Args:
        asked: a path, or a name to look for on the PATH; None for imageio-ffmpeg's own.

    Raises:
        OutputError: there is none.
    """
    if asked is None:
        try:
            import imageio_ffmpeg  # only videos need it, and it brings a program of 60 MB

            return imageio_ffmpeg.get_ffmpeg_exe()
        except ImportError as error:
            raise OutputError(
                f"imageio-ffmpeg, which videos need, is missing ({error}); pip install imageio-ffmpeg brings it, with "
                f"the Python that runs this"
            ) from error
        except RuntimeError as error:
            raise OutputError(
                f"imageio-ffmpeg brings no ffmpeg for this machine ({error}); install one and name it"
            ) from error
    found = shutil.which(str(asked))
    if found is None:
        raise OutputError(
            about_file(
                asked,
                "can't be run here; take the ffmpeg that came with this pack, which is the default, or install one",
            )
        )
    return found


def check_encoder(program: str, encoder: str, pixels: str | None = None) -> None:
    """Raises `OutputError` if an ffmpeg lacks an encoder, or the encoder lacks a pixel format."""
    known = _encoder_help(program, encoder)
    if not known.startswith("Encoder "):
        raise OutputError(
            about_file(program, f"has no encoder {encoder}; choose another format, or name an ffmpeg that has it")
        )
    formats = re.search(r"Supported pixel formats: (.*)", known)
    if pixels and formats and pixels not in formats[1].split():
        raise OutputError(
            about_file(
                program,
                f"has an {encoder} that can't take {pixels}; choose another format, or name an ffmpeg whose can",
            )
        )


@functools.lru_cache
def _encoder_help(program: str, encoder: str) -> str:
    try:
        done = subprocess.run(
            [program, "-nostdin", "-hide_banner", "-h", f"encoder={encoder}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except OSError as error:
        raise OutputError(about_file(program, "can't be run; name another ffmpeg", error)) from error
    return done.stdout.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class VideoStream:
    """What ffmpeg tells of a file's first video.

    Attributes:
        wide: it has more than 8 bits.
        yuv: it is not RGB, nor grey.
        alpha: it has transparency.
        decoder: the one that reads that, where ffmpeg's usual one does not.
        tag: the codec's in the container, of four letters, where it has one.
        hdr: its transfer function, where that is one of HDR's.
    """

    wide: bool = False
    yuv: bool = False
    alpha: bool = False
    decoder: str | None = None
    tag: str | None = None
    hdr: str | None = None


def describe_video(program: str, path: Path) -> VideoStream:
    """What a file's first video is, as far as ffmpeg can tell."""
    try:
        said = _said(program, "-i", f"file:{path}")
    except OSError:
        return VideoStream()  # whoever reads the file will say it
    # Each stream's line, and those of its metadata behind it.
    streams = re.split(r"^ *Stream #", said, flags=re.MULTILINE)[1:]
    for text in streams:
        found = re.search(r" Video: (\w+).*?, (\w+)[(,]", text.partition("\n")[0])
        if found and "(attached pic)" not in text:
            apart = re.search(r"^ +alpha_mode +: 1\s*$", text, re.MULTILINE | re.IGNORECASE) is not None
            return VideoStream(
                wide=_WIDE.search(found[2]) is not None,
                yuv=_YUV.match(found[2]) is not None,
                alpha=apart or _ALPHA.match(found[2]) is not None,
                decoder=_ALPHA_DECODERS.get(found[1]) if apart else None,
                tag=tag[1] if (tag := re.search(r"\((\w{4}) / 0x", text)) else None,
                hdr=hdr[0] if (hdr := _HDR.search(text.partition("\n")[0])) else None,
            )
    return VideoStream()


def layout_channels(program: str, layout: str) -> tuple[str, ...]:
    """The channels of a layout as ffmpeg names both, such as ``("FL", "FR", "LFE")`` of 2.1; none if it is unknown."""
    if named := re.search(r"\(([A-Z0-9+]+)\)$", layout):  # of no name: "3 channels (FL+FR+LFE)"
        return tuple(named[1].split("+"))
    return _layouts(program).get(layout, ())


@functools.lru_cache
def _layouts(program: str) -> dict[str, tuple[str, ...]]:
    text = _said(program, "-layouts", standard_output=True).partition("Standard channel layouts:")[2]
    return {
        name: tuple(names.split("+")) for name, names in re.findall(r"^(\S+) +([A-Z0-9+]+)\s*$", text, re.MULTILINE)
    }


def sound_channels(program: str, path: Path) -> tuple[str, ...] | None:
    """The channels of a file's first sound, as `layout_channels` has them; None if there is none that it can tell."""
    try:
        said = _said(program, "-i", f"file:{path}")
    except OSError:
        return None  # whoever reads the file will say it
    found = re.search(r"^ *Stream #.* Audio: .*? Hz, ([^,\n]+)", said, re.MULTILINE)
    return layout_channels(program, found[1].strip()) if found else None


def _said(program: str, *arguments: str, standard_output: bool = False) -> str:
    """What an ffmpeg says of what it is asked."""
    done = subprocess.run(
        [program, "-nostdin", "-hide_banner", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    return (done.stdout if standard_output else done.stderr).decode(errors="replace")


def complaints(text: str) -> str:
    """What an ffmpeg that was run with ``-v level+error`` (or more) complains of, in a line; empty if it does not."""
    grave = [found[1].strip() for line in text.splitlines() if (found := _GRAVE.match(line))]
    causes = [line for line in grave if not _CONSEQUENCES.search(line)] or grave
    return "; ".join(dict.fromkeys(causes[:2]))[:_LONGEST]


def run(command: Sequence[str], check: Callable[[], None]) -> tuple[int, str]:
    """Runs a program to its end; its exit code, and what it wrote to its standard error.

    Args:
        command: the program and its arguments.
        check: called several times a second; what it raises ends the program, and what that has started.

    Raises:
        OSError: it does not start.
    """
    with tempfile.TemporaryFile() as said:
        # In a session of its own, as that of `FedProcess`.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            while True:
                try:
                    code = process.wait(_LOOK_SECONDS)
                except subprocess.TimeoutExpired:
                    check()
                    continue
                break
        finally:
            _kill(process)
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and what it has started: another ffmpeg may be a script."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


class FedProcess:
    """An ffmpeg that reads raw frames from its standard input.

    A thread feeds it, so that it works while its user makes the next frames; `put` waits while that thread has enough.
    Its user closes it in any case.

    Args:
        command: with ``-progress pipe:1`` among its options.

    Raises:
        OutputError: it does not start.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._progress: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            # In a session of its own: a Ctrl-C is this process's to act upon.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self._progress, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            self._said.close()
            self._progress.close()
            raise OutputError(about_file(command[0], "does not start; name another ffmpeg", error)) from error
        self._waiting: queue.Queue[torch.Tensor | None] = queue.Queue(_WAITING)
        # Whether that was said.
        self._slow = False
        self._thread = threading.Thread(target=self._feed, name="wan-vae-parallel ffmpeg", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process's."""
        return self._process.pid

    def put(self, data: torch.Tensor, check: Callable[[], None]) -> None:
        """Hands over bytes, which the caller leaves as they are; waits while there are too many.

        Args:
            data: uint8, on the host.
            check: called several times a second; what it raises ends the wait.

        Raises:
            OSError: the process has ended.
        """
        self._hand_over(data.contiguous().view(-1), check)

    def finish(self, check: Callable[[], None]) -> int:
        """Waits until all that was put is written, however long that takes.

        Returns:
            The number of frames that were.

        Raises:
            OSError: the process failed.
        """
        self._hand_over(None, check)
        while True:
            try:
                code = self._process.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                check()
                continue
            break
        if code:
            raise OSError(self._failure())
        self._progress.seek(0)
        counts = re.findall(rb"^frame=\s*(\d+)", self._progress.read(), re.MULTILINE)
        return int(counts[-1]) if counts else 0

    def close(self) -> None:
        """Ends the process, wherever it is, and what it has started."""
        _kill(self._process)
        # The thread comes to its end, since what it waits for does.
        while self._thread.is_alive():
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                self._thread.join(_LOOK_SECONDS)
            else:
                self._thread.join()
        self._said.close()
        self._progress.close()

    @property
    def said(self) -> str:
        """What it complains of, in a line; empty if it does not."""
        self._said.seek(0)
        return complaints(self._said.read().decode(errors="replace"))

    def _hand_over(self, data: torch.Tensor | None, check: Callable[[], None]) -> None:
        began = time.monotonic()
        while True:
            if self._process.poll() is not None:
                raise OSError(self._failure())
            if not self._slow and time.monotonic() > began + _SLOW_SECONDS:
                logger.warning(
                    "ffmpeg (process %d) has taken no frames for %.0f s: it is slow, or stopped; still waiting",
                    self.pid,
                    _SLOW_SECONDS,
                )
                self._slow = True
            try:
                self._waiting.put(data, timeout=_LOOK_SECONDS)
            except queue.Full:
                check()
                continue
            return

    def _failure(self) -> str:
        code = self._process.wait()
        if said := self.said:
            return f"ffmpeg: {said}"
        if sys.platform != "win32" and code == -signal.SIGXFSZ:
            return "File too large for the limit on files' sizes, see ulimit -f"
        return f"ffmpeg was killed by signal {-code}" if code < 0 else f"ffmpeg ended with code {code}"

    def _feed(self) -> None:
        pipe = self._process.stdin
        assert pipe
        broken = False
        while (data := self._waiting.get()) is not None:
            if not broken:
                try:
                    pipe.write(data.numpy().data)
                except OSError:
                    broken = True  # the process's end tells why
        with contextlib.suppress(OSError):
            pipe.close()
