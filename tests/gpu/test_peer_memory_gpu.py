"""Halo rows that kernels write to the neighbours' devices: exact, whatever the order in which devices get there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.parallel import launch, test_edges
from wan_vae_parallel.model.state import Frames, PageKey, Pages, SlotLists
from wan_vae_parallel.parallel import peer_memory as peer_memory_module
from wan_vae_parallel.parallel.coordination import Coordinator
from wan_vae_parallel.parallel.edges import ShardEdges
from wan_vae_parallel.parallel.peer_memory import open_peer_memory
from wan_vae_parallel.parallel.plan import plan_shards

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs two CUDA devices, there are {COUNT}"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(COUNT, tmp_path_factory.mktemp("ranks"), backend="nccl") as ranks:
        yield ranks


def opened():
    torch.cuda.set_device(launch.device())
    return open_peer_memory(launch.group(), launch.device(), Coordinator(launch.group()))


def check_halos(rank, world_size):
    peer_memory = opened()
    assert peer_memory
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for frames, columns, channels in ((3, 4, 5), (1, 1, 3), (7, 130, 96), (20, 362, 192)):
            plan = test_edges.uneven_plan(world_size, columns=columns)
            whole = test_edges.picture(frames, plan.rows, columns, channels, dtype)
            buffer = test_edges.poisoned_buffer(whole, plan, rank)
            edges = ShardEdges(plan, launch.group(), peer_memory)
            assert peer_memory.capacity(buffer) >= frames
            filled = test_edges.fill_halo(edges, buffer)
            expected = test_edges.fill_halo(ShardEdges(plan, launch.group()), buffer)
            assert test_edges.same_bits(filled, expected), (dtype, frames, columns, channels)


def test_halos_are_those_that_messages_bring(ranks):
    ranks.run(check_halos, members=COUNT, timeout=120)


def check_parts(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory_module, "_BOX_BYTES", 2 * 6 * 5 * 4)  # two frames' rows
        peer_memory = opened()
        for frames in (1, 2, 5):
            plan = test_edges.uneven_plan(world_size)
            buffer = test_edges.poisoned_buffer(test_edges.picture(frames, plan.rows, 4, 5, torch.float32), plan, rank)
            filled = test_edges.fill_halo(ShardEdges(plan, launch.group(), peer_memory), buffer)
            expected = test_edges.fill_halo(ShardEdges(plan, launch.group()), buffer)
            assert test_edges.same_bits(filled, expected), frames


def test_rows_that_do_not_fit_go_in_parts(ranks):
    ranks.run(check_parts, members=COUNT, timeout=120)


def check_order(rank, world_size):
    """Hundreds of swaps that nothing but themselves keeps in step, of many sizes, while devices lag at random."""
    peer_memory = opened()
    device = launch.device()
    plan = plan_shards(2 * world_size, 2 * world_size, world_size)
    edges = ShardEdges(plan, launch.group(), peer_memory)
    pages = Pages(24, 2, 640, PageKey(1, 96, 1), users=0, dtype=torch.float32, device=device, lists=SlotLists(device))
    lag = torch.Generator().manual_seed(rank)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    rows, above, below = pages.arena.shape[1], rank > 0, rank + 1 < world_size
    for number in range(400):
        frames = Frames(pages, tuple(range(number % 23, 24, 1 + number % 3)))
        chosen = frames.index.long()
        pages.arena[chosen] = 1000.0 * rank + number
        if torch.rand((), generator=lag) < 0.2:
            torch.cuda._sleep(int(2e6 * torch.rand((), generator=lag)))
        edges.fill_halo(frames)
        wrong += (pages.arena[chosen, 0] != 1000.0 * (rank - above) + number).sum()
        wrong += (pages.arena[chosen, rows - 1] != 1000.0 * (rank + below) + number).sum()
        wrong += (pages.arena[chosen, 1 : rows - 1] != 1000.0 * rank + number).sum()
    assert wrong.item() == 0


def test_devices_that_lag_take_no_rows_for_others(ranks):
    ranks.run(check_order, members=COUNT, timeout=120)


def check_exchange(rank, world_size):
    """Bytes for all others, of many sizes, while devices lag at random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory_module, "_PAIR_BYTES", 2**16)
        peer_memory = opened()
        device = launch.device()
        lag = torch.Generator().manual_seed(rank)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        others = [peer for peer in range(world_size) if peer != rank]

        def sent(number, sender, receiver):
            count = (1, 2**14, 2**14 + 1, 100_003)[(number + sender + receiver) % 4]
            return torch.arange(count, dtype=torch.float32, device=device) + number + 10.0**6 * sender

        for number in range(200):
            outgoing = {peer: sent(number, rank, peer) for peer in others}
            incoming = {peer: torch.full_like(sent(number, peer, rank), torch.nan) for peer in others}
            if torch.rand((), generator=lag) < 0.2:
                torch.cuda._sleep(int(2e6 * torch.rand((), generator=lag)))
            peer_memory.exchange(outgoing, incoming)
            for tensor in outgoing.values():
                tensor.fill_(-1)  # sent is sent
            for peer in others:
                wrong += (incoming[peer] != sent(number, peer, rank)).sum()
        assert wrong.item() == 0


def test_bytes_for_all_others_arrive_whole_and_in_order(ranks):
    ranks.run(check_exchange, members=COUNT, timeout=120)


def check_gather(rank, world_size):
    peer_memory = opened()
    for frames, columns, channels in ((1, 3, 5), (4, 160, 384)):
        plan = test_edges.uneven_plan(world_size, columns=columns)
        whole = test_edges.picture(frames, plan.rows, columns, channels, torch.bfloat16).to(launch.device())
        own = whole[:, plan.bounds[rank] : plan.bounds[rank + 1]]
        assert torch.equal(ShardEdges(plan, launch.group(), peer_memory).all_rows(own), whole)


def test_gathered_rows_are_the_pictures(ranks):
    ranks.run(check_gather, members=COUNT, timeout=120)


def check_refusal(rank, world_size):  # noqa: ARG001 (as the launcher calls it)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_P2P_DISABLE", "1")
        assert opened() is None
    # One that can't is enough for all.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
        assert opened() is None
    assert opened() is not None
    dist.barrier(launch.group())


def test_all_ranks_have_one_or_none_does(ranks):
    ranks.run(check_refusal, members=COUNT, timeout=120)
