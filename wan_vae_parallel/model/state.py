"""What a decode carries along: feature caches, the buffer that convolutions read, and the picture's edges.

T frames of this step, H rows of this shard, W columns, C channels
"""

from __future__ import annotations

from typing import Protocol

import torch


class Edges(Protocol):
    """All that the model asks of the world outside its rows."""

    def fill_halo(self, buffer: torch.Tensor) -> None:
        """Fills the border rows of ``buffer`` ``[T, H + 2, W + 2, C]`` with the neighbours' rows.

        What no neighbour owns lies outside the picture and stays zero.
        """
        ...

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        """Takes this shard's ``[T, H, W, C]``, of any strides, and returns the whole picture's."""
        ...


class WholePicture:
    """The edges of a picture that one device holds whole: zeros outside, nothing to gather."""

    def fill_halo(self, buffer: torch.Tensor) -> None:
        pass

    def all_rows(self, shard: torch.Tensor) -> torch.Tensor:
        return shard


class Workspace:
    """The one buffer that a convolution's input is written into, reused by all of them.

    At any time just one convolution's input is alive, so all share the memory. Borders are zeroed when the shape
    changes, and stay zero, since producers write only the interior and halos only rows that neighbours own.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._storage = torch.empty(0, dtype=dtype, device=device)
        self._zeroed: tuple[int, int, int, int] | None = None  # padded rows and columns, channels, frames

    def take(self, frames: int, rows: int, columns: int, channels: int, *, border: int) -> torch.Tensor:
        """A contiguous ``[frames, rows + 2 * border, columns + 2 * border, channels]`` with zeros in its border.

        It is valid until the next call; its interior holds whatever was there.
        """
        rows, columns = rows + 2 * border, columns + 2 * border
        elements = frames * rows * columns * channels
        if elements > self._storage.numel():
            dtype, device = self._storage.dtype, self._storage.device
            del self._storage  # before the new one is asked for: both need not fit
            self._storage = torch.empty(0, dtype=dtype, device=device)
            self._zeroed = None
            self._storage = torch.empty(elements, dtype=dtype, device=device)
        buffer = self._storage[:elements].view(frames, rows, columns, channels)
        if border and self._zeroed != (rows, columns, channels, frames):
            buffer[:, :border].zero_()
            buffer[:, -border:].zero_()
            buffer[:, :, :border].zero_()
            buffer[:, :, -border:].zero_()
        self._zeroed = (rows, columns, channels, frames) if border else None
        return buffer


class DecodeState:
    """One video's decode, between its steps.

    Attributes:
        edges: who knows the rows beyond this shard.
        workspace: the convolutions' shared input buffer.
        first: whether this step holds the video's first latent frame (which stands alone).
        last: whether nothing follows this step, so that no feature cache needs to be kept.
        transposed: whether rows and columns of the video (and of the kernels) have changed places.
    """

    def __init__(self, *, edges: Edges, workspace: Workspace, transposed: bool = False) -> None:
        self.edges = edges
        self.workspace = workspace
        self.transposed = transposed
        self.first = True
        self.last = False
        self._past: dict[torch.nn.Module, torch.Tensor] = {}

    def load_past(self, conv: torch.nn.Module, past: torch.Tensor) -> None:
        """Puts the frames that ``conv`` saw last into ``past``; zeros if it saw none."""
        cached = self._past.get(conv)
        if cached is None:
            past.zero_()
        else:
            past.copy_(cached)

    def keep_past(self, conv: torch.nn.Module, past: torch.Tensor) -> None:
        """Keeps a copy of the frames that ``conv`` will want to have seen next time."""
        if self.last:
            self._past.pop(conv, None)
            return
        cached = self._past.get(conv)
        if cached is None:
            self._past[conv] = past.clone()
        else:
            cached.copy_(past)
