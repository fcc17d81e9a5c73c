"""Files in memory that have no name (Linux's memfd): no room in /dev/shm, and gone with their last user."""

from __future__ import annotations

import contextlib
import os
import sys

if sys.platform == "linux":
    import fcntl


def anonymous_file(name: str, size: int) -> int:
    """A descriptor of a new file of ``size`` zero bytes, which nobody can make shorter or longer.

    Pages come into being when they are written to.

    Args:
        name: what lists of mappings and open files show.
        size: in bytes.

    Raises:
        OSError: the process may have no more files, or none of that size.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        with contextlib.suppress(OSError):  # of systems that have memfd without seals
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
