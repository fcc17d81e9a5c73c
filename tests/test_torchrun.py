"""A rank under torchrun: whom it looks after, and that it ends where nothing answers; see runtime/test_group.py too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.processes import patience
from wan_vae_parallel import torchrun

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2,), (3, 3), (1, 2, 3), (8, 8)])
def test_every_rank_is_looked_after_by_another_one_on_its_machine_if_there_is_one(monkeypatch, sizes):
    machines = {}
    for machine, size in enumerate(sizes):
        for local in range(size):
            machines[len(machines)] = machine, local, size
    watched = {}
    for rank, (_, local, size) in machines.items():
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
        for other in set(torchrun._neighbours(rank, len(machines))) - {rank}:
            watched.setdefault(other, set()).add(rank)
    assert set(watched) == (set(machines) if len(machines) > 1 else set())
    for other, ranks in watched.items():
        machine, _, size = machines[other]
        assert size == 1 or any(machines[rank][0] == machine for rank in ranks)


def test_a_rank_beats_from_its_first_moment_to_its_end_and_then_is_over(monkeypatch):
    store = dist.HashStore()
    alone = {"backend": "gloo", "store": dist.HashStore(), "rank": 0, "world_size": 1}
    monkeypatch.setattr(torchrun, "_store", lambda _name: store)
    monkeypatch.setattr(torchrun, "_join", lambda *_: dist.init_process_group(**alone))
    for name, value in {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    words = torchrun.word_store(store, range(2))
    before = signal.set_wakeup_fd(-1)
    try:
        with torchrun.torchrun_group("cpu"):
            assert words.add("beats/1", 0) > 0
        assert words.add("beats/1", 0) < 0
    finally:
        signal.set_wakeup_fd(before)


def test_a_store_that_never_answers_ends_the_process():
    program = """
        import sys, time
        from wan_vae_parallel import torchrun
        class Silent:
            def check(self, keys):
                time.sleep(600)
        torchrun.SILENT_SECONDS, torchrun._UNWIND_SECONDS = 1.0, 0.1
        torchrun._watch(Silent(), "rank 1 on here/cpu", None)
        print("watched", flush=True)
        time.sleep(60)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=patience(50),
    )  # fmt: skip
    assert process.stdout == "watched\n", process.stderr
    assert process.returncode == 1
    assert process.stderr.startswith("error: rank 1 on here/cpu hears nothing from the first machine for 1 s")
