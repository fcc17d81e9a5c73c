"""What a video takes along through a model: pages of frames for convolutions, past ones too, and its edges.

T frames of this step, H rows of this shard, W columns, C channels, S slots of an arena
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..cancel import look_whether_cancelled


class PageKey(NamedTuple):
    """What frames must have in common to share an arena.

    Attributes:
        scale: rows (and columns) per latent row.
        channels: C.
        border: rows and columns of zeros, or of a neighbour's values, around the picture.
    """

    scale: int
    channels: int
    border: int


@dataclass(frozen=True)
class PageNeed:
    """How many slots an arena needs.

    Attributes:
        convs: convolutions that keep past frames in it.
        kept: for past frames, of each video.
        passing: for frames within a step.
        waiting: for frames between two stages, of each video but the one whose step it is.
    """

    convs: int = 0
    kept: int = 0
    passing: int = 0
    waiting: int = 0

    def __or__(self, other: PageNeed) -> PageNeed:
        """Both: what is kept adds up, the rest takes turns."""
        return PageNeed(
            convs=self.convs + other.convs,
            kept=self.kept + other.kept,
            passing=max(self.passing, other.passing),
            waiting=max(self.waiting, other.waiting),
        )

    def slots(self, videos: int, *, keeps: bool) -> int:
        """All slots for so many videos that take turns; images keep nothing.

        The blank frame that stands for a missing past has the place of a past frame that is not there yet.
        """
        past = videos * self.kept if keeps else 0
        return past + self.passing + (videos - 1) * self.waiting


class SlotLists:
    """Lists of slots on a device. The same ones come with every video of a size, so they are kept there.

    Args:
        device: where.
    """

    MOST = 4096

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lists: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, slots: tuple[int, ...]) -> torch.Tensor:
        """``slots`` as int32 on the device."""
        cuda = self._device.type == "cuda"
        # A list is there for the stream that it was copied on.
        key = torch.cuda.current_stream(self._device).cuda_stream if cuda else 0, slots
        found = self._lists.get(key)
        if found is None:
            if len(self._lists) >= self.MOST:
                self._lists.clear()
            # From page-locked memory and without waiting: else the device would run dry at each new list.
            listed = torch.tensor(slots, dtype=torch.int32, device="cpu", pin_memory=cuda)
            found = listed.to(self._device, non_blocking=True)
            self._lists[key] = found
        return found


class Pages:
    """An arena of frames of one size; a frame lies in a slot of it and never moves.

    Outer borders are zero and stay so, since producers write only what lies inside and halos only rows that
    neighbours own. Slot 0 is zero altogether, the past of a video that has none, until every convolution has
    another past.

    Args:
        slots: how many.
        rows: H.
        columns: W.
        key: the rest of a frame's size.
        users: convolutions, times videos, that begin with a blank past.
        dtype: of the values.
        device: where.
        lists: of slots, on ``device``.
    """

    def __init__(
        self,
        slots: int,
        rows: int,
        columns: int,
        key: PageKey,
        *,
        users: int,
        dtype: torch.dtype,
        device: torch.device,
        lists: SlotLists,
    ) -> None:
        border = key.border
        self.arena = torch.zeros(
            (slots, rows + 2 * border, columns + 2 * border, key.channels), dtype=dtype, device=device
        )
        self._users = users
        self.lists = lists
        self._begin()

    def reset(self) -> None:
        """As at the beginning, for another video; nobody may have frames of it any more."""
        self.arena[0].zero_()
        self._begin()

    def take(self, count: int) -> Frames:
        """Slots for ``count`` frames; what lies in them is old."""
        assert len(self._free) >= count, "an arena was made too small"
        return Frames(self, tuple(self._free.pop() for _ in range(count)))

    def give(self, slots: Sequence[int]) -> None:
        """Takes slots back that nobody will read any more."""
        self._free.extend(slot for slot in slots if slot or not self._need_blank)

    def leave_blank(self) -> None:
        """Says that one more convolution has no blank frame in its past; after the last one there is none at all."""
        self._need_blank -= 1
        if not self._need_blank:
            self._free.append(0)

    def _begin(self) -> None:
        self._need_blank = self._users
        self._free = list(range(len(self.arena) - 1, 0 if self._users else -1, -1))


def make_pages(
    needs: Mapping[PageKey, PageNeed],
    rows: int,
    columns: int,
    *,
    videos: int,
    keeps: bool,
    dtype: torch.dtype,
    device: torch.device,
    lists: SlotLists | None = None,
) -> dict[PageKey, Pages]:
    """What ``needs`` says.

    Args:
        needs: of a model.
        rows: latent rows of this shard.
        columns: latent columns.
        videos: that take turns.
        keeps: whether past frames will be wanted.
        dtype: of the values.
        device: where.
        lists: those of earlier pages, which save time.
    """
    lists = lists or SlotLists(device)
    return {
        key: Pages(
            need.slots(videos, keeps=keeps),
            rows * key.scale,
            columns * key.scale,
            key,
            users=videos * need.convs,
            dtype=dtype,
            device=device,
            lists=lists,
        )
        for key, need in needs.items()
    }


@dataclass(frozen=True)
class Frames:
    """Frames in slots of an arena."""

    pages: Pages
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def arena(self) -> torch.Tensor:
        """``[S, H + 2 * border, W + 2 * border, C]``."""
        return self.pages.arena

    @property
    def index(self) -> torch.Tensor:
        """The slots on the device, ``[T]`` int32."""
        return self.pages.lists(self.slots)

    def split(self, count: int) -> list[Frames]:
        """Parts of at most ``count`` frames."""
        return [Frames(self.pages, self.slots[i : i + count]) for i in range(0, len(self.slots), count)]


class Edges(Protocol):
    """All that the model asks of the world outside its rows."""

    def fill_halo(self, frames: Frames, *, below_only: bool = False) -> None:
        """Fills the border rows of ``frames``, whose border is 1, with the neighbours' rows.

        What no neighbour owns lies outside the picture and stays zero.

        Args:
            frames: their inside is written.
            below_only: the row above will not be read.
        """
        ...

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        """Takes this shard's ``[T, H, W, C]``, of any strides, and returns the whole picture's."""
        ...

    def silent(self) -> Edges:
        """The same for a trial: nobody is asked for anything, and what would have come is not initialised."""
        ...


class WholePicture:
    """The edges of a picture that one device holds whole: zeros outside, nothing to gather.

    Nobody else waits for what a step computes, so where it is cancelled it ends at its next layer.
    """

    def fill_halo(self, frames: Frames, *, below_only: bool = False) -> None:  # noqa: ARG002 (there is none to fill)
        look_whether_cancelled()

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        return shard

    def silent(self) -> WholePicture:
        return self


class StreamState:
    """One video on its way through a model, between its steps.

    Attributes:
        edges: who knows the rows beyond this shard.
        transposed: whether rows and columns of the video have changed places.
        first: whether this step holds the video's first frame, and first latent frame (which stand alone).
        image: whether there is one frame, or several images that know nothing of one another.
        past_pixels: ``[T, H', W', C]``, the last that an encoder saw; None before its first step.
    """

    def __init__(
        self,
        pages: Mapping[PageKey, Pages],
        *,
        edges: Edges,
        transposed: bool = False,
        keeps: bool = True,
    ) -> None:
        """Begins a video.

        Args:
            pages: by what the model's ``page_needs`` names; videos that take turns may share them.
            edges: see above.
            transposed: see above.
            keeps: whether past frames will be wanted: images have neither future nor past.
        """
        self.edges = edges
        self.transposed = transposed
        self.first = True
        self.image = not keeps
        self.past_pixels: torch.Tensor | None = None
        self._pages = pages
        self._past: dict[Hashable, Frames] = {}
        # Convolutions whose past is still a blank one, or partly.
        self._blank: set[Hashable] = set()

    def take(self, key: PageKey, count: int) -> Frames:
        """Slots for ``count`` frames."""
        return self._pages[key].take(count)

    def with_past(self, conv: Hashable, frames: Frames, past: int) -> Frames:
        """``frames`` behind the ``past`` ones that ``conv`` saw last; blank ones if it saw none."""
        if not past:
            return frames
        if conv not in self._past:
            self._blank.add(conv)
            return Frames(frames.pages, (0,) * past + frames.slots)
        return Frames(frames.pages, self._past[conv].slots + frames.slots)

    def keep_past(self, conv: Hashable, seen: Frames, past: int) -> None:
        """Keeps the last ``past`` of what ``conv`` saw for its next step, and lets go of the others."""
        gone = len(seen) if self.image else len(seen) - past
        seen.pages.give(seen.slots[:gone])
        if self.image or not past:
            return
        self._past[conv] = Frames(seen.pages, seen.slots[gone:])
        if conv in self._blank and 0 not in seen.slots[gone:]:
            self._blank.discard(conv)
            seen.pages.leave_blank()
