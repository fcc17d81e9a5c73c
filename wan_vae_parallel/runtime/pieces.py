"""A video's frames in pieces for the encoder, with what is known of repeats.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..model.encoder import Piece
from .repeats import RepeatCounter

# Frames that make a latent frame.
_RATIO = 4


def blocks(video: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """``[T, H, W, C]`` as views: the first frame, then ``most`` at a time."""
    yield video[:1]
    if len(video) > 1:
        yield from video[1:].split(most)


def whole_groups(frames: Iterable[torch.Tensor], most: int) -> Iterator[torch.Tensor]:
    """The same of a stream, of which frames beyond a multiple of four and one are left out.

    Args:
        frames: ``[t, H, W, C]`` each, of any t; what they hold may change when the next ones are asked for.
        most: frames a block.
    """
    first, waiting = True, 0
    parts: list[torch.Tensor] = []
    for part in frames:
        if first and len(part):
            yield part[:1].clone()
            first, part = False, part[1:]
        if not len(part):
            continue
        parts.append(part.clone())
        waiting += len(part)
        if waiting < _RATIO:
            continue
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = waiting // _RATIO * _RATIO
        yield from together[:whole].split(most)
        waiting -= whole
        parts = [together[whole:].clone()] if waiting else []


def pieces(parts: Iterable[torch.Tensor]) -> Iterator[Piece]:
    """``parts`` ``[t, H, W, C]`` without the frames that equal the one before them."""
    count = RepeatCounter()
    for part in parts:
        counts = tuple(count(frame) for frame in part)
        new = [i for i, one in enumerate(counts) if one == 0]
        if not new:
            yield Piece(None, counts)
        else:
            yield Piece(part if len(new) == len(part) else part[new], counts)
