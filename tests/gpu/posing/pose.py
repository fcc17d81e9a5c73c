"""A GPU that poses as an older one: ``python -m pytest tests/gpu --pose sm_89`` on a Hopper card.

Triton is told that the card is of the older kind, so that it compiles what it would there (`mma.sync` and `cp.async`,
no TMA, no `wgmma`), and its PTX is then assembled for the card that is there. Settings are chosen for the older kind;
its shared memory is all that a program gets. What can't be posed: the older kind's clocks, caches, memory and tensor
cores; and cuDNN, which would still play the card's own cards and so has no chance in the contest of settings.

Loaded by pytest's option, and by ``sitecustomize.py`` in every process that tests start; so nothing is imported here
that they would not load themselves.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Capability, and bytes of shared memory that a program may have.
POSES = {
    "sm_80": ((8, 0), 163 * 1024),
    "sm_86": ((8, 6), 99 * 1024),
    "sm_89": ((8, 9), 99 * 1024),
}
VARIABLE = "WAN_VAE_PARALLEL_TESTS_POSE"
# What ``sitecustomize.py`` loads this file as.
MODULE = "wan_vae_parallel_pose"
# TFLOP/s that cuDNN is said to have: more than nothing, which would mean that it does not run.
_NO_CHANCE = 1e-3

Hook = Callable[[ModuleType], None]

_pending: dict[str, list[Hook]] = {}


def begin(name: str, cache: Path) -> None:
    """Has this process pose, and all that it starts; no change for one that was started so.

    Args:
        name: of `POSES`.
        cache: an empty folder for Triton, whose own must not take one card's kernels for another's.
    """
    if MODULE in sys.modules:
        return
    os.environ[VARIABLE] = name
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    install(name)


def install(name: str) -> None:
    """Changes what has to be changed of modules as soon as they are loaded."""
    capability, shared = POSES[name]
    _after("wan_vae_parallel.ops.gpu", lambda module: _change_facts(module, name, capability, shared))
    _after("wan_vae_parallel.ops.kernels.measure", _leave_cudnn_out)
    # Not those of the modules beneath, which older versions load under other names.
    _after("triton.backends", lambda module: _change_target(module.backends["nvidia"].driver, capability))
    _after("triton.backends", lambda module: _assemble_for_the_card(module.backends["nvidia"].compiler))
    _after("triton.compiler.compiler", lambda module: setattr(module, "max_shared_mem", lambda _device: shared))


def _change_facts(module: ModuleType, name: str, capability: tuple[int, int], shared: int) -> None:
    real = module._read

    def read(device: Any) -> Any:
        gpu = real(device)
        if device.type != "cuda":
            return gpu
        if gpu.capability <= capability:
            raise RuntimeError(f"{gpu.name} can't pose as {name}, which is no older")
        return gpu._replace(name=f"{gpu.name} posing as {name}", capability=capability, shared=shared)

    module._read = read
    module.gpu.cache_clear()


def _leave_cudnn_out(module: ModuleType) -> None:
    import dataclasses

    real = module._time

    def time(*arguments: Any) -> Any:
        found = real(*arguments)
        return dataclasses.replace(found, cudnn=min(found.cudnn, _NO_CHANCE))

    module._time = time


def _change_target(driver: Any, capability: tuple[int, int]) -> None:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    driver.get_current_target = lambda _self: target


def _assemble_for_the_card(backend: Any) -> None:
    real = backend.make_cubin

    def make_cubin(self: Any, source: str, metadata: Any, options: Any, _capability: int) -> bytes:
        return real(self, source, metadata, options, the_cards_capability())

    backend.make_cubin = make_cubin


def the_cards_capability() -> int:
    """Of the current device, as Triton writes it: 90 for Hopper."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _after(name: str, hook: Hook) -> None:
    """Calls ``hook(module)`` once the module ``name`` is loaded, or now."""
    if name in sys.modules:
        hook(sys.modules[name])
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _pending.setdefault(name, []).append(hook)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself, but has hooks called behind what others find."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _pending:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                for hook in _pending.pop(name, ()):
                    hook(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
