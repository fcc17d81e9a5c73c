"""Shard arithmetic: pure, so exhaustive over small sizes."""

from __future__ import annotations

import itertools

import pytest

from wan_vae_parallel.parallel.plan import ShardPlan, plan_shards

SIZES = list(itertools.product(range(1, 13), range(1, 13), range(1, 10)))


@pytest.mark.parametrize("swapped", [False, True])
def test_shards_cover_the_rows_once_evenly_and_none_is_empty(swapped):
    for rows, columns, ranks in SIZES:
        plan = plan_shards(columns, rows, ranks) if swapped else plan_shards(rows, columns, ranks)
        heights = [plan.height(shard) for shard in range(plan.shards)]
        assert plan.bounds[0] == 0
        assert list(itertools.accumulate(heights)) == list(plan.bounds[1:])
        assert min(heights) >= 1
        assert max(heights) - min(heights) <= 1
        assert plan.tallest == max(heights)
        assert plan.shards <= ranks
        # The video's own size, or its transpose's.
        size = (plan.columns, plan.rows) if plan.transposed else (plan.rows, plan.columns)
        assert size == ((columns, rows) if swapped else (rows, columns))


def test_the_split_runs_along_the_axis_whose_largest_shard_is_smaller():
    for rows, columns, ranks in SIZES:
        plan = plan_shards(rows, columns, ranks)
        largest = plan.tallest * plan.columns
        shards = min(ranks, plan.columns)
        rival = -(-plan.columns // shards) * plan.rows
        assert largest <= rival, (rows, columns, ranks)
        if largest == rival:
            assert not plan.transposed


def test_swapping_rows_and_columns_swaps_the_axis_unless_both_are_alike():
    for rows, columns, ranks in SIZES:
        plan, other = plan_shards(rows, columns, ranks), plan_shards(columns, rows, ranks)
        if plan.transposed or other.transposed:
            assert plan.transposed != other.transposed
            assert plan.bounds == other.bounds


@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "transposed", "heights"),
    [
        (90, 160, 1, False, [90]),
        (90, 160, 2, False, [45, 45]),  # both axes divide: rows
        (90, 160, 4, True, [40, 40, 40, 40]),  # 720p: columns divide, rows don't
        (90, 160, 8, True, [20] * 8),
        (60, 104, 4, False, [15, 15, 15, 15]),  # 480p
        (60, 104, 8, True, [13] * 8),
        (60, 104, 7, True, [14, 15, 15, 15, 15, 15, 15]),  # neither divides
        (160, 90, 4, False, [40, 40, 40, 40]),  # upright 720p
        (3, 2, 5, False, [1, 1, 1]),  # more ranks than rows or columns
        (2, 3, 5, True, [1, 1, 1]),
        (1, 7, 3, True, [2, 2, 3]),  # one row
        (1, 1, 4, False, [1]),
    ],
)
def test_plans_of_sizes_that_matter(rows, columns, ranks, transposed, heights):
    plan = plan_shards(rows, columns, ranks)
    assert plan.transposed == transposed
    assert sorted(plan.height(shard) for shard in range(plan.shards)) == heights


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ranks", [5, 6, 7, 8])
@pytest.mark.parametrize("size", [(90, 160), (60, 104), (68, 120), (135, 240)])  # 720p, 480p, 544p, 1080p
def test_up_to_eight_ranks_have_hardly_more_than_their_share(size, ranks, turned):
    rows, columns = reversed(size) if turned else size
    plan = plan_shards(rows, columns, ranks)
    assert plan.shards == ranks
    assert (plan.rows, plan.columns) == ((columns, rows) if plan.transposed else (rows, columns))
    # The worst of all: 68 rows on seven, whose largest shards have ten.
    assert plan.tallest / plan.rows <= 1.03 / ranks
    # The other axis would not do better.
    assert plan.tallest / plan.rows <= min(-(-side // ranks) / side for side in (rows, columns))


@pytest.mark.parametrize("size", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 4, 2)])
def test_nothing_can_not_be_split(size):
    with pytest.raises(ValueError, match="each must be at least 1"):
        plan_shards(*size)


@pytest.mark.parametrize(
    ("bounds", "columns"),
    [
        ((), 4),
        ((0,), 4),  # no shard
        ((1, 3), 4),  # does not begin at the first row
        ((0, 2, 2), 4),  # an empty shard
        ((0, 3, 2), 4),  # falls
        ((0, 2, 4), 0),
    ],
)
def test_bounds_that_do_not_rise_from_zero_are_refused(bounds, columns):
    with pytest.raises(ValueError, match="they must rise from 0"):
        ShardPlan(transposed=False, bounds=bounds, columns=columns)


def test_a_plan_can_not_be_changed():
    plan = plan_shards(4, 4, 2)
    with pytest.raises(AttributeError):
        plan.columns = 5
