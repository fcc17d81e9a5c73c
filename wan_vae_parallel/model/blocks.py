"""The blocks of a Wan VAE decoder.

T frames of this step, H rows of this shard, W columns, C channels; activations are contiguous ``[T, H, W, C]``.
"""

from __future__ import annotations

import torch
from torch import nn

from ..architecture import Stage
from ..ops.attention import frame_attention
from ..ops.norm_silu import rms_norm
from ..ops.upsample import add_duplicated, interleave_time, upsample_nearest
from .layers import CausalConv3d, FrameConv2d, PointwiseConv, RMSNorm, norm_silu_conv
from .state import DecodeState

# An upsampled frame is four times its source: as many frames are upsampled at once as fit this many elements, so
# that the largest buffer of a decode is a convolution's, not this one's.
UPSAMPLED_ELEMENTS = 2**27


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # Tuples of modules, which nn.Module does not register: the published names are given below.
        self._first = RMSNorm(in_channels), CausalConv3d(in_channels, out_channels)
        self._second = RMSNorm(out_channels), CausalConv3d(out_channels, out_channels)
        # The indices are those of the published nn.Sequential, whose SiLUs and dropout hold nothing.
        names = ("0", "2", "3", "6")
        self.residual = nn.ModuleDict(dict(zip(names, (*self._first, *self._second), strict=True)))
        self.shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        out = norm_silu_conv(x, *self._first, state)
        out = norm_silu_conv(out, *self._second, state)
        return out.add_(self.shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention with one head over each frame; asks for all rows' keys and values, computes its own rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = PointwiseConv(channels, 3 * channels, axes=2)
        self.proj = PointwiseConv(channels, channels, axes=2)

    def forward(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        channels = x.shape[-1]
        query, key_value = self.to_qkv(rms_norm(x, self.norm.gamma).to(x.dtype)).split((channels, 2 * channels), dim=-1)
        key, value = state.edges.all_rows(key_value).flatten(1, 2).chunk(2, dim=-1)
        attended = frame_attention(query.flatten(1, 2), key, value)
        return self.proj(attended.view(x.shape)).add_(x)


class Resample(nn.Module):
    """Upsampling by two, in space and for ``"3d"`` in time, and the convolution behind it."""

    def __init__(self, channels: int, out_channels: int, *, time: bool) -> None:
        super().__init__()
        self._conv = (FrameConv2d(channels, out_channels),)
        # "1" is the index in the published nn.Sequential, whose upsampling holds nothing.
        self.resample = nn.ModuleDict({"1": self._conv[0]})
        self.time_conv = CausalConv3d(channels, 2 * channels, kernel=(3, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """``[T, H, W, C]`` to ``[T or 2T, 2H, 2W, O]``.

        The video's first latent frame makes one frame, so it skips the time convolution, and the next latent
        frame's time convolution sees zeros in its place.
        """
        if self.time_conv is None or state.first:
            return self._upsample(x[:, None], state)
        buffer = self.time_conv.input_buffer(x.shape, state)
        self.time_conv.interior(buffer).copy_(x)
        return self._upsample(interleave_time(self.time_conv(buffer, state)), state)

    def _upsample(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """``[T, P, H, W, C]`` to ``[T * P, 2H, 2W, O]``."""
        (conv,) = self._conv
        steps, phases, rows, columns, channels = x.shape
        at_once = min(steps, max(1, UPSAMPLED_ELEMENTS // (phases * 4 * rows * columns * channels)))

        def convolved(part: torch.Tensor) -> torch.Tensor:
            frames = len(part) * phases
            buffer = state.workspace.take(frames, 2 * rows, 2 * columns, channels, border=conv.border)
            upsample_nearest(part, out=buffer[:, 1:-1, 1:-1])
            return conv(buffer, state)

        if at_once == steps:
            return convolved(x)
        out = x.new_empty((steps * phases, 2 * rows, 2 * columns, conv.weight.shape[0]))
        for part, out_part in zip(x.split(at_once), out.split(at_once * phases), strict=True):
            out_part.copy_(convolved(part))
        return out


class UpBlock(nn.Module):
    """A stage of Wan 2.2: residual blocks, the upsampling if there is one, and a shortcut around both."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(stage_modules(stage))
        self.time_factor = 2 if stage.upsample == "3d" else 1
        self.shortcut = stage.upsample is not None

    def forward(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        out = x
        for module in self.upsamples:
            out = module(out, state)
        if self.shortcut:
            add_duplicated(
                x, time_factor=self.time_factor, drop_first=state.first, transposed=state.transposed, out=out
            )
        return out


def stage_modules(stage: Stage) -> list[nn.Module]:
    """The residual blocks and the upsampling of ``stage``, in order."""
    modules: list[nn.Module] = [
        ResidualBlock(stage.in_channels if i == 0 else stage.channels, stage.channels) for i in range(stage.blocks)
    ]
    if stage.upsample:
        modules.append(Resample(stage.channels, stage.out_channels, time=stage.upsample == "3d"))
    return modules
