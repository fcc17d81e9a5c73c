"""What settings of kernels go by: facts of a GPU, asked of PyTorch in this one place."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """A GPU model, as far as kernels care.

    Attributes:
        name: as its driver calls it.
        capability: major and minor version of what it computes, as in "sm_89".
        processors: multiprocessors.
        shared: bytes of shared memory that a program may have.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int

    @property
    def has_tma(self) -> bool:
        """Whether its programs can read tiles through descriptors (TMA): from Hopper on."""
        return self.capability >= (9, 0)

    @property
    def reads_products_from_shared(self) -> bool:
        """Whether its products take both sides from shared memory: Hopper's, and the data centre's Blackwell's.

        Others take them from registers, which leaves fewer for accumulators.
        """
        return self.capability[0] in (9, 10)


# Of CUDA's driver: the number of the attribute, and the value for any number of processes.
_COMPUTE_MODE, _DEFAULT = 20, 0

# What stands in for a GPU in Triton's interpreter.
H200 = Gpu("NVIDIA H200", (9, 0), 132, 232448)


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """What ``device`` is; an H200 where it is no GPU."""
    return _read(device)


def _read(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin"),  # noqa: B009 (unknown to its type)
    )


@functools.cache
def takes_processes(device: torch.device) -> bool:
    """Whether several processes may use ``device`` at once; nvidia-smi can forbid it (``-c EXCLUSIVE_PROCESS``)."""
    gpu(device)  # which begins with the driver, if nobody has
    mode, number = ctypes.c_int(_DEFAULT), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        # Where either fails, the mode stays the usual one.
        if driver.cuDeviceGet(ctypes.byref(number), device.index or 0) == 0:
            driver.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, number)
    except (OSError, AttributeError):
        return True
    return mode.value == _DEFAULT
