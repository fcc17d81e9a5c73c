"""The shell's way in: ``demo``, ``decode``, ``encode``, ``info``, ``bench`` and ``workflow``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import ArgumentError, WanVAEError
from ..torchrun import launched
from . import bench, decode, demo, encode, info, workflow
from .shared import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    options = _parser().parse_args(arguments)
    # So that a polite kill unwinds too, and takes half-written files along.
    signals.listen()
    try:
        if launched() and not getattr(options, "together", False):
            raise ArgumentError("torchrun's processes decode or encode together; run the other commands without it")
        options.run(options)
    except WanVAEError as error:
        if signals.stopped:  # ffmpeg may hear of a Ctrl-C first
            return _say_stopped()
        # Without what only helps in Python.
        print(f"error: {error.text}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Nobody reads what is printed any more; files are whole by then. Python itself would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _say_stopped()
    return 0


def _say_stopped() -> int:
    print("stopped; nothing was left half-written", file=sys.stderr)
    return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae-parallel", description="Decode and encode Wan videos exactly: no tiles, no seams, any length."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command in (demo, decode, encode, bench, info, workflow):
        command.add_parser(commands)
    return parser
