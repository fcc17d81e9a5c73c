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
    3: ("Chw", "hwC"),
}
# Channels of latents that models of this family make, and of others' that are as many as frames or rows may be.
_MODELS = {
    16: "Wan 2.1 (and the Wan 2.2 14B models, and Qwen-Image)",
    48: "the Wan 2.2 5B model",
    64: "Qwen-Image-2.1",
}
_OTHERS = (32, 128)
# What to do about axes that could be others'; a graph has no tensors to permute.
_AS_MADE, _PERMUTE = "take them as the sampler made them", "permute them to [B, C, T, h, w]"
# How much more alike neighbours along one axis must be than along another for it to be time and not channels: with
# latents of films the difference is 0.6 and more, of noise nothing.
_ALIKE = 0.5


def in_order(latents: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """``latents`` as ``[B, C, T, h, w]``, a view.

    The documented order is taken where it fits, another one where it alone does, which is said once.

    Args:
        latents: of three to five axes, at least one value.
        architecture: of the VAE.

    Raises:
        LatentError: no known order has the VAE's channels where they belong, or several others do; or the values, or
            the number of channels that another model has, say that an order is not meant that fits.
    """
    shape, channels = tuple(latents.shape), architecture.z_dim
    known = _ORDERS.get(len(shape), ())
    fitting = [
        order for order in known if shape[order.index("C")] == channels and _has_time(order, shape, architecture)
    ]
    if not fitting:
        raise LatentError(_wrong_channels(shape, architecture))
    documented, others = known[0], [order for order in fitting if order != known[0]]
    if fitting[0] == documented:
        _check_values(latents, documented, others)
        return _arranged(latents, documented)
    likely = [order for order in fitting if not _rather_others(latents, documented, order, architecture)]
    if not likely:
        readings = " or ".join(map(_written, fitting))
        raise LatentError(
            _wrong_channels(shape, architecture), f"if they are {readings}, permute them to [B, C, T, h, w]"
        )
    arranged = [_arranged(latents, order) for order in likely]
    if len({(one.shape, one.stride()) for one in arranged}) > 1:
        readings = " or ".join(map(_written, likely))
        raise LatentError(
            f"latents {shape} have {channels} channels as {readings}, and it is not clear which they are; {_AS_MADE}",
            _PERMUTE,
        )
    say_once(
        f"latents are taken as {_written(likely[0])}: of the orders that are known it alone has the {channels} "
        f"channels of {architecture.name} where they belong"
    )
    return arranged[0]


def _has_time(order: str, shape: tuple[int, ...], architecture: Architecture) -> bool:
    """Whether the VAE can take latents in that order for their latent frames: of images alone there is one."""
    return not architecture.images_only or "T" not in order or shape[order.index("T")] == 1 or order == _ORDERS[5][0]


def _rather_others(latents: torch.Tensor, documented: str, order: str, architecture: Architecture) -> bool:
    """Whether latents are rather another model's in the documented order than ours in ``order``.

    Another model's have any number of frames, rows and columns, and so also that of our channels.
    """
    first, second = documented.index("C"), order.index("C")
    count, own = latents.shape[first], architecture.z_dim
    # In ours neighbours along the first are frames or rows, which are alike.
    ours = _likeness(latents, first) - _likeness(latents, second) if min(count, own) > 2 else 0.0
    if count in _MODELS or count in (*_OTHERS, 2 * own, own + 4, 2 * own + 4):
        return ours <= _ALIKE
    return ours < -_ALIKE


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


def _wrong_channels(shape: tuple[int, ...], architecture: Architecture) -> str:
    channels, own = shape[1] if len(shape) > 3 else shape[0], architecture.z_dim
    text = f"latents have {channels} channels, but this is a {architecture.name} VAE and takes {own}"
    if channels == 2 * own:
        return (
            f"{text}; twice as many are mean and log variance, as an encoder makes them: take the first {own}, the mean"
        )
    if channels == 2 * own + 4:
        return (
            f"{text}; so many has what an image-to-video model reads: noise, a mask of 4 and the picture's latents. "
            f"Take what the sampler made, its first {own} at the most"
        )
    if channels == own + 4:
        return f"{text}; so many has an image-to-video model's condition, a mask of 4 and latents: take the last {own}"
    if channels in _MODELS:
        return f"{text}; these are latents of {_MODELS[channels]}: load the VAE that belongs to it"
    return f"{text}; connect the VAE that the video was sampled for"


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
