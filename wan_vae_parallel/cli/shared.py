"""What the shell's commands have in common: signals, options, a bar."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch

from ..architecture import Architecture
from ..devices import DTYPES
from ..errors import ArgumentError, OutputError, about_file
from ..files.formats import QUALITIES
from ..files.settings import LEAST_FPS, MOST_FPS

_BAR = 32
# Between two lines in a pipe.
_LINE_SECONDS = 2.0
# A second signal within so many seconds is an impatient user's; it must not end the cleaning up that the first began.
_IMPATIENT_SECONDS = 5.0


class Signals:
    """Signals that end a program, as a KeyboardInterrupt, which waits while files are being made, written or closed."""

    def __init__(self) -> None:
        self.stopped = False
        self._raised: float | None = None
        self._depth = 0

    def listen(self) -> None:
        """Takes the signals over, in the main thread; others never get them."""
        self.stopped, self._raised = False, None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup has it
                signal.signal(hangup, self._stop)

    def end_if_stopped(self) -> None:
        """Raises what was held back, or what Python dropped: it ignores errors while it forks, as for ffmpeg."""
        if self.stopped:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it signals wait."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.end_if_stopped()

    def _stop(self, *_: object) -> None:
        self.stopped = True
        now = time.monotonic()
        if not self._depth and (self._raised is None or now > self._raised + _IMPATIENT_SECONDS):
            self._raised = now
            raise KeyboardInterrupt


signals = Signals()


def add_engine_options(parser: argparse.ArgumentParser, of: str = "latent frames") -> None:
    """Adds where, in what and with how many ``of`` at once."""
    parser.add_argument(
        "--devices", default="auto", help="auto, cpu, cuda:0 or cuda:0,cuda:1,...; default: %(default)s"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: %(default)s")
    parser.add_argument(
        "--chunk", type=chunk_size, default="auto", help=f"{of} at once: memory against speed; default: auto"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def rate(text: str) -> Fraction:
    """Frames a second."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = Fraction(0)
    if not LEAST_FPS <= value <= MOST_FPS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a frame rate from {float(LEAST_FPS)} to {MOST_FPS}, such as 16, 23.976 or 30000/1001"
        )
    return value


def quality(text: str) -> int | str:
    """A word, or a CRF."""
    if text.isdigit():
        return int(text)
    if text not in QUALITIES:
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(QUALITIES)} or a CRF as 18")
    return text


def chunk_size(text: str) -> int | str:
    """Frames at once; ``auto``, or 0 as in the nodes, to have them chosen."""
    return "auto" if text in ("auto", "0") else positive(text)


def frame_size(text: str) -> tuple[int, int]:
    """Width and height."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size as 1280x720")
    return int(match[1]), int(match[2])


def frame_sizes(text: str) -> list[tuple[int, int]]:
    """Several sizes, with commas between them."""
    return [frame_size(part) for part in text.split(",")]


def latent_size(architecture: Architecture, size: tuple[int, int], *, encoded: bool = False) -> tuple[int, int]:
    """Latent rows and columns of frames of ``size`` (width, height), which are decoded or ``encoded``."""
    ratio = architecture.encode_ratio if encoded else architecture.spatial_ratio
    if size[0] % ratio or size[1] % ratio:
        raise ArgumentError(
            f"frames of {architecture.name} have a multiple of {ratio} pixels a side, not {size[0]}x{size[1]}; "
            f"take {max(1, round(size[0] / ratio)) * ratio}x{max(1, round(size[1] / ratio)) * ratio}"
        )
    return size[1] // ratio, size[0] // ratio


def check_no_input(output: Path, *inputs: Path | None) -> None:
    """Raises `OutputError` if ``output`` is one of the files that are read, which it would take the place of."""
    for path in inputs:
        try:
            same = path is not None and path.samefile(output)
        except OSError:  # one of them is not there
            continue
        if same:
            raise OutputError(about_file(output, f"would take the place of {path}, which is read; name another one"))


def make_folder(folder: Path) -> None:
    """Makes a folder to write to, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(about_file(folder, "can't be written to; choose another folder with -o", error)) from error


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's prefix."""
    return str(dtype).removeprefix("torch.")


class Progress:
    """A bar on a terminal; in a pipe a line now and then, if it takes that long."""

    def __init__(self, *, shown: bool = True) -> None:
        # There is none in a process whose parent closed it.
        self._shown = shown and sys.stderr is not None
        self._bar = self._shown and sys.stderr.isatty()
        self._next_line = time.monotonic() + _LINE_SECONDS

    def show(self, done: int, total: int | None) -> None:
        """Frames that are done, of so many if that is known; a video's file may be a few off."""
        if not self._shown:
            return
        total = None if total is None else max(done, total)
        count = f"{done}/{total}" if total else str(done)
        if self._bar:
            filled = _BAR * done // total if total else 0
            print(f"\r[{'#' * filled}{' ' * (_BAR - filled)}] {count} frames", end="", file=sys.stderr, flush=True)
        elif done != total and time.monotonic() >= self._next_line:
            print(f"{count} frames", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + _LINE_SECONDS

    def close(self) -> None:
        """Ends its line."""
        if self._bar:
            print(file=sys.stderr)


def command_name() -> str:
    """How to call this program again: by its name, or as a module of this Python where it was called so."""
    name = Path(sys.argv[0]).stem
    return name if name == "wan-vae-parallel" else f"{shlex.quote(sys.executable)} -m wan_vae_parallel"
