"""Small facts that took time to find out, kept in the user's cache folder from one process to the next.

A file for each fact: written apart and moved into its place, so that processes that write at once can't lose or damage
one another's, and need no lock, which some file systems don't have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .whole import replacing

# What a process that was killed had begun to write is nobody's any more when it is so old.
_LEFT_BEHIND_SECONDS = 3600.0


def cache_folder() -> Path:
    """Where the system keeps what can be made again.

    Raises:
        RuntimeError: this user has no home.
    """
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    return base / "wan_vae_parallel"


class CachedFacts:
    """Facts that hold for what ``key`` says, and for nothing else.

    Args:
        title: begins the folder's name, for people.
        key: all that the facts depend on.
    """

    def __init__(self, title: str, key: Mapping[str, str]) -> None:
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self._name = f"{_plain(title)}-{digest}"

    @property
    def folder(self) -> Path:
        """Where they lie; raises as `cache_folder` does."""
        return cache_folder() / self._name

    def read(self, name: str) -> Any:
        """The fact called ``name``; None if there is none that can be read, or it is another key's."""
        try:
            found = json.loads((self.folder / f"{_plain(name)}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RuntimeError):
            return None  # found out anew, and replaced
        if not isinstance(found, dict) or found.get("key") != self._key or found.get("name") != name:
            return None
        value = found.get("value")
        return value if found.get("sum") == _sum(value) else None

    def write(self, facts: Mapping[str, Any]) -> None:
        """Keeps ``facts`` (plain data whose mappings have words as keys, by name), whatever was there.

        Raises:
            OSError, RuntimeError: there is no such folder, it can't be written to, or the disk is full.
        """
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in facts.items():
            with replacing(folder / f"{_plain(name)}.json") as path:
                fact = {"key": self._key, "name": name, "value": value, "sum": _sum(value)}
                path.write_text(json.dumps(fact, indent=1), "utf-8")
        for left in folder.glob(".*.partial"):
            with contextlib.suppress(OSError):  # another process may clear up, too
                if time.time() - left.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                    shutil.rmtree(left)


def _sum(value: Any) -> str:
    """What tells a value from one in which a digit went wrong."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)
