"""What a worker process runs first: its own environment, then this very engine under its own name.

Run by path in a freshly spawned interpreter (the parent may be ComfyUI, which names the engine by a path that no
other process could import). Globals set from outside: ``connection``, ``log``, ``environment``, ``options``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

PACKAGE = "wan_vae_parallel"
# Of Linux: the signal that a process gets when its parent, or the thread that made it, is gone.
_PR_SET_PDEATHSIG = 1


def load_package() -> None:
    """Imports the package that this file is part of, whatever else is called so on ``sys.path``."""
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    assert spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def run(connection: Any, log: Any, environment: dict[str, str | None], options: dict[str, Any]) -> None:
    """Ends the process when the work is done; never returns."""
    # torch reads its settings when it is loaded: what the parent has there must be gone before.
    assert "torch" not in sys.modules, "a worker's torch was loaded with its parent's environment"
    # Ctrl-C is the parent's to act on; and a parent that is gone already has no work. Whose child this is need not be
    # who made the options: a wrapper around Python may lie between, or another namespace of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # Where somebody has stopped this process, its parent's end continues it, so that it can see that.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    if os.getppid() == 1 != options["parent"]:
        os._exit(1)
    options["parent"] = os.getppid()
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    load_package()
    worker = importlib.import_module(PACKAGE + ".runtime.worker")
    worker.main(connection, options)


if __name__ == "__wan_vae_worker__":
    run(*(globals()[name] for name in ("connection", "log", "environment", "options")))
