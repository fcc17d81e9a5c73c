"""Which processes share a machine, so that they see one another's numbers, sockets and devices."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAMESPACES = ("pid", "mnt")


def machine() -> str:
    """The same words in all processes that run on one machine and in the same container; nothing where none can say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in _NAMESPACES)])
    return ""
