"""The blocks of a Wan VAE: those of both directions, and the decoder's upsampling ones.

T frames of this step, H rows of this shard, W columns, C channels; activations are contiguous ``[T, H, W, C]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..architecture import Stage
from ..ops.attention import frame_attention
from ..ops.limits import attention_takes, norm_takes
from ..ops.norm_silu import rms_norm
from ..ops.shortcut import add_duplicated
from .layers import CausalConv3d, PointwiseConv, RMSNorm, UpsampleConv, norm_silu_frames
from .state import Frames, PageKey, PageNeed, StreamState

Needs = dict[PageKey, PageNeed]


def add_needs(needs: Iterable[Needs]) -> Needs:
    """All of them together."""
    total: Needs = {}
    for one in needs:
        for key, need in one.items():
            total[key] = total.get(key, PageNeed()) | need
    return total


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, *, scale: int, kernel_frames: int = 3) -> None:
        super().__init__()
        kernel = (kernel_frames, 3, 3)
        # Tuples of modules, which nn.Module does not register: the published names are given below.
        self._first = RMSNorm(in_channels), CausalConv3d(in_channels, out_channels, scale=scale, kernel=kernel)
        self._second = RMSNorm(out_channels), CausalConv3d(out_channels, out_channels, scale=scale, kernel=kernel)
        # The indices are those of the published nn.Sequential, whose SiLUs and dropout hold nothing.
        names = ("0", "2", "3", "6")
        self.residual = nn.ModuleDict(dict(zip(names, (*self._first, *self._second), strict=True)))
        self.shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that it uses."""
        return add_needs(conv.needs(chunk, image=image) for _, conv in (self._first, self._second))

    def forward(
        self, x: torch.Tensor, state: StreamState, *, into: Frames | None = None, keep: bool = False
    ) -> torch.Tensor:
        """``[T, H, W, C]`` to ``[T, H, W, O]``, or into frames; writes over ``x`` unless told to ``keep`` it."""
        norm, conv = self._first
        out = conv(norm_silu_frames(x, norm, conv, state), state)
        norm, conv = self._second
        frames = norm_silu_frames(out, norm, conv, state)
        del out
        residual = self.shortcut(x)
        own = None if into or (keep and residual is x) else residual
        return conv(frames, state, residual=residual, out=own, into=into)


class AttentionBlock(nn.Module):
    """Self-attention with one head over each frame; asks for all rows' keys and values, computes its own rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = PointwiseConv(channels, 3 * channels, axes=2)
        self.proj = PointwiseConv(channels, channels, axes=2)

    def needs(self, chunk: int, *, image: bool = False) -> Needs:  # noqa: ARG002 (as the other blocks)
        """The pages that it uses."""
        return {}

    def forward(self, x: torch.Tensor, state: StreamState) -> torch.Tensor:
        """``[T, H, W, C]`` to the same."""
        channels = x.shape[-1]
        query, key_value = self.to_qkv(rms_norm(x, self.norm.gamma)).split((channels, 2 * channels), dim=-1)
        key_value = state.edges.all_rows(key_value)
        if state.transposed:
            # In the picture's own order: the same sums.
            key_value = key_value.transpose(1, 2).contiguous()
        key, value = key_value.flatten(1, 2).chunk(2, dim=-1)
        attended = frame_attention(query.flatten(1, 2), key, value)
        return self.proj(attended.view(x.shape), residual=x)


Block = ResidualBlock | AttentionBlock


def kernels_take(model: nn.Module) -> bool:
    """Whether our kernels take the widths of all norms and attentions; of convolutions they take any."""
    norms = (module.gamma.numel() for module in model.modules() if isinstance(module, RMSNorm))
    attentions = (module.proj.weight.shape[0] for module in model.modules() if isinstance(module, AttentionBlock))
    return all(map(norm_takes, norms)) and all(map(attention_takes, attentions))


def middle_modules(channels: int, kernel_frames: int = 3) -> list[Block]:
    """The blocks at the latent's resolution; each convolution sees so many frames."""
    first, last = (ResidualBlock(channels, channels, scale=1, kernel_frames=kernel_frames) for _ in range(2))
    return [first, AttentionBlock(channels), last]


@dataclass(frozen=True)
class Waiting:
    """Frames between two stages, before their rows and columns are doubled.

    Attributes:
        frames: the frames, written.
        source: for Wan 2.2's shortcut what the block before them got, ``[T, H, W, C]``; else None.
        phases: which of the frames that each of ``source`` makes these are: first and last (exclusive).
    """

    frames: Frames
    source: torch.Tensor | None = None
    phases: tuple[int, int] = (0, 1)

    def split(self, count: int) -> list[Waiting]:
        """Parts of at most ``count`` frames."""
        first, stop = self.phases
        if self.source is None:
            return [Waiting(part) for part in self.frames.split(count)]
        each = stop - first
        if count < each:
            return [
                Waiting(part, self.source[i // each : i // each + 1], (first + i % each, first + i % each + 1))
                for i, part in enumerate(self.frames.split(1))
            ]
        sources = count // each
        parts = self.frames.split(sources * each)
        return [
            Waiting(part, source, self.phases) for part, source in zip(parts, self.source.split(sources), strict=True)
        ]


class Resample(nn.Module):
    """Upsampling by two, in space and for ``"3d"`` in time, and the convolution behind it.

    In two halves, as many more frames leave than come in: `take` and `arrive` end one stage, `upsample` begins the
    next.
    """

    def __init__(self, channels: int, out_channels: int, *, scale: int, time: bool, kernel_frames: int = 3) -> None:
        super().__init__()
        self._conv = (UpsampleConv(channels, out_channels, scale=scale),)
        # "1" is the index in the published nn.Sequential, whose upsampling holds nothing.
        self.resample = nn.ModuleDict({"1": self._conv[0]})
        # Two halves: each frame's channels are the two frames that it becomes.
        kernel = (kernel_frames, 1, 1)
        self.time_conv = CausalConv3d(channels, 2 * channels, scale=scale, kernel=kernel, halves=2) if time else None
        self.time_factor = 2 if time else 1

    def needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that it uses."""
        # Passing: what the time convolution makes; or, without one, what the last block reads and what it writes.
        own = {self._conv[0].key: PageNeed(passing=2 * chunk, waiting=chunk * self.time_factor)}
        return add_needs([own, self.time_conv.needs(chunk) if self.time_conv and not image else {}])

    def take(self, count: int, state: StreamState) -> Frames:
        """Where the stage's last block writes ``count`` frames."""
        if self.time_conv is None or state.first:
            return state.take(self._conv[0].key, count)
        return self.time_conv.take(count, state)

    def arrive(self, frames: Frames, state: StreamState) -> Frames:
        """Turns what lies in `take`'s frames into those that wait for `upsample`.

        The video's first latent frame makes one frame, so it skips the time convolution, and the next latent
        frame's time convolution sees zeros in its place.
        """
        if self.time_conv is None or state.first:
            return frames
        waiting = state.take(self._conv[0].key, 2 * len(frames))
        self.time_conv(frames, state, into=waiting)
        return waiting

    def upsample(self, frames: Frames, state: StreamState) -> torch.Tensor:
        """``[T, 2H, 2W, O]`` of frames that waited."""
        (conv,) = self._conv
        return conv(frames, state)


class UpBlock(nn.Module):
    """A stage of Wan 2.2: residual blocks, the upsampling if there is one, and a shortcut around both."""

    def __init__(self, stage: Stage, kernel_frames: int = 3) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(stage_modules(stage, kernel_frames))


def stage_modules(stage: Stage, kernel_frames: int = 3) -> list[nn.Module]:
    """The residual blocks and the upsampling of ``stage``, in order; each convolution sees so many frames."""
    modules: list[nn.Module] = [
        ResidualBlock(
            stage.in_channels if i == 0 else stage.channels,
            stage.channels,
            scale=stage.scale,
            kernel_frames=kernel_frames,
        )
        for i in range(stage.blocks)
    ]
    if stage.upsample:
        modules.append(
            Resample(
                stage.channels,
                stage.out_channels,
                scale=stage.scale,
                time=stage.upsample == "3d",
                kernel_frames=kernel_frames,
            )
        )
    return modules


class StageRun:
    """One stage as the decoder runs it: how its frames come in, what they pass, how they leave.

    Args:
        entry: the upsampling that the stage before ends with; None for the first stage.
        lead: blocks before those that the shortcut goes around.
        blocks: residual blocks.
        exit: the upsampling that this stage ends with; None for the last stage.
        shortcut: whether what comes in is added to what the next stage's upsampling makes of it (Wan 2.2).
    """

    def __init__(
        self,
        entry: Resample | None,
        lead: list[Block],
        blocks: list[ResidualBlock],
        exit: Resample | None,
        *,
        shortcut: bool,
    ) -> None:
        self.entry = entry
        self.lead = lead
        self.blocks = blocks
        self.exit = exit
        self.shortcut = shortcut

    def needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that it uses."""
        modules: list[Block | Resample] = [*self.lead, *self.blocks, *([self.exit] if self.exit else [])]
        return add_needs(module.needs(chunk, image=image) for module in modules)

    def enter(self, waiting: Waiting, state: StreamState) -> torch.Tensor:
        """Doubles rows and columns of frames that waited; ``[T, H, W, C]``."""
        assert self.entry
        x = self.entry.upsample(waiting.frames, state)
        if waiting.source is not None:
            add_duplicated(
                waiting.source,
                time_factor=self.entry.time_factor,
                phases=waiting.phases,
                transposed=state.transposed,
                out=x,
            )
        return x

    def run(self, x: torch.Tensor, state: StreamState) -> Waiting | torch.Tensor:
        """From what comes in to what waits for the next stage; the last stage's result is ``[T, H, W, C]``."""
        for block in self.lead:
            x = block(x, state)
        source = x if self.shortcut else None
        *others, last = self.blocks
        for i, block in enumerate(others):
            x = block(x, state, keep=True) if self.shortcut and i == 0 else block(x, state)
        if self.exit is None:
            return last(x, state)
        frames = self.exit.take(len(x), state)
        last(x, state, into=frames)
        del x
        phases = (self.exit.time_factor - 1 if state.first else 0, self.exit.time_factor)
        return Waiting(self.exit.arrive(frames, state), source, phases)
