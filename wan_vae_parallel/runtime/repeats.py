"""Which frames of a video equal the one before them, found by looking at their pixels.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

import torch

from .host_bytes import equal_bits

# Rows and columns apart that are looked at first: two frames that differ mostly do so everywhere.
_SAMPLE_STEP = 16


class RepeatCounter:
    """Counts, frame by frame, how many frames right before each equal it."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._count = 0

    def __call__(self, frames: torch.Tensor) -> tuple[int, ...]:
        """The counts of the next frames, ``[T, H, W, C]``; the last must stay as it is until those after it."""
        before = frames[:1] if self._last is None else self._last
        counts = []
        for i, same in enumerate(_same(torch.cat([before, frames[:-1]]) if frames.is_cuda else before, frames)):
            self._count = self._count + 1 if same and (i or self._last is not None) else 0
            counts.append(self._count)
        self._last = frames[-1:]
        return tuple(counts)


def _same(before: torch.Tensor, frames: torch.Tensor) -> list[bool]:
    """Whether each of ``frames`` equals the one before it."""
    if frames.is_cuda:
        return (before == frames).flatten(1).all(dim=1).tolist()  # one wait for the device
    found = []
    last = before[0]
    for frame in frames:
        sample = last[::_SAMPLE_STEP, ::_SAMPLE_STEP], frame[::_SAMPLE_STEP, ::_SAMPLE_STEP]
        found.append(last is frame or (torch.equal(*sample) and equal_bits(last, frame)))
        last = frame
    return found
