"""Peer memory as far as no device is needed; tests/gpu/test_peer_memory_gpu.py has the rest."""

from __future__ import annotations

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wan_vae_parallel.errors import WorkerError
from wan_vae_parallel.ops.dispatch import KernelError
from wan_vae_parallel.parallel import peer_memory as peer_memory_module
from wan_vae_parallel.parallel.peer_memory import PeerMemory, open_peer_memory


def test_pairs_of_ranks_count_their_swaps_by_themselves(monkeypatch):
    # Rank 1 had no rows in a decode of ranks 0 and 1's, say: it must not be behind in the next.
    seen = []
    kernels = types.SimpleNamespace(exchange_halo=lambda *_, **options: seen.append(options))
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.halo_exchange", kernels)
    peer_memory = PeerMemory([torch.zeros(4 * 8 * 2**20 + 4096, dtype=torch.uint8) for _ in range(3)], 1, None, None)
    arena, slots = torch.zeros(2, 4, 5, 3), torch.zeros(1, dtype=torch.int32)
    for above, below, trial in ((0, None, False), (0, None, False), (0, 2, True), (0, 2, False), (0, 2, False)):
        peer_memory.exchange_halo(arena, slots, above=above, below=below, trial=trial)
    assert [options["numbers"][0] for options in seen] == [1, 2, 2, 3, 4]
    assert [options["numbers"][1] for options in seen if options["below"]] == [0, 1, 2]
    assert [options["below"] is None for options in seen] == [True, True, False, False, False]


def test_numbers_of_swaps_wrap_as_int32(monkeypatch):
    seen = []
    kernels = types.SimpleNamespace(exchange_halo=lambda *_, **options: seen.append(options["numbers"]))
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.halo_exchange", kernels)
    peer_memory = PeerMemory([torch.zeros(4 * 8 * 2**20 + 4096, dtype=torch.uint8) for _ in range(2)], 0, None, None)
    peer_memory._counts[1] = 2**31 - 2
    for _ in range(3):
        peer_memory.exchange_halo(torch.zeros(2, 4, 5, 3), torch.zeros(1, dtype=torch.int32), above=None, below=1)
    assert [below for _, below in seen] == [2**31 - 1, -(2**31), -(2**31) + 1]
    assert all(number % 2 == count % 2 for count, (_, number) in enumerate(seen, 2**31 - 1))


def test_boxes_and_signals_of_a_rank_are_parts_of_its_memory_alone(monkeypatch):
    seen = []
    kernels = types.SimpleNamespace(exchange_halo=lambda *given, **options: seen.append((given, options)))
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.halo_exchange", kernels)
    buffers = [torch.full((4 * 8 * 2**20 + 4096,), rank, dtype=torch.uint8) for rank in range(3)]
    peer_memory = PeerMemory(buffers, 1, None, None)
    arena = torch.zeros(2, 4, 5, 3, dtype=torch.bfloat16)
    peer_memory.exchange_halo(arena, torch.zeros(1, dtype=torch.int32), above=0, below=2)
    ((given, options),) = seen
    for rank, (boxes, signals) in ((1, given[2:]), (0, options["above"]), (2, options["below"])):
        assert boxes.shape == (2, 2, 8 * 2**20 // 2)
        assert boxes.dtype == torch.bfloat16
        assert signals.shape == (1024,)
        assert signals.dtype == torch.int32
        assert (boxes.view(torch.uint8) == rank).all()
        assert (signals.view(torch.uint8) == rank).all()
        assert signals.data_ptr() == buffers[rank].data_ptr() + boxes.nbytes
    assert peer_memory.capacity(arena) == 8 * 2**20 // (5 * 3 * 2)


def test_a_kernel_that_fails_is_an_error_that_names_the_way_out(monkeypatch):
    def fail(*_arguments, **_options):
        raise KernelError("_swap_kernel: RuntimeError ptxas error")

    monkeypatch.setitem(
        sys.modules, "wan_vae_parallel.ops.kernels.halo_exchange", types.SimpleNamespace(exchange_halo=fail)
    )
    peer_memory = PeerMemory([torch.zeros(4 * 8 * 2**20 + 4096, dtype=torch.uint8) for _ in range(2)], 0, None, None)
    # Before a decode all ranks agree on another way.
    assert "_swap_kernel: RuntimeError ptxas error" in peer_memory.why_not(torch.device("cpu"))
    # In the middle of one there is none.
    with pytest.raises(WorkerError, match=r"_swap_kernel.*with NCCL_P2P_DISABLE=1 rows go through NCCL instead"):
        peer_memory.exchange_halo(torch.zeros(2, 4, 5, 3), torch.zeros(1, dtype=torch.int32), above=None, below=1)


def test_a_kernel_that_compiles_is_no_reason_against_peer_memory(monkeypatch):
    calls = []
    kernels = types.SimpleNamespace(exchange_halo=lambda *_, **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.halo_exchange", kernels)
    peer_memory = PeerMemory([torch.zeros(4 * 8 * 2**20 + 4096, dtype=torch.uint8) for _ in range(2)], 0, None, None)
    assert peer_memory.why_not(torch.device("cpu")) == ""
    assert all(options["above"] and options["below"] for options in calls)


class Signals:
    """torch's, between threads that stand for ranks: a signal is given when the one before has been taken."""

    def __init__(self, rank, events):
        self.rank, self.events = rank, events

    def put_signal(self, peer):
        given, taken = self.events[self.rank, peer]
        assert taken.acquire(timeout=20)
        given.release()

    def wait_signal(self, peer):
        given, taken = self.events[peer, self.rank]
        assert given.acquire(timeout=20)
        taken.release()


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_bytes_of_any_number_are_exchanged_through_boxes_that_take_turns(ranks, monkeypatch):
    monkeypatch.setattr(peer_memory_module, "_PAIR_BYTES", 64)
    size = 4 * peer_memory_module._BOX_BYTES + peer_memory_module._SIGNAL_BYTES + 2 * (ranks - 1) * 64
    buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
    events = {(a, b): (threading.Semaphore(0), threading.Semaphore(1)) for a in range(ranks) for b in range(ranks)}

    def sent(number, sender, receiver):
        """Less than a box, one, several, nothing; more one way than the other."""
        count = (0, 5, 16, 17, 50)[(number + 2 * sender + receiver) % 5]
        return torch.arange(count, dtype=torch.float32) + 1000 * number + 100 * sender + 10 * receiver

    def run(rank):
        peer_memory = PeerMemory(buffers, rank, None, Signals(rank, events))
        assert peer_memory.size == size
        for number in range(20):
            # Not all of them each time: pairs count for themselves.
            peers = [peer for peer in range(ranks) if peer != rank and (number + rank + peer) % 4]
            incoming = {peer: torch.full_like(sent(number, peer, rank), torch.nan) for peer in peers}
            peer_memory.exchange({peer: sent(number, rank, peer) for peer in peers}, incoming)
            for peer in peers:
                assert torch.equal(incoming[peer], sent(number, peer, rank)), (number, rank, peer)

    with ThreadPoolExecutor(ranks) as threads:
        for one in [threads.submit(run, rank) for rank in range(ranks)]:
            one.result(timeout=60)


def test_there_is_none_on_the_cpu():
    assert open_peer_memory(None, torch.device("cpu"), None) is None
