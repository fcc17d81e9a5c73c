"""Files that appear whole or not at all."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError, about_file
from ..memory import gibibytes

# Of a file's name, as much as the folder's gets in which it is written.
_NAME_BYTES = 100
_SUFFIX, _NEW_SECONDS = ".partial", 10
# Folders of what is not whole yet, and the processes that write it: one that is forked meanwhile leaves it alone.
_unfinished: dict[Path, int] = {}


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
    check_writable(path, needed=needed)
    path = Path(path).resolve()  # a link stays one, and its target is replaced
    try:
        with unfinished_folder(path.parent, path.name) as folder:
            temporary = folder / path.name
            yield temporary
            readable_as_usual(temporary)
            temporary.replace(path)
    except (OSError, SafetensorError) as error:  # which its library raises of a full disk
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            about_file(path, "could not be written; free some room or choose another place", error)
        ) from error


@contextlib.contextmanager
def unfinished_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``parent`` for what is not whole yet; it goes when the block ends, however that is.

    One of a process that was killed goes when the next block of this name begins.
    """
    # Systems count a name's bytes, of which a letter may have four.
    begin = os.fsencode(name)[:_NAME_BYTES].decode(errors="ignore")
    _remove_left(parent, f".{begin}.")
    # Absolute: ffmpeg takes "-x/1.png" for an option, and "a:b/1.png" for an address.
    folder = Path(tempfile.mkdtemp(prefix=f".{begin}.", suffix=_SUFFIX, dir=parent.absolute()))
    _unfinished[folder] = os.getpid()
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _unfinished.pop(folder, None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether ``folder`` is this process's alone until the block ends; not where systems or disks have no locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            locked = False
        else:
            locked = True
        yield locked
    finally:
        os.close(descriptor)


def _remove_left(parent: Path, begin: str) -> None:
    """Removes folders of what is not whole whose processes are gone, by their names' first letters."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(parent)):
            if not (entry.name.startswith(begin) and entry.name.endswith(_SUFFIX)):
                continue
            # A new one may not be locked yet.
            if time.time() > entry.stat().st_mtime + _NEW_SECONDS:
                with _locked(Path(entry.path)) as nobodys:
                    if nobodys:
                        shutil.rmtree(entry.path, ignore_errors=True)


def remove_unfinished() -> None:
    """Removes what blocks that are still open have begun to write, for a process that ends without unwinding."""
    for folder, process in list(_unfinished.items()):
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


# ComfyUI ends so with Ctrl-C: the thread that decodes is left where it is.
atexit.register(remove_unfinished)


def readable_as_usual(path: Path) -> None:
    """Gives a file the mode that a plain ``open`` would have given it; some writers make theirs private."""
    path.chmod(0o666 & ~_mask())


def _mask() -> int:
    """The process's umask, read without setting it where that can be: other threads may make files just then."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: str | Path, *, needed: int = 0, what: str = "") -> None:
    """Raises `OutputError` if a file can't be written at ``path``, or ``needed`` bytes have no room there.

    Args:
        path: of the file.
        needed: bytes of it, or of ``what``.
        what: lies beside the file until that is whole; by default it is the file itself.
    """
    path = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # what is wrong with a name, which the following keep to themselves from Python 3.13 on
        if path.is_dir():
            raise OutputError(about_file(path, "is a folder; name a file in it"))
        if path.exists() and not path.is_file():
            raise OutputError(about_file(path, "is a device or a pipe; name a file"))
        if not path.parent.is_dir():
            raise OutputError(
                about_file(path, "can't be written: there is no folder for it; make it, or choose another")
            )
    except OSError as error:  # a name too long, a folder that can't be looked into
        if isinstance(error, OutputError):
            raise
        raise OutputError(about_file(path, "can't be written; choose another name", error)) from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(about_file(path, "can't be written: the folder is read-only; choose another"))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        beside = f"has {what} beside it, which " if what else ""
        raise OutputError(
            about_file(
                path,
                f"{beside}takes {gibibytes(needed)}, and {gibibytes(free)} are free there; free some room or choose "
                f"another place",
            )
        )
