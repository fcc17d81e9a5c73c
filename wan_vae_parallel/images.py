"""Pictures that come one after the other and become a latent each, of which a few are ever in memory.

N pictures, H x W pixels, C colours; h x w latent rows and columns, z channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from .architecture import Architecture
from .errors import FrameError
from .memory import images_that_pay


class Encodes(Protocol):
    """What is needed of a VAE."""

    architecture: Architecture

    def encode(
        self, frames: torch.Tensor, normalized: bool = ..., *, on_wait: Callable[[], None] | None = ...
    ) -> torch.Tensor: ...


def encode_pictures(
    vae: Encodes,
    pictures: Iterable[torch.Tensor],
    *,
    normalized: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Encodes each of ``pictures`` by itself, as `vae.VAE.encode` does those of a batch: as many together as pay.

    Args:
        vae: encodes.
        pictures: ``[1, H, W, C]`` each, of one size.
        normalized: see `vae.VAE.encode`.
        on_wait: see there.

    Yields:
        ``[n, z, 1, h, w]``, the latents that follow those before.

    Raises:
        FrameError: there are none, or they differ in size.
    """
    together: list[torch.Tensor] = []
    first: torch.Tensor | None = None
    for picture in pictures:
        first = picture if first is None else first
        if picture.shape != first.shape:
            raise FrameError(
                f"a picture of {picture.shape[2]}x{picture.shape[1]} pixels follows one of "
                f"{first.shape[2]}x{first.shape[1]}; latents of several have one size: stretch the pictures to it"
            )
        together.append(picture)
        if len(together) == images_at_once(vae.architecture, *picture.shape[1:3]):
            yield vae.encode(torch.stack(together), normalized, on_wait=on_wait)
            together = []
    if together:
        yield vae.encode(torch.stack(together), normalized, on_wait=on_wait)
    if first is None:
        raise FrameError("there are no pictures to encode")


def images_at_once(architecture: Architecture, height: int, width: int) -> int:
    """How many pictures of a size are encoded together."""
    return images_that_pay(architecture, *architecture.latent_size(height, width))
