"""Memory that processes share."""

from __future__ import annotations

import errno
import gc
import mmap
import os

import pytest
import torch

from wan_vae_parallel.workers import shared_memory
from wan_vae_parallel.workers.shared_memory import SharedMemory, populate

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name is Linux's")


def pages(memory):
    """How many have come into being."""
    return os.fstat(memory.descriptor).st_blocks * 512 // PAGE


def test_populated_pages_are_there_and_keep_what_they_hold():
    memory = SharedMemory.create(10 * PAGE - 100)
    content = memory.tensor(torch.Size([10 * PAGE - 100]), torch.uint8)
    assert pages(memory) == 0
    content[3 * PAGE] = 7
    assert pages(memory) == 1
    # From the middle of one page to the middle of another, where it is not the last one of all.
    populate(content[2 * PAGE + 50 : 5 * PAGE + 50])
    assert pages(memory) == 4
    populate(content[8 * PAGE :])
    assert pages(memory) == 6
    assert content[3 * PAGE] == 7
    assert int(content.sum()) == 7


def test_a_system_that_can_not_populate_is_no_error(monkeypatch):
    memory = SharedMemory.create(PAGE)
    monkeypatch.setattr(shared_memory, "_MADV_POPULATE_WRITE", 10**6)
    content = memory.tensor(torch.Size([PAGE]), torch.uint8)
    populate(content)
    assert pages(memory) == 0
    content += 1
    assert pages(memory) == 1


def test_a_descriptor_is_closed_once_if_mapping_fails(monkeypatch):
    closed = []
    real = os.close

    def mapping(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", mapping)
    monkeypatch.setattr(shared_memory.os, "close", lambda descriptor: closed.append(descriptor) or real(descriptor))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        SharedMemory.create(PAGE)
    gc.collect()
    assert len(closed) == 1


def test_discarded_pages_are_gone_and_read_as_zeros():
    memory = SharedMemory.create(9 * PAGE)
    content = memory.tensor(torch.Size([9 * PAGE]), torch.uint8)
    content += 1
    assert pages(memory) == 9
    memory.discard(PAGE // 2, 4 * PAGE + 10)
    assert pages(memory) == 6
    assert int(content.sum()) == 6 * PAGE
