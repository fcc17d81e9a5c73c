"""Videos that are to be encoded: tensors, or frames that come one after the other.

B videos, T frames, H x W pixels, C colours
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from ..architecture import Architecture
from .pieces import blocks, whole_groups


class Source(Protocol):
    """Videos of one size.

    Attributes:
        videos: B.
        frames: T; None if it is not known.
        height: H.
        width: W.
        colours: C.
        dtype: of the pixels.
        rows: latent rows that they encode to.
        columns: latent columns.
        channels: latent channels.
        again: whether a video can be read a second time.
        image: whether the frames are pictures that know nothing of one another.
    """

    videos: int
    frames: int | None
    height: int
    width: int
    colours: int
    dtype: torch.dtype
    rows: int
    columns: int
    channels: int
    again: bool
    image: bool

    def blocks(self, video: int, most: int) -> Iterator[torch.Tensor]:
        """``[t, H, W, C]`` from the video's beginning on: its first frame, then at most ``most`` at a time.

        Of pictures ``most`` at a time.
        """
        ...

    def facts(self) -> dict[str, str]:
        """What ranks that encode together must have in common, as far as it is known."""
        ...


class TensorSource:
    """Videos in a tensor.

    Args:
        frames: ``[B, T, H, W, C]``, one frame or a multiple of four more; of pictures B is 1, and T any number.
        architecture: of the VAE that they are for.
        pictures: the frames know nothing of one another.
    """

    again = True

    def __init__(self, frames: torch.Tensor, architecture: Architecture, *, pictures: bool = False) -> None:
        self._frames = frames
        self.image = pictures or frames.shape[1] == 1
        self.frames: int | None
        self.videos, self.frames, self.height, self.width, self.colours = frames.shape
        self.dtype = frames.dtype
        self.rows, self.columns = architecture.latent_size(self.height, self.width)
        self.channels = architecture.z_dim

    def blocks(self, video: int, most: int) -> Iterator[torch.Tensor]:
        return iter(self._frames[video].split(most)) if self.image else blocks(self._frames[video], most)

    def facts(self) -> dict[str, str]:
        return _facts(self)


class StreamSource:
    """One video whose frames come one after the other, however many.

    Args:
        first: ``[t, H, W, C]``, the first of them.
        others: those behind, of the same size.
        architecture: of the VAE that they are for.
    """

    videos = 1
    frames: int | None = None
    again = False
    image = False

    def __init__(self, first: torch.Tensor, others: Iterable[torch.Tensor], architecture: Architecture) -> None:
        self._first: torch.Tensor | None = first
        self._others = others
        self._ratio = architecture.temporal_ratio
        self.height, self.width, self.colours = first.shape[1:]
        self.dtype = first.dtype
        self.rows, self.columns = architecture.latent_size(self.height, self.width)
        self.channels = architecture.z_dim

    def blocks(self, video: int, most: int) -> Iterator[torch.Tensor]:  # noqa: ARG002 (there is one)
        return whole_groups(self._all(), most, self._ratio)

    def facts(self) -> dict[str, str]:
        return _facts(self)

    def _all(self) -> Iterator[torch.Tensor]:
        first, self._first = self._first, None
        assert first is not None, "a stream is read once"
        yield first
        del first
        yield from self._others


def _facts(source: Source) -> dict[str, str]:
    return {name: str(getattr(source, name)) for name in ("videos", "frames", "height", "width", "dtype", "image")}
