"""A video's frames in pieces for the encoder, with what is known of repeats.

T frames, H x W pixels, C colours
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..model.lines import Piece
from .repeats import counted, counted_ahead


def blocks(video: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """``[T, H, W, C]`` as views: the first frame, then ``most`` at a time."""
    yield video[:1]
    if len(video) > 1:
        yield from video[1:].split(most)


def whole_groups(frames: Iterable[torch.Tensor], most: int, ratio: int) -> Iterator[torch.Tensor]:
    """The same of a stream, of which frames beyond one and a multiple of ``ratio`` are left out.

    Args:
        frames: ``[t, H, W, C]`` each, of any t; what they hold may change when the next ones are asked for.
        most: frames a block.
        ratio: frames that make a latent frame.
    """
    at_once = -(-most // ratio) * ratio
    first, waiting = True, 0
    parts: list[torch.Tensor] = []
    for part in frames:
        if first and len(part):
            yield part[:1].clone()
            first, part = False, part[1:]
        # Of a large part no more is copied at once than is encoded at once.
        for some in part.split(at_once) if len(part) else ():
            parts.append(some.clone())
            waiting += len(some)
            if waiting < ratio:
                continue
            together = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole = waiting // ratio * ratio
            waiting -= whole
            parts = [together[whole:].clone()] if waiting else []
            yield from together[:whole].split(most)
            del together


def pieces(parts: Iterable[torch.Tensor], *, ahead: bool = False) -> Iterator[Piece]:
    """``parts`` ``[T, H, W, C]`` without the frames that equal the one before them.

    Args:
        parts: of a video.
        ahead: all are there and stay, so that they may be looked at before they are asked for.
    """
    for part, counts in counted_ahead(parts) if ahead else counted(parts):
        new = [i for i, one in enumerate(counts) if one == 0]
        if not new:
            yield Piece(None, counts)
        else:
            yield Piece(part if len(new) == len(part) else part[new], counts)
