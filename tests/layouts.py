"""A spy on memory formats: what convolutions get, and copies that reorder axes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan_vae_parallel.runtime.local import LocalDecoder

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_COPIES = ("aten::clone", "aten::_to_copy", "aten::contiguous")


def axis_order(tensor: torch.Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory, without those whose place means nothing."""
    axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1 and tensor.stride(axis) > 0]
    return sorted(axes, key=tensor.stride, reverse=True)


def lies_channels_last(tensor: torch.Tensor) -> bool:
    """Whether torch will take it for channels_last(_3d); strides of size-1 axes count in that too."""
    like = torch.empty(tensor.shape, device="meta").to(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.dim()]) and tensor.stride() == like.stride()


class LayoutSpy(TorchDispatchMode):
    """Collects convolutions' inputs and weights that are not channels-last, and copies that reorder axes.

    Use it under no_grad, not inference mode, which would hide the operations inside composite ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0
        self.planar: list[str] = []
        self.reordered: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name == "aten::convolution":
            self.convolutions += 1
            for what, tensor in (("input", args[0]), ("weight", args[1])):
                if not lies_channels_last(tensor):
                    self.planar.append(f"convolution's {what} {tuple(tensor.shape)} has strides {tensor.stride()}")
        # Frames may change places, and rows be doubled; channels stay together.
        elif name in _COPIES and axis_order(args[0])[-1:] != axis_order(out)[-1:]:
            self.reordered.append(f"{name} takes {tuple(out.shape)} from strides {args[0].stride()} to {out.stride()}")
        return out


def layouts_of_a_decode(decoder: LocalDecoder, latents: torch.Tensor, chunk: int) -> LayoutSpy:
    """What a decode asks for; not in inference mode, see `LayoutSpy`."""
    with torch.no_grad(), LayoutSpy() as spy:
        for _ in LocalDecoder.stream.__wrapped__(decoder, latents, chunk):
            pass
    return spy
