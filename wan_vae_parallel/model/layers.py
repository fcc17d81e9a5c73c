"""The layers of decoder and encoder, with their parameters named and shaped as Wan published them.

T frames, H rows, W columns, C channels; activations are contiguous ``[T, H, W, C]``, inputs of convolutions `Frames`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..ops.conv import (
    PreparedHead,
    conv,
    down_conv,
    fold_upsample_weight,
    head_conv,
    pointwise_conv,
    prepare_head,
    upsample_conv,
)
from ..ops.dispatch import kernels_multiply
from ..ops.layer_kinds import LayerKind
from ..ops.norm_silu import norm_silu
from ..ops.pixels import Margins, gather_taps, spread_pixel_weight, tap_channels
from .state import Frames, PageKey, PageNeed, StreamState


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

    Its input are frames in pages: `take` some, write them, call the layer. It remembers those that it will want to
    have seen. Two ``halves`` make two frames of half the channels of each; a ``time_stride`` of 2 makes one of two.

    Images have no past, so of the weights only those of the present frame are used: the others would meet zeros, which
    change no bit of a sum.

    Attributes:
        kind: what it has in common with other layers.
        cudnn: whether PyTorch's convolution does the work, see `runtime.tuning`.
    """

    memory_format = torch.channels_last_3d
    cudnn = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        scale: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        halves: int = 1,
        time_stride: int = 1,
    ) -> None:
        super().__init__()
        self.kind = LayerKind("conv", in_channels, out_channels, kernel, halves, time_stride)
        self.weight = _empty(out_channels, in_channels, *kernel)
        self.bias = _empty(out_channels)
        self.past_frames = kernel[0] - time_stride
        self.key = PageKey(scale, in_channels, kernel[1] // 2)
        self._present: torch.Tensor | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._present = None

    def needs(self, chunk: int, *, image: bool = False) -> dict[PageKey, PageNeed]:
        """The pages that it uses, for ``chunk`` frames at once, or ``chunk`` images."""
        if image or not self.past_frames:
            return {self.key: PageNeed(passing=chunk)}
        return {self.key: PageNeed(convs=1, kept=self.past_frames, passing=chunk)}

    def take(self, count: int, state: StreamState) -> Frames:
        """Where to write ``count`` input frames."""
        return state.take(self.key, count)

    def forward(
        self,
        frames: Frames,
        state: StreamState,
        *,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        into: Frames | None = None,
    ) -> torch.Tensor:
        """Convolves frames that `take` gave and a producer wrote.

        Args:
            frames: T of them; they belong to the layer from now on.
            state: the decode's.
            residual: ``[T, H, W, O]``, added.
            out: ``[T, H, W, O]`` to write to, such as ``residual``.
            into: frames to write to instead.

        Returns:
            ``[T * halves, H, W, O / halves]``, or the arena of ``into``.
        """
        seen = self.see(frames, state)
        result = conv(
            seen.arena,
            seen.index,
            self.present_weight() if state.image else self.arena_weight(),
            self.bias,
            residual=residual,
            out=into.arena if into else out,
            out_slots=into.index if into else None,
            halves=self.kind.halves,
            time_stride=self.kind.time_stride,
            transposed=state.transposed,
            cudnn=self.cudnn,
        )
        state.keep_past(self, seen, self.past_frames)
        return result

    def arena_weight(self) -> torch.Tensor:
        """The weight for frames as they lie in the arena."""
        return self.weight

    def present_weight(self) -> torch.Tensor:
        """The part of `arena_weight` that the present frame meets, ``[O, C, 1, kh, kw]``."""
        weight = self.arena_weight()
        if weight.shape[2] == 1:
            return weight
        if self._present is None:
            self._present = weight[:, :, -1:].contiguous(memory_format=self.memory_format)
        return self._present

    def see(self, frames: Frames, state: StreamState) -> Frames:
        """``frames`` with their halo, behind the past ones; images have none."""
        if self.key.border:
            # Past frames kept the halo that they got when they were new.
            state.edges.fill_halo(frames)
        return state.with_past(self, frames, 0 if state.image else self.past_frames)


class TimeDownConv(CausalConv3d):
    """Makes one frame of two, and of the last one before them; the video's first frame stays as it is."""

    def __init__(self, channels: int, *, scale: int, kernel_frames: int = 3) -> None:
        # Of images alone, whose kernels see one frame, it has weights and never convolves.
        stride = 2 if kernel_frames > 1 else 1
        super().__init__(channels, channels, scale=scale, kernel=(kernel_frames, 1, 1), time_stride=stride)

    def needs(self, chunk: int, *, image: bool = False) -> dict[PageKey, PageNeed]:
        """The pages that it uses, for ``chunk`` frames at once, and what `lines.Join` copies."""
        if image:
            return {self.key: PageNeed(passing=chunk)}
        # It never sees a blank past. Beside a step's frames one waits for its other half, or a repeated one's copy
        # stands for it; where all of a step's repeat, there are two of these and nothing else.
        return {self.key: PageNeed(kept=self.past_frames, passing=chunk + 1)}

    def begin(self, frames: Frames, state: StreamState) -> None:
        """Remembers the video's first frame."""
        state.keep_past(self, frames, self.past_frames)


class PixelConv(CausalConv3d):
    """The encoder's first convolution, from pixels; they come with their neighbourhoods, see `ops.pixels`.

    It remembers pixels, whose neighbourhoods would take ten times as much, and spreads them anew for each step.
    """

    def __init__(self, in_channels: int, out_channels: int, *, patch: int, scale: int, kernel_frames: int = 3) -> None:
        super().__init__(tap_channels(in_channels), out_channels, scale=scale, kernel=(kernel_frames, 1, 1))
        self.weight = _empty(out_channels, in_channels, kernel_frames, 3, 3)
        self._patch = patch
        self._spread: torch.Tensor | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._spread = None

    def needs(self, chunk: int, *, image: bool = False) -> dict[PageKey, PageNeed]:  # noqa: ARG002 (as the others)
        """No pages."""
        return {}

    def arena_weight(self) -> torch.Tensor:
        if self._spread is None:
            self._spread = spread_pixel_weight(self.weight, self._patch)
        return self._spread

    def forward(  # type: ignore[override]  # takes no frames of pages
        self, pixels: torch.Tensor, state: StreamState, *, margins: Margins
    ) -> torch.Tensor:
        """``[T, H, W, O]`` of pixels ``[T, H', W', C]`` in [0, 1], which have their margins; see `gather_taps`."""
        count = 0 if state.image else self.past_frames
        past = state.past_pixels[-count:] if count and state.past_pixels is not None else pixels[:0]
        patch = self._patch
        rows = pixels.shape[1] // patch - margins.top - margins.bottom
        columns = pixels.shape[2] // patch - margins.left - margins.right
        shape = (columns, rows) if state.transposed else (rows, columns)
        taps = self.weight.new_empty((count + len(pixels), *shape, self.key.channels))
        slots = torch.arange(len(taps), dtype=torch.int32, device=taps.device)
        missing = count - len(past)
        taps[:missing] = 0  # blank frames, of which a half would be the pixels
        for frames, first in ((past, missing), (pixels, count)):
            if len(frames):
                gather_taps(
                    frames,
                    patch=patch,
                    margins=margins,
                    transposed=state.transposed,
                    arena=taps,
                    slots=slots[first : first + len(frames)],
                )
        if count:
            # Whoever gave these pixels writes over them.
            state.past_pixels = torch.cat([past, pixels[-count:]])[-count:].clone()
        return conv(
            taps,
            slots,
            self.present_weight() if state.image else self.arena_weight(),
            self.bias,
            transposed=state.transposed,
            cudnn=self.cudnn,
        )


class HeadConv(CausalConv3d):
    """The last convolution, to a few channels.

    Its channels may be computed in another order than they were published in: ``order`` says which one comes where.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        scale: int,
        kernel_frames: int = 3,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, scale=scale, kernel=(kernel_frames, 3, 3))
        self.kind = self.kind._replace(op="head_conv")
        self._order = list(order) if order else None
        self._prepared: dict[tuple[int, bool, bool], PreparedHead | None] = {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._order:
            ordered = {
                key: state_dict[key][self._order]
                for key in (f"{prefix}weight", f"{prefix}bias")
                if key in state_dict and len(state_dict[key]) == len(self._order)
            }
            state_dict = {**state_dict, **ordered}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._prepared = {}

    def forward(self, frames: Frames, state: StreamState) -> torch.Tensor:  # type: ignore[override]  # writes nowhere else
        """Convolves frames that `take` gave and a producer wrote, to ``[T, H, W, O]``."""
        seen = self.see(frames, state)
        weight = self.present_weight() if state.image else self.weight
        # What three frames want is what four do, and more.
        key = min(1 << (len(frames) - 1).bit_length(), 4), state.transposed, state.image
        if key not in self._prepared and not self.cudnn:
            self._prepared[key] = prepare_head(weight, key[0], transposed=state.transposed)
        result = head_conv(
            seen.arena,
            seen.index,
            weight,
            self.bias,
            prepared=self._prepared.get(key),
            transposed=state.transposed,
            cudnn=self.cudnn,
        )
        state.keep_past(self, seen, self.past_frames)
        return result


class UpsampleConv(_Weights):
    """The 3x3 convolution behind the doubling of rows and columns, frame by frame; attributes as `CausalConv3d`'s."""

    memory_format = torch.channels_last
    cudnn = False

    def __init__(self, in_channels: int, out_channels: int, *, scale: int) -> None:
        super().__init__()
        self.weight = _empty(out_channels, in_channels, 3, 3)
        self.bias = _empty(out_channels)
        self.key = PageKey(scale, in_channels, 1)
        self.kind = LayerKind("upsample_conv", in_channels, out_channels, (1, 3, 3))
        self._folded: torch.Tensor | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._folded = None

    def forward(self, frames: Frames, state: StreamState) -> torch.Tensor:
        """Upsamples frames of its key to ``[T, 2H, 2W, O]``; they belong to the layer from now on."""
        state.edges.fill_halo(frames)
        if self._folded is None and not self.cudnn and kernels_multiply(self.weight.device, self.weight.dtype):
            self._folded = fold_upsample_weight(self.weight)
        result = upsample_conv(
            frames.arena,
            frames.index,
            self.weight,
            self.bias,
            folded=self._folded,
            transposed=state.transposed,
            cudnn=self.cudnn,
        )
        frames.pages.give(frames.slots)
        return result


class DownConv(_Weights):
    """The 3x3 convolution that halves rows and columns, frame by frame; attributes as `CausalConv3d`'s."""

    memory_format = torch.channels_last
    cudnn = False

    def __init__(self, channels: int, *, scale: int) -> None:
        super().__init__()
        self.weight = _empty(channels, channels, 3, 3)
        self.bias = _empty(channels)
        self.key = PageKey(scale, channels, 1)
        self.kind = LayerKind("down_conv", channels, channels, (1, 3, 3))

    def forward(self, frames: Frames, state: StreamState, *, into: Frames | None = None) -> torch.Tensor:
        """``[T, H / 2, W / 2, C]`` of frames of its key, or into frames; they belong to the layer from now on."""
        state.edges.fill_halo(frames, below_only=True)
        result = down_conv(
            frames.arena,
            frames.index,
            self.weight,
            self.bias,
            out=into.arena if into else None,
            out_slots=into.index if into else None,
            transposed=state.transposed,
            cudnn=self.cudnn,
        )
        frames.pages.give(frames.slots)
        return result


class PointwiseConv(nn.Module):
    """A 1x1 convolution with ``axes`` trailing axes of size 1 in its weight."""

    def __init__(self, in_channels: int, out_channels: int, axes: int = 3) -> None:
        super().__init__()
        self.weight = _empty(out_channels, in_channels, *(1,) * axes)
        self.bias = _empty(out_channels)

    def forward(
        self,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        into: Frames | None = None,
        first: int | None = None,
    ) -> torch.Tensor:
        """``[T, H, W, C]`` to ``[T, H, W, O]``, plus ``residual``; or into frames, whose arena it returns.

        Of the O channels only the ``first`` so many are computed, by default all.
        """
        return pointwise_conv(
            x,
            self.weight[:first],
            self.bias[:first],
            residual=residual,
            out=into.arena if into else None,
            out_slots=into.index if into else None,
        )


def norm_silu_frames(x: torch.Tensor, norm: RMSNorm, conv: CausalConv3d, state: StreamState) -> Frames:
    """``silu(norm(x))`` as ``conv`` reads it; it exists nowhere else."""
    frames = conv.take(len(x), state)
    norm_silu(x, norm.gamma, arena=frames.arena, slots=frames.index)
    return frames
