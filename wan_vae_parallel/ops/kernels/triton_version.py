"""What the version of Triton that is installed offers; without one, what the newest does."""

from __future__ import annotations

import re

try:
    import triton
except ImportError:  # where no kernel runs either
    triton = None


def parsed(version: str) -> tuple[int, int]:
    """Major and minor of a version, of which builds append all sorts of things."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


VERSION = parsed(triton.__version__) if triton else (99, 0)
# Compiled kernels take all arguments, constants too.
COMPILED_TAKE_ALL = VERSION >= (3, 4)
# Tiles can be read through descriptors (TMA).
DESCRIPTORS = VERSION >= (3, 4)
