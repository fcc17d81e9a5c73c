"""What waits in front of an encoder's stages: frames, of which those that repeat are known by a number alone.

T frames, H rows of this shard, W columns, C channels

Frames that equal the one before them are not computed again. Each frame comes with a count: how many frames right
before it equal it. A causal convolution over three frames gives equal results where its three inputs are, so a count
falls by two in it; a stage of D of them has nothing new to compute from a count of 2 D + 1 on. What a stage makes of a
frame has a tensor if its count is 0, and is known already if not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.shortcut import add_averaged
from .layers import TimeDownConv
from .state import Frames, StreamState


@dataclass(frozen=True)
class Piece:
    """Frames that follow those of the piece before.

    Attributes:
        frames: ``[n, ...]``, those of them that differ from the one before; None if none does.
        counts: of each frame, how many right before it equal it; n of these are 0.
    """

    frames: torch.Tensor | None
    counts: tuple[int, ...]


class Line:
    """Frames that wait in front of a stage.

    Args:
        depth: convolutions over three frames that the stage makes of each.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._waiting: deque[tuple[torch.Tensor | None, int, int]] = deque()
        self._last: torch.Tensor | None = None

    def put(self, piece: Piece) -> None:
        """Has the frames of ``piece`` wait behind those that do."""
        index = 0
        for count in piece.counts:
            if count:
                self._waiting.append((None, 0, count))
            else:
                self._waiting.append((piece.frames, index, 0))
                index += 1

    @property
    def waits(self) -> bool:
        """Whether any frame waits, new or repeated."""
        return bool(self._waiting)

    @property
    def known(self) -> bool:
        """Whether the next frame is one that the stage needs not compute."""
        return bool(self._waiting) and self._waiting[0][2] > 2 * self._depth

    def ready(self, most: int) -> int:
        """How many frames there are for the stage to compute, counted up to ``most``.

        Those in front of a known one count as so many: there will not be more of them.
        """
        found = 0
        for _, _, count in self._waiting:
            if count > 2 * self._depth:
                return most if found else 0
            found += 1
            if found == most:
                break
        return found

    def take(self, most: int) -> Piece:
        """Takes frames out that the stage is to compute, at most so many; or those that it needs not, if they are next.

        Returns:
            The frames to compute (whether new or repeated), which are the caller's to write over; and the counts of
            all that were taken, as they come in.
        """
        sources: list[tuple[torch.Tensor, int]] = []
        counts = []
        last = None if self._last is None else (self._last, 0)
        known = self.known
        while self._waiting and self.known == known and len(sources) < most:
            tensor, index, count = self._waiting[0]
            self._waiting.popleft()
            last = last if tensor is None else (tensor, index)
            counts.append(count)
            if not known:
                assert last is not None, "a video's first frame equals none before it"
                sources.append(last)
        frames = gathered(sources) if sources else None
        if frames is not None and self._last is not None and frames.data_ptr() == self._last.data_ptr():
            frames = frames.clone()  # which is to stay as it is
        if last is not None:
            # The stage writes over what it gets, and the next frame may equal it.
            tensor, index = last
            if tensor is not self._last:
                self._last = tensor[index : index + 1].clone()
        return Piece(frames, tuple(counts))


def gathered(sources: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Frames of one tensor or several, one after the other; a view where they lie so already."""
    runs: list[list[Any]] = []
    for tensor, index in sources:
        if runs and runs[-1][0] is tensor and runs[-1][2] == index:
            runs[-1][2] += 1
        else:
            runs.append([tensor, index, index + 1])
    parts = [tensor[start:stop] for tensor, start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Join:
    """Frames that wait for their other half in front of a time convolution, with what a shortcut adds to the result.

    Args:
        conv: the convolution.
        shortcut: whether there is one.
    """

    def __init__(self, conv: TimeDownConv, *, shortcut: bool) -> None:
        self._conv = conv
        self._shortcut = shortcut
        # The first of two, if it has come: its place, unless it equals the frame before, and what the stage got.
        self._first_half: tuple[Frames | None, tuple[torch.Tensor, int] | None] | None = None
        # The last frame that differed from the one before it.
        self._newest: Frames | None = None
        self._source: tuple[torch.Tensor, int] | None = None
        # To be convolved together; and the counts of results so far.
        self._places: list[Frames] = []
        self._sources: list[tuple[torch.Tensor, int]] = []
        self._made: list[int] = []

    def begin(self, frames: Frames, source: torch.Tensor, state: StreamState) -> torch.Tensor:
        """The video's first frame, or images, each of which makes one alone: ``[n, H, W, C]``."""
        alone = frames.arena.index_select(0, frames.index)
        self._newest, self._source = frames, (source, 0) if self._shortcut else None
        self._conv.begin(frames, state)
        if self._shortcut:
            for one, out in zip(source.split(1), alone.split(1), strict=True):
                add_averaged(one, time_factor=2, transposed=state.transposed, out=out)
        return alone

    def put(
        self, frames: Frames | None, source: torch.Tensor | None, counts: Sequence[int], state: StreamState
    ) -> Iterator[Piece]:
        """Makes one frame of each two.

        Args:
            frames: those whose count is 0.
            source: what the stage got for these, ``[n, 2H, 2W, C]``.
            counts: of all.
            state: the video's.
        """
        places = iter(frames.split(1) if frames else ())
        index = 0
        for count in counts:
            place, before = None, self._newest
            if count == 0:
                place = self._newest = next(places)
                if self._shortcut:
                    assert source is not None, "frames come with what they were made of"
                    self._source = source, index
                index += 1
            if self._first_half is None:
                self._first_half = place, self._source
                continue
            first, first_source = self._first_half
            self._first_half = None
            # One of two equals the one before it where its three inputs do.
            self._made.append(max(0, count // 2 - 1))
            if self._made[-1]:
                continue
            copied = first is None or place is None
            self._places += [first or self._copy(before, state), place or self._copy(self._newest, state)]
            if self._shortcut:
                assert first_source is not None
                assert self._source is not None
                self._sources += [first_source, self._source]
            if copied:
                yield from self._convolved(state)
        yield from self._convolved(state)

    def _copy(self, frame: Frames | None, state: StreamState) -> Frames:
        """``frame`` in a place of its own: each place is given back once."""
        assert frame is not None, "a video's first frame equals none before it"
        copy = self._conv.take(1, state)
        copy.arena[copy.slots[0]].copy_(frame.arena[frame.slots[0]])
        return copy

    def _convolved(self, state: StreamState) -> Iterator[Piece]:
        made, self._made = tuple(self._made), []
        if not made:
            return
        if not self._places:
            yield Piece(None, made)
            return
        places, self._places = self._places, []
        frames = Frames(places[-1].pages, tuple(slot for place in places for slot in place.slots))
        joined = self._conv(frames, state)
        if self._shortcut:
            sources, self._sources = self._sources, []
            add_averaged(gathered(sources), time_factor=2, transposed=state.transposed, out=joined)
        if self._first_half is None or self._first_half[0] is None:
            # The last place is the one that is kept; the others may be given to other frames now.
            self._newest = places[-1]
        yield Piece(joined, made)
