"""Latents whose axes come in another order than ``[B, C, T, h, w]``, or without the batch's.

B videos, C latent channels, T latent frames, h x w latent rows and columns
"""

from __future__ import annotations

import torch

from ..architecture import Architecture
from ..errors import LatentError
from ..ops.dispatch import say_once

# By number of axes: the order that is documented, then others that programs have. A lower-case letter is one axis.
_ORDERS: dict[int, tuple[str, ...]] = {
    5: ("BCThw", "BTChw", "BThwC"),
    4: ("BChw", "CThw", "BhwC", "ThwC"),
    3: ("Chw",),
}
# What to do about axes that could be others'; a graph has no tensors to permute.
_AS_MADE, _PERMUTE = "take them as the sampler made them", "permute them to [B, C, T, h, w]"
# How much more alike neighbours along one axis must be than along another for it to be time and not channels: with
# latents of films the difference is 0.6 and more, of noise nothing.
_ALIKE = 0.5


def in_order(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor | None:
    """``latents`` as ``[B, C, T, h, w]``, a view; None if no known order has the VAE's channels where they belong.

    The documented order is taken where it fits, another one where it alone does, which is said once.

    Args:
        latents: of three to five axes, at least one value.
        architecture: of the VAE.

    Raises:
        LatentError: several others fit; or the documented one does, and the values say that another one is meant.
    """
    shape, channels = tuple(latents.shape), architecture.z_dim
    known = _ORDERS.get(len(shape), ())
    fitting = [order for order in known if shape[order.index("C")] == channels]
    if not fitting:
        return None
    documented, others = known[0], [order for order in fitting if order != known[0]]
    if fitting[0] == documented and len(shape) > 3:
        _check_values(latents, documented, others)
        return _arranged(latents, documented)
    if len(fitting) > 1:
        readings = " or ".join(map(_written, fitting))
        raise LatentError(
            f"latents {shape} have {channels} channels as {readings}, and it is not clear which they are; {_AS_MADE}",
            _PERMUTE,
        )
    say_once(
        f"latents are taken as {_written(fitting[0])}: of the orders that are known it alone has the {channels} "
        f"channels of {architecture.name} where they belong"
    )
    return _arranged(latents, fitting[0])


def _check_values(latents: torch.Tensor, documented: str, others: list[str]) -> None:
    """Raises LatentError if neighbours along the documented order's channels are frames, and another's are channels."""
    for order in others:
        first, second = documented.index("C"), order.index("C")
        if latents.shape[first] < 3 or "T" not in order:
            continue
        if order[first] != "T":  # what is compared must be time in the other order
            continue
        if _likeness(latents, first) - _likeness(latents, second) > _ALIKE:
            raise LatentError(
                f"latents {tuple(latents.shape)} can be {_written(documented)} or {_written(order)}, and their values "
                f"say the latter: along the {_nth(first)} axis neighbours are alike as frames are, along the "
                f"{_nth(second)} they differ as channels do; {_AS_MADE}",
                _PERMUTE,
            )


def _likeness(latents: torch.Tensor, axis: int) -> float:
    """The mean correlation of neighbours along ``axis``."""
    slices = latents.detach().movedim(axis, 0).flatten(1).float()
    slices = torch.nn.functional.normalize(slices - slices.mean(dim=1, keepdim=True), dim=1)
    return float((slices[1:] * slices[:-1]).sum(dim=1).mean())


def _arranged(latents: torch.Tensor, order: str) -> torch.Tensor:
    """``[B, C, T, h, w]`` of latents in ``order``; what it lacks has size 1."""
    if order == "BCThw":
        return latents
    for axis in "BT":
        if axis not in order:
            latents, order = latents.unsqueeze(0), axis + order
    return latents.permute([order.index(axis) for axis in "BCThw"])


def _written(order: str) -> str:
    return f"[{', '.join(order)}]"


def _nth(axis: int) -> str:
    return ("first", "second", "third", "fourth", "fifth")[axis]
