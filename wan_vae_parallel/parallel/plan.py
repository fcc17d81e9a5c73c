"""Shard arithmetic: which rows of the latent belong to which rank.

Every rank computes the same plan from the latent's size alone; no collective ever carries a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """A split of latents into runs of neighbouring rows, one a rank.

    Attributes:
        transposed: the split runs along the columns: the video is transposed, and "rows" means its columns.
        bounds: shard r has the latent rows ``bounds[r]`` to ``bounds[r + 1]``; every shard has at least one.
        columns: latent columns (of the transposed video, if it is).
    """

    transposed: bool
    bounds: tuple[int, ...]
    columns: int

    def __post_init__(self) -> None:
        heights = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        if self.bounds[:1] != (0,) or not heights or min(heights) < 1 or self.columns < 1:
            raise ValueError(f"bounds are {self.bounds} with {self.columns} columns; they must rise from 0")

    @property
    def shards(self) -> int:
        """Number of ranks that have rows."""
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        """Latent rows of the whole video (transposed, if it is)."""
        return self.bounds[-1]

    def height(self, shard: int) -> int:
        """Latent rows of ``shard``."""
        return self.bounds[shard + 1] - self.bounds[shard]

    @property
    def tallest(self) -> int:
        """Latent rows of the largest shard."""
        return max(self.height(shard) for shard in range(self.shards))


def describe_plan(plan: ShardPlan, devices: Sequence[object]) -> str:
    """Who has what, for a log: ``"cuda:0: columns 0-79, cuda:1: columns 80-159"``."""
    axis = "columns" if plan.transposed else "rows"
    parts = [
        f"{device}: {axis} {plan.bounds[shard]}-{plan.bounds[shard + 1] - 1}"
        for shard, device in enumerate(devices[: plan.shards])
    ]
    idle = len(devices) - plan.shards
    unused = f"; {idle} of {len(devices)} devices not used, for want of latent {axis}" if idle else ""
    return ", ".join(parts) + unused


def plan_shards(rows: int, columns: int, ranks: int) -> ShardPlan:
    """Splits latents of ``rows`` x ``columns`` over at most ``ranks`` ranks.

    The split runs along the axis whose largest shard is the smaller share of the video; along the rows if both are
    alike. Heights differ by one row at most. More ranks than rows means that fewer are used.

    Args:
        rows: >= 1.
        columns: >= 1.
        ranks: >= 1.
    """
    if min(rows, columns, ranks) < 1:
        raise ValueError(f"can't split {rows}x{columns} over {ranks} ranks; each must be at least 1")
    by_rows, by_columns = min(ranks, rows), min(ranks, columns)
    # ceil(rows / n) / rows against ceil(columns / m) / columns, without fractions
    transposed = -(-columns // by_columns) * rows < -(-rows // by_rows) * columns
    split, other, shards = (columns, rows, by_columns) if transposed else (rows, columns, by_rows)
    bounds = tuple(split * shard // shards for shard in range(shards + 1))
    return ShardPlan(transposed=transposed, bounds=bounds, columns=other)
