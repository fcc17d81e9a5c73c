"""What a worker process runs first: this very engine under its own name, loaded while nothing waits for it.

Run by path in a fresh interpreter, since the parent may be ComfyUI, which names the engine by a path that no other
process could import. Arguments: the options as JSON.
"""

from __future__ import annotations

import sys

# Python puts a script's folder first, where these names are the engine's and not the library's.
sys.path = [entry for entry in sys.path if entry != __file__.rpartition("/")[0]]

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import types  # noqa: E402
from collections.abc import Callable  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

PACKAGE = "wan_vae_parallel"
# Of Linux: the signal that a process gets when its parent, or the thread that made it, is gone.
_PR_SET_PDEATHSIG = 1
_LOWEST_PRIORITY = 19


def load_package() -> None:
    """Has modules of the package that this file is part of found, whatever else is called so on ``sys.path``.

    Without what it gives its users, who import twice as many modules as a worker.
    """
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[PACKAGE] = package


def run(options: dict[str, Any]) -> None:
    """Ends the process when the work is done; never returns."""
    # Ctrl-C is the parent's to act on; and a parent that is gone already has no work. Whose child this is need not be
    # who made the options: a wrapper around Python may lie between, or another namespace of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # Where somebody has stopped this process, its parent's end continues it, so that it can see that.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    if os.getppid() == 1 != options["parent"]:
        os._exit(1)
    options["parent"] = os.getppid()
    for descriptor in (options["connection"], options["sentinel"]):
        os.set_inheritable(descriptor, False)
    # What the parent found elsewhere is found here, too, but stands in nobody's way.
    sys.path += [entry for entry in options["path"] if entry not in sys.path]
    loaded: list[Any] = []

    def load() -> None:
        # What loading makes stays; looking through it for garbage took 0.23 of its 2.45 s.
        gc.disable()
        load_package()
        loaded.append(importlib.import_module(PACKAGE + ".workers.worker"))

    gpu = options["device"].startswith("cuda")
    if gpu:
        _in_background(_init_driver)
    _in_background(load).join()
    if not loaded:
        os._exit(1)  # the thread has printed why
    gc.freeze()
    gc.enable()
    if gpu:
        # What the worker needs a moment later; whoever wants it sooner waits for it.
        _in_background(loaded[0].load_kernels)
    loaded[0].main(Connection(options["connection"]), options)


def _in_background(work: Callable[[], None]) -> threading.Thread:
    """A thread that gives way to everybody else on this machine; a whole process could never take that back."""

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _init_driver() -> None:
    """Has CUDA's driver make its tables, which takes a moment, but no context on any device."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
