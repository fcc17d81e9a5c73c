"""Compiling kernels for GPUs that are not there, through the operations' own ways to launch them.

Triton is told that the GPU is another one, its assembler makes the machine code, and what that takes is read off it:
registers, stack (what was spilled), shared memory, and the instructions that matter. Tensors lie on the CPU, large ones
untouched. Needs Triton, no GPU, and not its interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from wan_vae_parallel.ops import gpu as gpu_facts
from wan_vae_parallel.ops.gpu import Gpu

# One model of each kind; sm_90 and sm_100 are of the data centre, sm_86, sm_89 and sm_120 what people own.
GPUS = {
    "sm_80": Gpu("A100", (8, 0), 108, 163 * 1024),
    "sm_86": Gpu("GeForce RTX 3090", (8, 6), 82, 99 * 1024),
    "sm_89": Gpu("GeForce RTX 4090", (8, 9), 128, 99 * 1024),
    "sm_90": Gpu("H200", (9, 0), 132, 227 * 1024),
    "sm_100": Gpu("B200", (10, 0), 148, 227 * 1024),
    "sm_120": Gpu("GeForce RTX 5090", (12, 0), 170, 99 * 1024),
}


def can_compile() -> bool:
    """Whether Triton is there, and compiles."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return False
    try:
        import triton.backends.nvidia.driver  # noqa: F401
    except ImportError:
        return False
    return True


class _Driver:
    """All that Triton's compiler asks a driver for."""

    def __init__(self, gpu: Gpu) -> None:
        from triton.backends.compiler import GPUTarget

        major, minor = gpu.capability
        self._capability = 10 * major + minor
        self._target = GPUTarget("cuda", self._capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        # Triton keeps what it compiled by device.
        return self._capability

    def get_current_stream(self, _device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def targeting(name: str) -> Iterator[Gpu]:
    """Within it kernels are chosen and compiled for the GPU ``name``."""
    from triton.runtime.driver import driver

    # Asking for the active one makes one, which there is none for.
    active = "_active" if hasattr(driver, "_active") else "active"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_facts, "_read", lambda _: GPUS[name])
        patch.setattr(driver, active, _Driver(GPUS[name]))
        _forget()
        try:
            yield GPUS[name]
        finally:
            _forget()


def _forget() -> None:
    """What was chosen for another GPU."""
    from wan_vae_parallel.ops.kernels import conv, down_conv, halo_exchange, norm

    for cached in (gpu_facts.gpu, conv._plan, down_conv._plan, norm._plan_of, halo_exchange._plan):
        cached.cache_clear()


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: what a thread and a program take, and how it reads.

    Attributes:
        kernel: its function's name.
        registers: of a thread.
        stack: bytes of a thread, to which registers are spilled.
        shared: bytes of a program.
        warps: of a program.
        wide_copies: asynchronous copies of 16 bytes that each thread asks for.
        copies: all asynchronous copies of threads.
        narrow_loads: of 2 bytes a thread.
        bulk_copies: through descriptors.
        products: of a warp, from registers.
        group_products: of four warps or of a whole program, from shared memory.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    wide_copies: int
    copies: int
    narrow_loads: int
    bulk_copies: int
    products: int
    group_products: int


def compiled(run: Callable[[], None]) -> list[Compiled]:
    """Compiles all kernels that ``run()`` would launch, for the GPU that is targeted."""
    from wan_vae_parallel.ops.kernels.launch import collect

    return [_read_off(key[0], job()) for key, job in collect(run).items()]


def _read_off(name: str, kernel) -> Compiled:
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        name,
        registers,
        stack,
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x10", ptx)),
        len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ptx)),
        len(re.findall(r"ld\.global(?:\.\w+)*\.b16 ", ptx)),
        ptx.count("cp.async.bulk.tensor"),
        ptx.count("mma.sync"),
        ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """A thread's registers, and its bytes of stack."""
    import triton.backends.nvidia.driver as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found, shown
    return int(found[1]), int(found[2])
