"""The whole encoder: a chain of stages through which a video passes in steps of time, each half as fine.

T frames, t frames of a step, H rows of this shard, W columns, C channels, h x w latent rows and columns, z channels

Frames that equal the one before them are not computed again. Each frame comes with a count: how many frames right
before it equal it. A causal convolution over three frames gives equal results where its three inputs are, so a count
falls by two in it; a stage of D of them has nothing new to compute from a count of 2 D + 1 on. What a stage makes of a
frame has a tensor if its count is 0, and is known already if not.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture, DownStage
from ..ops.pixels import Margins
from ..ops.shortcut import add_averaged
from .blocks import Block, Needs, ResidualBlock, add_needs, middle_modules
from .layers import CausalConv3d, DownConv, PixelConv, PointwiseConv, RMSNorm, TimeDownConv, norm_silu_frames
from .state import Frames, PageKey, PageNeed, Pages, SlotLists, StreamState, make_pages

# Convolutions over three frames in a residual block.
_BLOCK_DEPTH = 2


@dataclass(frozen=True)
class Piece:
    """Frames that follow those of the piece before.

    Attributes:
        frames: ``[n, ...]``, those of them that differ from the one before; None if none does.
        counts: of each frame, how many right before it equal it; n of these are 0.
    """

    frames: torch.Tensor | None
    counts: tuple[int, ...]


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
        # Passing: what the last block reads and what it writes.
        own = {self.conv[0].key: PageNeed(passing=2 * chunk)}
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


class Line:
    """Frames that wait in front of a stage.

    Args:
        depth: convolutions over three frames that the stage makes of each.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._waiting: deque[tuple[torch.Tensor | None, int, int]] = deque()
        self._last: torch.Tensor | None = None

    def put(self, piece: Piece) -> None:
        """Has the frames of ``piece`` wait behind those that do."""
        index = 0
        for count in piece.counts:
            if count:
                self._waiting.append((None, 0, count))
            else:
                self._waiting.append((piece.frames, index, 0))
                index += 1

    @property
    def waits(self) -> bool:
        """Whether any frame waits, new or repeated."""
        return bool(self._waiting)

    @property
    def known(self) -> bool:
        """Whether the next frame is one that the stage needs not compute."""
        return bool(self._waiting) and self._waiting[0][2] > 2 * self._depth

    def ready(self, most: int) -> int:
        """How many frames there are for the stage to compute, counted up to ``most``.

        Those in front of a known one count as so many: there will not be more of them.
        """
        found = 0
        for _, _, count in self._waiting:
            if count > 2 * self._depth:
                return most if found else 0
            found += 1
            if found == most:
                break
        return found

    def take(self, most: int) -> Piece:
        """Takes frames out that the stage is to compute, at most so many; or those that it needs not, if they are next.

        Returns:
            The frames to compute (whether new or repeated), which are the caller's to write over; and the counts of
            all that were taken, as they come in.
        """
        sources: list[tuple[torch.Tensor, int]] = []
        counts = []
        last = None if self._last is None else (self._last, 0)
        known = self.known
        while self._waiting and self.known == known and len(sources) < most:
            tensor, index, count = self._waiting[0]
            self._waiting.popleft()
            last = last if tensor is None else (tensor, index)
            counts.append(count)
            if not known:
                assert last is not None, "a video's first frame equals none before it"
                sources.append(last)
        frames = gathered(sources) if sources else None
        if frames is not None and self._last is not None and frames.data_ptr() == self._last.data_ptr():
            frames = frames.clone()  # which is to stay as it is
        if last is not None:
            # The stage writes over what it gets, and the next frame may equal it.
            tensor, index = last
            if tensor is not self._last:
                self._last = tensor[index : index + 1].clone()
        return Piece(frames, tuple(counts))


def gathered(sources: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Frames of one tensor or several, one after the other; a view where they lie so already."""
    runs: list[list[Any]] = []
    for tensor, index in sources:
        if runs and runs[-1][0] is tensor and runs[-1][2] == index:
            runs[-1][2] += 1
        else:
            runs.append([tensor, index, index + 1])
    parts = [tensor[start:stop] for tensor, start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Join:
    """Frames that wait for their other half in front of a time convolution, with what a shortcut adds to the result.

    Args:
        conv: the convolution.
        shortcut: whether there is one.
    """

    def __init__(self, conv: TimeDownConv, *, shortcut: bool) -> None:
        self._conv = conv
        self._shortcut = shortcut
        # The first of two, if it has come: its place, unless it equals the frame before, and what the stage got.
        self._first_half: tuple[Frames | None, tuple[torch.Tensor, int] | None] | None = None
        # The last frame that differed from the one before it.
        self._newest: Frames | None = None
        self._source: tuple[torch.Tensor, int] | None = None
        # To be convolved together; and the counts of results so far.
        self._places: list[Frames] = []
        self._sources: list[tuple[torch.Tensor, int]] = []
        self._made: list[int] = []

    def begin(self, frames: Frames, source: torch.Tensor, state: StreamState) -> torch.Tensor:
        """The video's first frame, or images, each of which makes one alone: ``[n, H, W, C]``."""
        alone = frames.arena.index_select(0, frames.index)
        self._newest, self._source = frames, (source, 0) if self._shortcut else None
        self._conv.begin(frames, state)
        if self._shortcut:
            for one, out in zip(source.split(1), alone.split(1), strict=True):
                add_averaged(one, time_factor=2, transposed=state.transposed, out=out)
        return alone

    def put(
        self, frames: Frames | None, source: torch.Tensor | None, counts: Sequence[int], state: StreamState
    ) -> Iterator[Piece]:
        """Makes one frame of each two.

        Args:
            frames: those whose count is 0.
            source: what the stage got for these, ``[n, 2H, 2W, C]``.
            counts: of all.
            state: the video's.
        """
        places = iter(frames.split(1) if frames else ())
        index = 0
        for count in counts:
            place, before = None, self._newest
            if count == 0:
                place = self._newest = next(places)
                if self._shortcut:
                    assert source is not None, "frames come with what they were made of"
                    self._source = source, index
                index += 1
            if self._first_half is None:
                self._first_half = place, self._source
                continue
            first, first_source = self._first_half
            self._first_half = None
            # One of two equals the one before it where its three inputs do.
            self._made.append(max(0, count // 2 - 1))
            if self._made[-1]:
                continue
            copied = first is None or place is None
            self._places += [first or self._copy(before, state), place or self._copy(self._newest, state)]
            if self._shortcut:
                assert first_source is not None
                assert self._source is not None
                self._sources += [first_source, self._source]
            if copied:
                yield from self._convolved(state)
        yield from self._convolved(state)

    def _copy(self, frame: Frames | None, state: StreamState) -> Frames:
        """``frame`` in a place of its own: each place is given back once."""
        assert frame is not None, "a video's first frame equals none before it"
        copy = self._conv.take(1, state)
        copy.arena[copy.slots[0]].copy_(frame.arena[frame.slots[0]])
        return copy

    def _convolved(self, state: StreamState) -> Iterator[Piece]:
        made, self._made = tuple(self._made), []
        if not made:
            return
        if not self._places:
            yield Piece(None, made)
            return
        places, self._places = self._places, []
        frames = Frames(places[-1].pages, tuple(slot for place in places for slot in place.slots))
        joined = self._conv(frames, state)
        if self._shortcut:
            sources, self._sources = self._sources, []
            add_averaged(gathered(sources), time_factor=2, transposed=state.transposed, out=joined)
        if self._first_half is None or self._first_half[0] is None:
            # The last place is the one that is kept; the others may be given to other frames now.
            self._newest = places[-1]
        yield Piece(joined, made)


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
        if self.exit is not None:
            frames = state.take(self.exit.conv[0].key, len(x))
            last(x, state, into=frames)
            return frames, source
        x = last(x, state, keep=x is source and self.shortcut)
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
            x = stage.conv.convolve(x, state, patch=self._encoder.architecture.encoder_patch, margins=self._margins)
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
        colours, last = architecture.input_channels * architecture.encoder_patch**2, stages[-1].channels
        self.conv1 = PixelConv(colours, stages[0].in_channels, scale=stages[0].scale, kernel_frames=seen)
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
