"""Parts of a worker that no result tells of; run in this process. See also the tests of the pool."""

from __future__ import annotations

import mmap
import os
import threading
import types

import pytest
import torch
import torch.distributed as dist

from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.workers import worker
from wan_vae_parallel.workers.shared_memory import SharedMemory, populate

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers are Linux's")


def test_pages_come_into_being_while_a_step_is_computed_and_for_no_more_than_it(monkeypatch):
    # 1 video, frames of 32 x 32 pixels: two whole pages of float32 for the 16 rows of each of two ranks.
    shape = torch.Size([1, 7, 32, 32, 2])
    pages_a_frame = 16 * 32 * 2 * 4 // mmap.PAGESIZE
    assert pages_a_frame >= 1
    memory = SharedMemory.create(shape.numel() * 4)
    video = memory.tensor(shape, torch.float32)
    steps = [torch.full((1, count, 16, 32, 2), float(count)) for count in (1, 4, 2)]
    seen = []

    def pages():
        return os.fstat(memory.descriptor).st_blocks * 512 // mmap.PAGESIZE // pages_a_frame

    def to_host(frames, _device):
        """As on a GPU: one step is launched before the one before it is copied."""
        waiting = None
        for batch in frames:
            seen.append(pages())
            if waiting is not None:
                yield waiting.values, True
            waiting = batch
        yield waiting.values, True

    decoder = types.SimpleNamespace(architecture=types.SimpleNamespace(spatial_ratio=8), steps=lambda *_: iter(steps))
    one = types.SimpleNamespace(
        _decoder=decoder,
        _group=object(),
        _peer_memory=None,
        rank=1,
        device=torch.device("cpu"),
        # At once, and not in the thread that a worker has for it.
        _pages=types.SimpleNamespace(put=populate),
        _empty_cache=lambda: None,
        _busy=threading.Event(),
    )
    monkeypatch.setattr(worker, "to_host", to_host)
    monkeypatch.setattr(dist, "get_rank", lambda _group: 1)
    runs = [(16 * 32 * 2, 32 * 32 * 2)]
    decoding = worker._Worker._steps(one, torch.empty(0), video.flatten(2), runs, plan_shards(4, 4, 2), 1)
    counts = list(decoding)
    assert counts == [(1, True), (4, True), (2, True)]
    # Each step's frames when it is launched, and none of those that come later.
    assert seen == [1, 5, 7]
    assert (video[:, :, :16] == 0).all()
    assert [int(frame[16:].unique()) for frame in video[0]] == [1, 4, 4, 4, 4, 2, 2]
