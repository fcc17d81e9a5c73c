"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError
from .memory import gibibytes


@contextlib.contextmanager
def replacing(path: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and moves it there when the block ends well.

    If the block fails, the temporary file goes and ``path`` stays as it was.

    Args:
        path: the final name; its folder must be there.
        needed: bytes that will be written, if known.

    Raises:
        OutputError: the folder is missing or can't be written to, or the disk is too full.
    """
    path = Path(path)
    check_writable(path, needed=needed)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent))
    temporary = folder / path.name
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} could not be written ({error}); free some room or choose another place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: str | Path, *, needed: int = 0) -> None:
    """Raises `OutputError` if a file can't be written at ``path``, or ``needed`` bytes have no room there."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path} can't be written: there is no folder {path.parent}; make it, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} can't be written: the folder {path.parent} is read-only; choose another")
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(
            f"{path} takes {gibibytes(needed)}, and {gibibytes(free)} are free there; free some room or choose "
            f"another place"
        )
