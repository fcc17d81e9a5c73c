"""The whole encoder: a chain of stages through which a video passes in steps of time, each half as fine.

T frames, t frames of a step, H rows of this shard, W columns, C channels, h x w latent rows and columns, z channels

Frames that equal the one before them are not computed again, see `lines`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture, DownStage
from ..ops.pixels import Margins
from ..ops.shortcut import add_averaged
from .blocks import Block, Needs, ResidualBlock, add_needs, middle_modules
from .layers import CausalConv3d, DownConv, PixelConv, PointwiseConv, RMSNorm, TimeDownConv, norm_silu_frames
from .lines import Join, Line, Piece, gathered
from .state import Frames, PageKey, PageNeed, Pages, SlotLists, StreamState, make_pages

# Convolutions over three frames in a residual block.
_BLOCK_DEPTH = 2


class Downsample(nn.Module):
    """Halves rows and columns, and for ``"3d"`` the number of frames."""

    def __init__(self, channels: int, *, scale: int, time: bool, kernel_frames: int = 3) -> None:
        super().__init__()
        self.conv = (DownConv(channels, scale=scale),)  # a tuple, so not registered twice
        # "1" is the index in the published nn.Sequential, whose padding holds nothing.
        self.resample = nn.ModuleDict({"1": self.conv[0]})
        self.time_conv = TimeDownConv(channels, scale=scale // 2, kernel_frames=kernel_frames) if time else None

    def needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that it uses."""
        # Passing: what the last block reads and, of several frames, what it writes.
        own = {self.conv[0].key: PageNeed(passing=2 * chunk if chunk > 1 else 1)}
        return add_needs([own, self.time_conv.needs(chunk, image=image) if self.time_conv else {}])


class DownBlock(nn.Module):
    """A stage of Wan 2.2: residual blocks, the downsampling if there is one, and a shortcut around both."""

    def __init__(self, stage: DownStage, kernel_frames: int = 3) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(down_modules(stage, kernel_frames))


def down_modules(stage: DownStage, kernel_frames: int = 3) -> list[nn.Module]:
    """The residual blocks and the downsampling of ``stage``, in order; each convolution sees so many frames."""
    modules: list[nn.Module] = [
        ResidualBlock(
            stage.in_channels if i == 0 else stage.channels,
            stage.channels,
            scale=stage.scale,
            kernel_frames=kernel_frames,
        )
        for i in range(stage.blocks)
    ]
    if stage.downsample:
        time = stage.downsample == "3d"
        modules.append(Downsample(stage.channels, scale=stage.scale, time=time, kernel_frames=kernel_frames))
    return modules


class DownStageRun:
    """One stage as the encoder runs it.

    Args:
        conv: the first convolution, from pixels; None but for the first stage.
        blocks: residual blocks.
        exit: the downsampling that the stage ends with; None for the last stage.
        tail: blocks behind it all, in the last stage.
        shortcut: whether what comes in is added to what leaves (Wan 2.2).
        head: whether the encoder's last convolution belongs to it.
    """

    def __init__(
        self,
        conv: PixelConv | None,
        blocks: list[ResidualBlock],
        exit: Downsample | None,
        tail: list[Block],
        *,
        shortcut: bool,
        head: bool,
    ) -> None:
        self.conv = conv
        self.blocks = blocks
        self.exit = exit
        self.tail = tail
        self.shortcut = shortcut
        residual = [block for block in (*blocks, *tail) if isinstance(block, ResidualBlock)]
        # Convolutions over three frames, one after the other.
        self.depth = _BLOCK_DEPTH * len(residual) + (conv is not None) + head

    def needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that it uses."""
        modules: list[Any] = [self.conv, *self.blocks, *self.tail, self.exit]
        return add_needs(module.needs(chunk, image=image) for module in modules if module is not None)

    def run(self, x: torch.Tensor, state: StreamState) -> tuple[torch.Tensor | Frames, torch.Tensor]:
        """From ``[n, H, W, C]`` that come in to what the downsampling reads, or to the result of the last stage.

        Returns:
            That; and what came in.
        """
        source = x
        *others, last = self.blocks
        for i, block in enumerate(others):
            x = block(x, state, keep=self.shortcut and i == 0)
        key = self.exit.conv[0].key if self.exit is not None else None
        if key and len(x) > 1:
            frames = state.take(key, len(x))
            last(x, state, into=frames)
            return frames, source
        x = last(x, state, keep=x is source and self.shortcut)
        if key:
            # One frame alone needs no place beside those that the block read: it is copied to where the oldest lay.
            frames = state.take(key, 1)
            frames.arena[frames.slots[0], key.border : -key.border, key.border : -key.border].copy_(x[0])
            return frames, source
        if self.shortcut:
            x.add_(source)
        for more in self.tail:
            x = more(x, state)
        return x, source


class Encoding:
    """One video's way through the encoder, or that of images; made by `WanEncoder.begin`.

    A video's first frame goes alone, and no stage takes more than ``chunk`` frames at once. As all that passes from one
    step to the next lies in past frames, the result depends neither on ``chunk`` nor on the pieces that the video comes
    in.
    """

    def __init__(self, encoder: WanEncoder, state: StreamState, chunk: int, margins: Margins) -> None:
        self._encoder = encoder
        self._state = state
        self._chunk = chunk
        self._margins = margins
        self._stages = encoder.stages()
        # How many frames before it each frame's result depends on: of images none.
        self._depths = [0 if state.image else stage.depth for stage in self._stages]
        self._lines = [Line(depth) for depth in self._depths]
        self._joins = [
            Join(stage.exit.time_conv, shortcut=stage.shortcut) if stage.exit and stage.exit.time_conv else None
            for stage in self._stages
        ]
        # The newest latent frame.
        self._last: tuple[torch.Tensor, int] | None = None

    def push(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Encodes as far as the video goes with this piece; iterate it to its end.

        Args:
            piece: of pixels ``[n, H', W', C]`` in [0, 1], contiguous, on the weights' device.

        Yields:
            ``[t, h, w, z]``, latents' means that follow those before, in the weights' dtype.
        """
        self._lines[0].put(piece)
        return self._run(ended=False)

    def end(self) -> Iterator[torch.Tensor]:
        """The rest, once all of the video was pushed: one frame, or a multiple of four more."""
        return self._run(ended=True)

    def _run(self, *, ended: bool) -> Iterator[torch.Tensor]:
        while (number := self._next(ended=ended)) is not None:
            for made in self._run_stage(number):
                if number + 1 < len(self._stages):
                    self._lines[number + 1].put(made)
                else:
                    yield self._leave(made)
                    self._state.first = self._state.image

    def _next(self, *, ended: bool) -> int | None:
        """The stage that is to run next; None if all wait for more of the video.

        The coarsest that has a whole chunk to compute, or nothing new, so that little waits anywhere; else, of a
        video that has ended, the finest that has anything. The first frame goes all the way alone, as images do.
        """
        coarse_to_fine = reversed(range(len(self._lines)))
        if self._state.first:
            return next((i for i in coarse_to_fine if self._lines[i].waits), None)
        lines = self._lines
        full = (i for i in coarse_to_fine if lines[i].known or lines[i].ready(self._chunk) == self._chunk)
        rest = (i for i, line in enumerate(self._lines) if line.waits) if ended else iter(())
        return next(itertools.chain(full, rest), None)

    def _run_stage(self, number: int) -> Iterator[Piece]:
        """Has a stage do a chunk of what waits for it, and halve what comes of it."""
        stage, state, join = self._stages[number], self._state, self._joins[number]
        piece = self._lines[number].take(1 if state.first and not state.image else self._chunk)
        counts = tuple(max(0, count - 2 * self._depths[number]) for count in piece.counts)
        x = piece.frames
        del piece
        if x is None:
            yield from join.put(None, None, counts, state) if join and not state.image else [Piece(None, counts)]
            return
        if stage.conv:
            x = stage.conv(x, state, margins=self._margins)
        left, source = stage.run(x, state)
        del x
        if isinstance(left, torch.Tensor):
            yield Piece(left, counts)
            return
        assert stage.exit is not None
        conv, time_conv = stage.exit.conv[0], stage.exit.time_conv
        if join is None or time_conv is None:
            halved = conv(left, state)
            if stage.shortcut:
                add_averaged(source, time_factor=1, transposed=state.transposed, out=halved)
            yield Piece(halved, counts)
            return
        frames = time_conv.take(len(left), state)
        conv(left, state, into=frames)
        if state.first:
            yield Piece(join.begin(frames, source, state), counts)
        else:
            yield from join.put(frames, source, counts, state)

    def _leave(self, made: Piece) -> torch.Tensor:
        """Latents of all frames that the last stage tells of, repeated ones too."""
        fresh = None if made.frames is None else self._encoder.leave(made.frames, self._state)
        sources: list[tuple[torch.Tensor, int]] = []
        index = 0
        for count in made.counts:
            if count == 0 and fresh is not None:
                self._last, index = (fresh, index), index + 1
            assert self._last is not None, "a video's first frame equals none before it"
            sources.append(self._last)
        return gathered(sources)


class _Encoder(nn.Module):
    """What Wan's checkpoints keep under ``encoder.``; `WanEncoder` runs it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        stages, seen = architecture.down_stages, architecture.kernel_frames
        patch, last = architecture.encoder_patch, stages[-1].channels
        self.conv1 = PixelConv(
            architecture.input_channels * patch**2,
            stages[0].in_channels,
            patch=patch,
            scale=stages[0].scale,
            kernel_frames=seen,
        )
        if architecture.residual:
            self.downsamples = nn.ModuleList([DownBlock(stage, seen) for stage in stages])
        else:
            self.downsamples = nn.ModuleList([m for stage in stages for m in down_modules(stage, seen)])
        self.middle = nn.ModuleList(middle_modules(last, seen))
        self.output = RMSNorm(last), CausalConv3d(last, 2 * architecture.z_dim, scale=1, kernel=(seen, 3, 3))
        # "0" and "2" are the indices of the published nn.Sequential.
        self.head = nn.ModuleDict(dict(zip(("0", "2"), self.output, strict=True)))


class WanEncoder(nn.Module):
    """Pixels in, latents' means out, in steps of time; strict about its state dict (Wan's original keys)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv1 = PointwiseConv(2 * architecture.z_dim, 2 * architecture.z_dim)
        self.encoder = _Encoder(architecture)

    def stages(self) -> list[DownStageRun]:
        """The stages, fine to coarse; the first convolution belongs to the first, the middle block to the last."""
        residual = self.architecture.residual
        modules: list[Any] = list(self.encoder.downsamples)
        runs: list[DownStageRun] = []
        for i, stage in enumerate(self.architecture.down_stages):
            if residual:
                own = list(modules.pop(0).downsamples)
            else:
                own = [modules.pop(0) for _ in range(stage.blocks + (stage.downsample is not None))]
            exit = own.pop() if stage.downsample else None
            tail: list[Any] = list(self.encoder.middle) if exit is None else []
            conv = self.encoder.conv1 if i == 0 else None
            runs.append(DownStageRun(conv, own, exit, tail, shortcut=residual, head=exit is None))
        return runs

    def convolutions(self) -> list[CausalConv3d | DownConv]:
        """All layers that see more than one position; the others are matrix products, and take little time."""
        found = (module for module in self.modules() if isinstance(module, (CausalConv3d, DownConv)))
        return [module for module in found if module.kind.kernel != (1, 1, 1)]

    def page_needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that an encode of ``chunk`` frames at once writes its convolutions' inputs to."""
        stages = (stage.needs(chunk, image=image) for stage in self.stages())
        return add_needs([*stages, self.encoder.output[1].needs(chunk, image=image)])

    def pages(
        self,
        rows: int,
        columns: int,
        *,
        chunk: int,
        keeps: bool,
        dtype: torch.dtype,
        device: torch.device,
        lists: SlotLists | None = None,
    ) -> dict[PageKey, Pages]:
        """Pages for a video of ``rows`` x ``columns`` latents; ``lists`` of earlier ones save time."""
        needs = self.page_needs(chunk, image=not keeps)
        return make_pages(needs, rows, columns, videos=1, keeps=keeps, dtype=dtype, device=device, lists=lists)

    def begin(self, state: StreamState, chunk: int, margins: Margins | None = None) -> Encoding:
        """Begins a video.

        Args:
            state: a fresh one, with pages for this ``chunk``.
            chunk: frames at once, >= 1.
            margins: what pixels have beyond this shard's rows and columns.
        """
        return Encoding(self, state, chunk, margins or Margins())

    def leave(self, x: torch.Tensor, state: StreamState) -> torch.Tensor:
        """The means ``[t, h, w, z]`` of what the last stage makes."""
        norm, conv = self.encoder.output
        frames = norm_silu_frames(x, norm, conv, state)
        return self.conv1(conv(frames, state), first=self.architecture.z_dim)
