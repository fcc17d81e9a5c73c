"""Anonymous memory that several processes map: no name, no file, no limit of /dev/shm, gone with its last user."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..anonymous import anonymous_file

# Of Linux 5.14; Python knows its name from 3.14 on.
_MADV_POPULATE_WRITE = 23
# Bytes between two looks whether they are still wanted.
_AT_ONCE = 32 * 2**20
# From Python 3.13 on a mapping needs no copy of its descriptor: results that are kept take none.
_NO_COPY: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class SharedMemory:
    """A run of bytes behind a file descriptor (a Linux memfd), mapped into this process.

    Tensors made from it keep the mapping; the descriptor is only there to be handed to other processes, and is
    closed with `close`.
    """

    descriptor = -1

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor  # this one's to close, whatever happens
        self.size = size
        try:
            self._map = mmap.mmap(descriptor, size, **_NO_COPY)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """Zeroed memory of ``size`` > 0 bytes; pages come into being when they are touched."""
        return cls(anonymous_file("wan-vae-parallel", size), size)

    def tensor(self, shape: torch.Size, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """What lies from byte ``offset`` on as a contiguous tensor."""
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=offset).view(shape)

    def discard(self, start: int, stop: int) -> None:
        """Gives the system back the pages that lie within ``start`` to ``stop``; they read as zeros afterwards."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_REMOVE, first, last - first)

    def close(self) -> None:
        """Closes the descriptor; the memory itself goes when no process has it mapped any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def populate(tensor: torch.Tensor) -> None:
    """Brings the pages under a contiguous tensor into being, so that writing to it later is only that.

    What it holds stays. Where the system has no such call, pages come with the first write as ever.
    """
    if not tensor.nbytes or sys.platform != "linux":
        return
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    # Unlike mmap's own method, it lets other threads run.
    _madvise()(first, tensor.data_ptr() + tensor.nbytes - first, _MADV_POPULATE_WRITE)


@contextlib.contextmanager
def populating(tensor: torch.Tensor) -> Iterator[None]:
    """Within it a thread does that to a contiguous tensor from its beginning on, ahead of whoever writes to it."""
    over = threading.Event()

    def populate_all() -> None:
        for part in tensor.view(-1).split(_AT_ONCE // tensor.element_size()):
            if over.is_set():
                return
            populate(part)

    thread = threading.Thread(target=populate_all, name="wan-vae-parallel pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
