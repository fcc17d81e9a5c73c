"""Which frames of a video equal the one before them, found by looking at their pixels.

H x W pixels, C colours
"""

from __future__ import annotations

import torch

# Rows and columns apart that are looked at first: two frames that differ mostly do so everywhere.
_SAMPLE_STEP = 16


class RepeatCounter:
    """Counts, frame by frame, how many frames right before each equal it."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._count = 0

    def __call__(self, frame: torch.Tensor) -> int:
        """The count of the next frame, ``[H, W, C]``, which must stay as it is until the one after it."""
        last = self._last
        same = (
            last is not None
            and last.shape == frame.shape
            and torch.equal(last[::_SAMPLE_STEP, ::_SAMPLE_STEP], frame[::_SAMPLE_STEP, ::_SAMPLE_STEP])
            and torch.equal(last, frame)
        )
        self._count = self._count + 1 if same else 0
        if not same:
            self._last = frame
        return self._count
