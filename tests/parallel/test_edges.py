"""Halo exchange, gathering and re-sharding over real process groups: all exact, rtol 0.

T frames, H rows, W columns, C channels; ``checks_...`` functions run in the ranks, see launch.py
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from tests.parallel import launch
from wan_vae_parallel.model.state import Frames, PageKey, Pages, SlotLists
from wan_vae_parallel.parallel.edges import ShardEdges
from wan_vae_parallel.parallel.plan import ShardPlan, plan_shards
from wan_vae_parallel.parallel.rows import frame_rows, to_own_rows

WORLD = 6
SIZES = [1, 2, 3, 5]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(WORLD, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def uneven_plan(shards, columns=4, scale=1):
    """Heights 1, 3, 2, 1, 3...: the smallest first, and none like its neighbour."""
    bounds = [0]
    for shard in range(shards):
        bounds.append(bounds[-1] + scale * (1, 3, 2)[shard % 3])
    return ShardPlan(transposed=False, bounds=tuple(bounds), columns=columns)


def picture(frames, rows, columns, channels, dtype):
    """The same in every rank, all values different enough that a wrong row shows in bf16 too."""
    generator = torch.Generator().manual_seed(frames + 10 * rows)
    return torch.randn((frames, rows, columns, channels), generator=generator).to(launch.device(), dtype)


def poisoned_buffer(whole, plan, rank, scale=1):
    """This rank's rows of ``whole`` in the interior of a buffer whose border is NaN."""
    start, stop = (bound * scale for bound in plan.bounds[rank : rank + 2])
    frames, _, columns, channels = whole.shape
    buffer = whole.new_full((frames, stop - start + 2, columns + 2, channels), torch.nan)
    buffer[:, 1:-1, 1:-1] = whole[:, start:stop]
    return buffer


def paged(buffer):
    """The frames of ``buffer``, borders and all, in slots of an arena out of order; the other slots are 7."""
    frames, rows, columns, channels = buffer.shape
    key = PageKey(1, channels, 1)
    pages = Pages(
        2 * frames + 2,
        rows - 2,
        columns - 2,
        key,
        users=0,
        dtype=buffer.dtype,
        device=buffer.device,
        lists=SlotLists(buffer.device),
    )
    pages.arena.fill_(7)
    placed = Frames(pages, tuple(range(2 * frames, 0, -2)))
    pages.arena[list(placed.slots)] = buffer
    return placed


def fill_halo(edges, buffer):
    """`ShardEdges.fill_halo` of the frames of ``buffer``, which it returns; nothing else may change."""
    frames = paged(buffer)
    edges.fill_halo(frames)
    others = [slot for slot in range(len(frames.arena)) if slot not in frames.slots]
    assert (frames.arena[others] == 7).all()
    return frames.arena[list(frames.slots)]


def same_bits(a, b):
    """Equality that takes NaN for itself."""
    assert a.shape == b.shape
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=9), b.nan_to_num(nan=9))


# Halos.


def check_halo(rank, world_size, dtype, scale):
    plan = uneven_plan(world_size)
    edges = ShardEdges(plan, launch.group())
    whole = picture(3, plan.rows * scale, 4, 5, dtype)
    buffer = poisoned_buffer(whole, plan, rank, scale)
    filled = fill_halo(edges, buffer)

    start, stop = (bound * scale for bound in plan.bounds[rank : rank + 2])
    expected = buffer.clone()
    if rank > 0:
        expected[:, 0, 1:-1] = whole[:, start - 1]
    if rank < world_size - 1:
        expected[:, -1, 1:-1] = whole[:, stop]
    # Columns of the halo are the neighbours' borders: NaN here as there, and zeros in a workspace.
    assert same_bits(filled, expected)
    assert filled[:, :, 1:-1].isnan().any() == (rank in (0, world_size - 1))
    return edges.rows_sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 2])  # latent rows, and upsampled ones
@pytest.mark.parametrize("size", SIZES)
def test_halo_is_the_neighbours_rows_and_nothing_else_changes(ranks, size, scale, dtype):
    sent = ranks.run(check_halo, dtype, scale, members=size)
    # One row a frame and neighbour: outer edges send nothing.
    assert sent == [3 * ((rank > 0) + (rank < size - 1)) for rank in range(size)]


class Recorder:
    """A peer_memory that has room for so many frames, and remembers what it is asked for."""

    def __init__(self, room):
        self.room = room
        self.swaps = []

    def capacity(self, arena):  # noqa: ARG002 (as peer memory)
        return self.room

    def exchange_halo(self, arena, slots, *, above, below, trial=False):  # noqa: ARG002 (as peer memory)
        self.swaps.append((slots.tolist(), above, below, trial))


def check_mailbox(rank, world_size):
    plan = uneven_plan(world_size)
    frames = paged(poisoned_buffer(picture(5, plan.rows, 4, 5, torch.float32), plan, rank))
    above, below = (rank - 1 if rank else None), (rank + 1 if rank + 1 < world_size else None)
    peer_memory = Recorder(2)
    edges = ShardEdges(plan, launch.group(), peer_memory)
    before = frames.arena.clone()
    edges.fill_halo(frames)
    edges.silent().fill_halo(frames)
    parts = [[10, 8], [6, 4], [2]] if world_size > 1 else []
    assert peer_memory.swaps == [(part, above, below, trial) for trial in (False, True) for part in parts]
    assert same_bits(frames.arena, before)
    assert edges.rows_sent == 5 * ((above is not None) + (below is not None))

    # What is too large for it goes as messages.
    too_small = ShardEdges(plan, launch.group(), Recorder(0))
    too_small.fill_halo(frames)
    messages = paged(poisoned_buffer(picture(5, plan.rows, 4, 5, torch.float32), plan, rank))
    ShardEdges(plan, launch.group()).fill_halo(messages)
    assert same_bits(frames.arena, messages.arena)


@pytest.mark.parametrize("size", [1, 3])
def test_rows_go_through_the_mailbox_in_parts_that_fit(ranks, size):
    ranks.run(check_mailbox, members=size)


class Copies(torch.overrides.TorchFunctionMode):
    """Counts what is copied."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.copy_, torch.Tensor.clone, torch.Tensor.contiguous, torch.clone, torch.cat):
            self.elements.append(args[0].numel() if isinstance(args[0], torch.Tensor) else -1)
        if function is torch.index_select:
            self.elements.append(kwargs["out"].numel())
        if function is torch.Tensor.index_copy_:
            self.elements.append(args[3].numel())
        return function(*args, **(kwargs or {}))


def check_copies(rank, world_size):
    plan = uneven_plan(world_size)
    edges = ShardEdges(plan, launch.group())
    whole = picture(2, plan.rows, 4, 3, torch.float32)
    buffer = poisoned_buffer(whole, plan, rank)
    frames = paged(buffer)
    exchanged = []
    real = dist.batch_isend_irecv

    def spy(operations):
        exchanged.extend((operation.op.__name__, operation.tensor.numel()) for operation in operations)
        return real(operations)

    dist.batch_isend_irecv = spy
    try:
        with Copies() as copies:
            edges.fill_halo(frames)
    finally:
        dist.batch_isend_irecv = real
    neighbours = (rank > 0) + (rank < world_size - 1)
    row = 2 * (4 + 2) * 3
    # Out to the send buffer, in from the receive buffer; only border rows, only for neighbours that are.
    assert copies.elements == [row] * 2 * neighbours
    assert sorted(exchanged) == sorted([("irecv", row), ("isend", row)] * neighbours)


@pytest.mark.parametrize("size", SIZES)
def test_an_outer_edge_copies_and_sends_nothing(ranks, size):
    ranks.run(check_copies, members=size)


def check_reuse(rank, world_size):
    plan = uneven_plan(world_size)
    edges = ShardEdges(plan, launch.group())

    def exchange(frames, columns, dtype):
        whole = picture(frames, plan.rows, columns, 3, dtype)
        buffer = poisoned_buffer(whole, plan, rank)
        buffer = fill_halo(edges, buffer)
        if rank > 0:
            assert torch.equal(buffer[:, 0, 1:-1], whole[:, plan.bounds[rank] - 1])
        if rank < world_size - 1:
            assert torch.equal(buffer[:, -1, 1:-1], whole[:, plan.bounds[rank + 1]])
        return {key: tensor.data_ptr() for key, tensor in edges._buffers.items()}, dict(edges._buffers)

    first, kept = exchange(3, 4, torch.float32)
    assert len(first) == 2 * ((rank > 0) + (rank < world_size - 1))  # out and in for each neighbour
    again, _ = exchange(3, 4, torch.float32)
    assert again == first
    for frames, columns, dtype in ((4, 4, torch.float32), (4, 5, torch.float32), (4, 5, torch.bfloat16)):
        _, now = exchange(frames, columns, dtype)
        # As long as the old ones are alive, new ones lie elsewhere.
        assert all(now[key] is not kept[key] for key in now)
        assert all(now[key].dtype == dtype and now[key].is_contiguous() for key in now)
        kept = now


def test_buffers_are_used_again_until_shape_or_dtype_change(ranks):
    ranks.run(check_reuse, members=3)


# Gathering.


def check_all_rows(rank, world_size, dtype, scale):
    plan = uneven_plan(world_size)
    edges = ShardEdges(plan, launch.group())
    whole = picture(2, plan.rows * scale, 4, 6, dtype)
    start, stop = (bound * scale for bound in plan.bounds[rank : rank + 2])
    own = whole[:, start:stop]
    arrangements = {
        "contiguous": own.contiguous(),
        # Keys among queries, keys and values, as one projection makes them.
        "slice of channels": torch.cat([own * 0, own, own + 1], dim=-1)[..., 6:12],
        "planar": own.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "columns first": own.transpose(1, 2).contiguous().transpose(1, 2),
        "within more rows": torch.nn.functional.pad(own, (0, 0, 0, 0, 3, 2), value=torch.nan)[:, 3:-2],
    }
    for name, arranged in arrangements.items():
        assert torch.equal(arranged, own), name
        before = arranged.clone()
        gathered = edges.all_rows(arranged)
        assert torch.equal(gathered, whole), name
        assert gathered.is_contiguous(), name
        assert torch.equal(arranged, before), name
    return edges.rows_sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_all_rows_of_uneven_shards_in_any_layout(ranks, size, scale, dtype):
    ranks.run(check_all_rows, dtype, scale, members=size)


# Groups.


@pytest.mark.parametrize("members", [(1, 2), (3, 4, 5), (1, 3, 5), (5,)])
def test_groups_need_not_begin_at_global_rank_0(ranks, members):
    ranks.run(check_halo, torch.float32, 1, members=members)
    ranks.run(check_all_rows, torch.float32, 1, members=members)
    ranks.run(check_own_rows, 6, 7, 2, members=members)


def check_spare_rank(rank, world_size, size):
    """The last rank of the group has no shard; the others exchange without it."""
    plan = uneven_plan(world_size - 1)
    if rank < plan.shards:
        check_edges(rank, plan, size)
        return ""
    with pytest.raises(ValueError, match="has no part") as raised:
        ShardEdges(plan, launch.group())
    return str(raised.value)


def check_edges(rank, plan, size):
    edges = ShardEdges(plan, launch.group())
    whole = picture(3, plan.rows, 4, size, torch.float32)
    buffer = poisoned_buffer(whole, plan, rank, 1)
    buffer = fill_halo(edges, buffer)
    if rank:
        assert torch.equal(buffer[:, 0, 1:-1], whole[:, plan.bounds[rank] - 1])
    assert torch.equal(edges.all_rows(whole[:, plan.bounds[rank] : plan.bounds[rank + 1]]), whole)


def test_a_group_may_have_ranks_without_a_shard(ranks):
    answers = ranks.run(check_spare_rank, 5, members=4)
    assert answers == ["", "", "", "rank 3 of 4 has no part in a plan of 3 shards"]


def check_refusal(rank, world_size):  # noqa: ARG001 (as the launcher calls it)
    with pytest.raises(ValueError, match="has no part") as raised:
        ShardEdges(uneven_plan(world_size + 1), launch.group())
    return str(raised.value)


def test_more_shards_than_ranks_are_refused_by_all(ranks):
    expected = [f"rank {rank} of 3 has no part in a plan of 4 shards" for rank in range(3)]
    assert ranks.run(check_refusal, members=3) == expected


# From shards to the rows that each writes.


def check_own_rows(rank, world_size, rows, columns, ratio):
    """Both axes; returns the row ranges of each."""
    ranges = []
    for transposed in (False, True):
        split, other = (columns, rows) if transposed else (rows, columns)
        bounds = tuple(split * shard // world_size for shard in range(world_size + 1))
        plan = ShardPlan(transposed=transposed, bounds=bounds, columns=other)
        whole = torch.randn((2, 3, rows * ratio, columns * ratio, 3), generator=torch.Generator().manual_seed(4)).to(
            launch.device()
        )
        start, stop = bounds[rank] * ratio, bounds[rank + 1] * ratio
        # Not contiguous, like frames cut out of more.
        shard = whole[:, :, :, start:stop] if transposed else whole[:, :, start:stop]
        own = to_own_rows(shard, plan, launch.group(), ratio)
        first, last = frame_rows(plan, rank, ratio)
        assert torch.equal(own, whole[:, :, first:last])
        assert own.is_contiguous()
        ranges.append((first, last))
    return ranges


@pytest.mark.parametrize(
    ("size", "rows", "columns", "ratio"),
    [
        (1, 3, 4, 8),
        (2, 3, 4, 8),  # an odd number of rows
        (3, 4, 5, 16),  # neither divides
        (5, 7, 6, 2),
        (5, 5, 5, 8),
        (3, 3, 3, 1),
    ],
)
def test_each_rank_gets_its_rows_of_the_frames(ranks, size, rows, columns, ratio):
    per_rank = ranks.run(check_own_rows, rows, columns, ratio, members=size)
    for axis in range(2):
        ranges = [both[axis] for both in per_rank]
        assert [0, *(last for _, last in ranges)] == [*(first for first, _ in ranges), rows * ratio]


def check_few_rows(rank, world_size, ratio):
    plan = plan_shards(1, world_size + 1, world_size)
    assert plan.transposed
    assert plan.shards == world_size
    whole = torch.randn((1, 2, ratio, (world_size + 1) * ratio, 3), generator=torch.Generator().manual_seed(4)).to(
        launch.device()
    )
    start, stop = plan.bounds[rank] * ratio, plan.bounds[rank + 1] * ratio
    own = to_own_rows(whole[:, :, :, start:stop], plan, launch.group(), ratio)
    first, last = frame_rows(plan, rank, ratio)
    assert torch.equal(own, whole[:, :, first:last])
    return last - first


@pytest.mark.parametrize(("size", "ratio"), [(5, 2), (6, 2), (3, 1), (6, 8)])
def test_one_latent_row_of_more_shards_than_frame_rows(ranks, size, ratio):
    heights = ranks.run(check_few_rows, ratio, members=size)
    assert sum(heights) == ratio
    pairs = ratio if ratio % 2 else ratio // 2
    assert (min(heights) == 0) == (size > pairs)
    assert ratio % 2 or not any(height % 2 for height in heights)


# The launcher itself: tests are worth nothing if it swallows a failure.


def check_failure(rank, world_size):  # noqa: ARG001 (as the launcher calls it)
    if rank == 1:
        raise ValueError("of rank 1")
    dist.barrier(launch.group())  # waits for the one that failed


def check_hang(rank, world_size):  # noqa: ARG001 (as the launcher calls it)
    if rank == 0:
        dist.recv(torch.zeros(1), src=1)


def check_rank(rank, world_size):
    return rank, world_size, dist.get_rank()


@pytest.mark.slow
def test_the_launcher_brings_back_what_ranks_return_and_raise(tmp_path):
    with launch.Ranks(2, tmp_path) as ranks:
        assert ranks.run(check_rank) == [(0, 2, 0), (1, 2, 1)]
        assert ranks.run(check_rank, members=[1]) == [(0, 1, 1)]
        with pytest.raises(launch.RankError, match=re.compile("rank 1:.*ValueError: of rank 1", re.DOTALL)):
            ranks.run(check_failure)
        with pytest.raises(launch.RankError, match=r"ranks \[0\] did not answer within 5 s"):
            ranks.run(check_hang, timeout=5)
