"""The decoder's layers, with their parameters named and shaped as Wan published them.

T frames, H rows, W columns, C channels; activations are contiguous ``[T, H, W, C]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ops.conv import causal_conv3d, frame_conv2d, pointwise_conv
from ..ops.norm_silu import norm_silu
from .state import DecodeState


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class _Weights(nn.Module):
    """A layer whose parameters arrive by assignment, each in the memory format that the layer computes in."""

    memory_format = torch.contiguous_format

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Whatever format a checkpoint or a caller has its weights in, here they get the layer's.
        own = {
            prefix + name: state_dict[prefix + name].contiguous(memory_format=self.memory_format)
            if state_dict[prefix + name].dim() == parameter.dim() > 3
            else state_dict[prefix + name]
            for name, parameter in self.named_parameters(recurse=False)
            if prefix + name in state_dict
        }
        super()._load_from_state_dict({**state_dict, **own}, prefix, *args)


class RMSNorm(nn.Module):
    """The scale of an RMS norm over channels; ``axes`` trailing axes of size 1 follow the channels."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = _empty(channels, *(1,) * axes)


class CausalConv3d(_Weights):
    """A convolution that sees the present and the past, never the future.

    Its input is a buffer: ``kernel[0] - 1`` past frames, then the new ones, with a border as wide as the kernel
    reaches. Take it with `input_buffer`, write the new frames to its `interior`, then call the layer.
    """

    memory_format = torch.channels_last_3d

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__()
        self.weight = _empty(out_channels, in_channels, *kernel)
        self.bias = _empty(out_channels)
        self.past_frames = kernel[0] - 1
        self.border = kernel[1] // 2

    def input_buffer(self, shape: torch.Size, state: DecodeState) -> torch.Tensor:
        """For an input of ``shape`` ``[T, H, W, C]``, a buffer with past frames and zero borders in place.

        It is ``[T + past, H + 2 * border, W + 2 * border, C]``.
        """
        frames, rows, columns, channels = shape
        buffer = state.workspace.take(frames + self.past_frames, rows, columns, channels, border=self.border)
        state.load_past(self, buffer[: self.past_frames])
        return buffer

    def interior(self, buffer: torch.Tensor) -> torch.Tensor:
        """The ``[T, H, W, C]`` of ``buffer`` that its producer writes."""
        if not self.border:
            return buffer[self.past_frames :]
        return buffer[self.past_frames :, self.border : -self.border, self.border : -self.border]

    def forward(self, buffer: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Convolves ``buffer`` to ``[T, H, W, O]`` and keeps its last frames for the next step."""
        if self.border:
            # Past frames kept the halo that they got when they were new.
            state.edges.fill_halo(buffer[self.past_frames :])
        out = causal_conv3d(buffer, self.weight, self.bias)
        state.keep_past(self, buffer[-self.past_frames :])
        return out


class FrameConv2d(_Weights):
    """The 3x3 convolution behind a spatial upsampling, frame by frame."""

    memory_format = torch.channels_last
    border = 1

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = _empty(out_channels, in_channels, 3, 3)
        self.bias = _empty(out_channels)

    def forward(self, buffer: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Convolves ``[T, H + 2, W + 2, C]`` to ``[T, H, W, O]``."""
        state.edges.fill_halo(buffer)
        return frame_conv2d(buffer, self.weight, self.bias)


class PointwiseConv(nn.Module):
    """A 1x1 convolution with ``axes`` trailing axes of size 1 in its weight."""

    def __init__(self, in_channels: int, out_channels: int, axes: int = 3) -> None:
        super().__init__()
        self.weight = _empty(out_channels, in_channels, *(1,) * axes)
        self.bias = _empty(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pointwise_conv(x, self.weight, self.bias)


def norm_silu_conv(x: torch.Tensor, norm: RMSNorm, conv: CausalConv3d, state: DecodeState) -> torch.Tensor:
    """``conv(silu(norm(x)))`` for ``x`` ``[T, H, W, C]``; the norm's output exists only as the conv's input."""
    buffer = conv.input_buffer(x.shape, state)
    norm_silu(x, norm.gamma, out=conv.interior(buffer))
    return conv(buffer, state)
