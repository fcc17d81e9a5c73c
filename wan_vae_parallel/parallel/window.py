"""Which pixels a shard reads of a picture that is to be encoded.

h x w latent rows and columns, H x W pixels
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.pixels import Margins
from .plan import ShardPlan


@dataclass(frozen=True, kw_only=True)
class PixelWindow:
    """A shard's part of the picture, with a margin where a neighbour's part begins.

    The first convolution sees one position around its own, whose pixels are at hand, so that no one has to send them.

    Attributes:
        top: first pixel row.
        bottom: last pixel row, exclusive.
        left: first pixel column.
        right: last pixel column, exclusive.
        margins: which of its rows and columns of positions are the neighbours'.
        rows: latent rows of the shard; if transposed, columns of the picture.
        columns: latent columns of the shard; if transposed, rows of the picture.
        transposed: the split runs along the columns.
    """

    top: int
    bottom: int
    left: int
    right: int
    margins: Margins
    rows: int
    columns: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Pixel rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @classmethod
    def of(cls, plan: ShardPlan, shard: int, *, ratio: int, patch: int) -> PixelWindow:
        """The window of ``shard``.

        Args:
            plan: the split of the latents.
            shard: whose.
            ratio: pixel rows (and columns) per latent row.
            patch: pixel rows (and columns) of a position.
        """
        before, after = int(shard > 0), int(shard + 1 < plan.shards)
        start = plan.bounds[shard] * ratio - before * patch
        stop = plan.bounds[shard + 1] * ratio + after * patch
        others = plan.columns * ratio
        if plan.transposed:
            margins = Margins(left=before, right=after)
            top, bottom, left, right = 0, others, start, stop
        else:
            margins = Margins(top=before, bottom=after)
            top, bottom, left, right = start, stop, 0, others
        return cls(
            top=top,
            bottom=bottom,
            left=left,
            right=right,
            margins=margins,
            rows=plan.height(shard),
            columns=plan.columns,
            transposed=plan.transposed,
        )
