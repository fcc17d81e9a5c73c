"""Frames that wait on disk until others are there that go with them.

B videos, t frames of a step
"""

from __future__ import annotations

from typing import IO

import numpy
import torch


class WaitingFrames:
    """A file of frames that are written in steps of some lengths, and read in steps of others.

    Args:
        file: open for writing and reading; whoever opens it closes it.
        batch: B.
        total: frames of each video.
    """

    def __init__(self, file: IO[bytes], *, batch: int, total: int) -> None:
        self._file = file
        self._batch, self._total = batch, total
        self._shape: torch.Size = torch.Size()
        self._dtype = torch.uint8
        self._written = 0

    def write(self, frames: torch.Tensor) -> None:
        """Adds ``[B, t, ...]``, on the host.

        Raises:
            OSError: the disk is full.
        """
        self._shape, self._dtype = frames.shape[2:], frames.dtype
        for video, own in enumerate(frames):
            self._file.seek((video * self._total + self._written) * self._frame_bytes)
            self._file.write(own.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._written += frames.shape[1]
        self._file.flush()

    def read(self, start: int, count: int) -> torch.Tensor:
        """``[B, count, ...]`` from frame ``start`` on.

        Raises:
            OSError: they are not there.
        """
        videos = []
        for video in range(self._batch):
            self._file.seek((video * self._total + start) * self._frame_bytes)
            data = bytearray(self._file.read(count * self._frame_bytes))
            if len(data) != count * self._frame_bytes:
                raise OSError("the file of frames that wait has been cut short")
            bytes_of_it = torch.from_numpy(numpy.frombuffer(data, dtype=numpy.uint8))
            videos.append(bytes_of_it.view(self._dtype).view(count, *self._shape))
        return torch.stack(videos)

    @property
    def _frame_bytes(self) -> int:
        return self._shape.numel() * self._dtype.itemsize
