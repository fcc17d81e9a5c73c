"""Which frames of a video equal the one before them, found by looking at their pixels.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

import torch

from .host_bytes import equal_bits

# Rows and columns apart that are looked at first: two frames that differ mostly do so everywhere.
_SAMPLE_STEP = 16

Counted = tuple[torch.Tensor, tuple[int, ...]]


class RepeatCounter:
    """Counts, frame by frame, how many frames right before each equal it."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._count = 0

    def __call__(self, frames: torch.Tensor) -> tuple[int, ...]:
        """The counts of the next frames, ``[T, H, W, C]``; the last must stay as it is until those after it."""
        last, self._last = self._last, frames[-1:]
        if frames.is_cuda:
            return self.counts(_same_on_device(last, frames).tolist())
        return self.counts(_same(last, frames))

    def counts(self, same: Iterable[bool]) -> tuple[int, ...]:
        """The counts of the next frames, by whether each equals the one before it."""
        found = []
        for one in same:
            self._count = self._count + 1 if one else 0
            found.append(self._count)
        return tuple(found)


def counted(parts: Iterable[torch.Tensor]) -> Iterator[Counted]:
    """Frames ``[T, H, W, C]`` and their counts, part by part, as they come."""
    count = RepeatCounter()
    for part in parts:
        yield part, count(part)


def counted_ahead(parts: Iterable[torch.Tensor]) -> Iterator[Counted]:
    """`counted` of parts that are all there, while whoever asks for them works with those before."""
    given = list(parts)
    return _counted_at_once(given) if given and given[0].is_cuda else _counted_beside(given)


def _counted_at_once(parts: list[torch.Tensor]) -> Iterator[Counted]:
    """All are compared before the first is given away: each answer would wait for all that the device has to do."""
    before = [None, *(part[-1:] for part in parts)]
    same = torch.cat([_same_on_device(last, part) for last, part in zip(before, parts, strict=False)])
    count = RepeatCounter()
    flags = iter(same.tolist())
    for part in parts:
        yield part, count.counts([next(flags) for _ in part])


def _counted_beside(parts: list[torch.Tensor]) -> Iterator[Counted]:
    """A thread of its own compares frames."""
    found: queue.SimpleQueue[Counted | BaseException | None] = queue.SimpleQueue()
    over = threading.Event()

    def look() -> None:
        try:
            for one in counted(parts):
                found.put(one)
                if over.is_set():
                    return
            found.put(None)
        except BaseException as error:  # noqa: BLE001 (it is raised where it is waited for)
            found.put(error)

    thread = threading.Thread(target=look, daemon=True, name="wan-vae-parallel repeats")
    thread.start()
    try:
        while (one := found.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:
        over.set()
        thread.join()


def _same(last: torch.Tensor | None, frames: torch.Tensor) -> list[bool]:
    """Whether each of ``frames`` on the host equals the one before it; the first of all equals none."""
    found = []
    before = None if last is None else last[0]
    for frame in frames:
        found.append(before is not None and _equal(before, frame))
        before = frame
    return found


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    sample = one[::_SAMPLE_STEP, ::_SAMPLE_STEP], other[::_SAMPLE_STEP, ::_SAMPLE_STEP]
    return torch.equal(*sample) and equal_bits(one, other)


def _same_on_device(last: torch.Tensor | None, frames: torch.Tensor) -> torch.Tensor:
    """The same of frames on a GPU, there."""
    pairs = (frames[:1] if last is None else last, frames[:1]), (frames[:-1], frames[1:])
    same = torch.cat([(one == other).flatten(1).all(dim=1) for one, other in pairs])
    if last is None:
        same[0] = False
    return same
