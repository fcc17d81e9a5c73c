"""Many decodes of other sizes in one process take no more memory than some."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

DECODES = """
import gc, json, random, sys, torch
import wan_vae_parallel as wvp
from tests.processes import resident_bytes
sizes = random.Random(0)
with wvp.load_vae(sys.argv[1], devices=sys.argv[2]) as vae:
    def decode(count):
        for _ in range(count):
            frames, rows, columns = sizes.randint(1, 4), sizes.randint(1, 6), sizes.randint(1, 6)
            vae.decode(torch.randn(1, 16, frames, rows, columns))
        gc.collect()
        workers = [worker.pid for worker in getattr(vae._engine, "workers", [])]
        return [resident_bytes(pid) for pid in ("self", *workers)]
    print(json.dumps([decode(60), decode(140)]))
"""
MEBIBYTE = 2**20


# The first ones fill what is kept: oneDNN's compiled convolutions, and what the allocator holds back.
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_decodes_of_new_sizes_take_no_more_and_no_more_memory(path, devices):
    done = subprocess.run(
        [sys.executable, "-c", DECODES, str(path), devices], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    warm, after = json.loads(done.stdout)
    assert len(warm) == len(after) == (1 if devices == "cpu" else 3)
    for before, now in zip(warm, after, strict=True):
        assert now - before < 40 * MEBIBYTE, (warm, after)
