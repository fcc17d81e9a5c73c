"""How fast this GPU convolves: each candidate's setting of our kernels, and cuDNN, on the same kind of layer.

T frames, H rows, W columns, C channels in, O channels out

Shape  Four frames, 512 wide, as tall as keeps all multiprocessors busy for eight whole turns of the largest tile, so
       that no setting suffers from a turn that is not full; less tall where that would pass 384 MiB, but one turn.
Time   GPU events around single launches, of which the median counts. The contestants take turns, so that drifting
       clocks hit all alike. Random data: zeros draw less power and run faster.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
from collections.abc import Callable, Sequence

import torch

from ...cancel import check_cancelled
from ...errors import is_out_of_memory
from .. import conv as ops
from ..dispatch import KernelError, say_failed
from ..gpu import gpu
from ..layer_kinds import LayerKind, Measured
from . import conv, down_conv, head_conv, launch
from .launch import compile_all
from .progress import Progress
from .tiles import Tile, candidates

logger = logging.getLogger(__name__)

_FRAMES = 4
_COLUMNS = 512
_TURNS = 8
_MOST_BYTES = 384 * 2**20
_ROUNDS = 9
# About 1.5 ms in which the GPU waits, so that the host's launches are ahead of it for the rest of a round.
_HEAD_START_CYCLES = 3_000_000


@torch.inference_mode()
def measure(kinds: Sequence[LayerKind], dtype: torch.dtype, device: torch.device) -> dict[LayerKind, Measured]:
    """Compiles all candidates for ``kinds``, and times them and cuDNN one kind after the other.

    Args:
        kinds: of layers.
        dtype: bf16 or fp16.
        device: a GPU that kernels run on, with up to 512 MiB to spare, or 640 MiB without TMA.

    Raises:
        RuntimeError: something else than a single contestant failed; memory, above all.
    """
    with torch.cuda.device(device):

        def run() -> None:
            for kind in kinds:
                settings = candidates(kind, device)
                # Frames that hold a tile: smaller ones have kernels of their own.
                problem = _Problem(kind, 1, max(tile.positions for tile in settings), dtype, device)
                for tile in settings:
                    with contextlib.suppress(KernelError):  # one that failed before
                        problem.ours(tile)

        compile_all(run, device)
        found = {}
        try:
            with Progress(f"measuring kinds of layers on {device}, which is done once", len(kinds)) as progress:
                for kind in kinds:
                    found[kind] = _measured(kind, dtype, device)
                    progress.add()
            return found
        finally:
            torch.cuda.empty_cache()


class _Problem:
    """A layer of a kind, and frames of ``rows`` x ``columns`` for it."""

    def __init__(self, kind: LayerKind, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        # Its own generator: the host program's random numbers stay as they are.
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        kt, kh, kw = kind.kernel
        channels, out_channels, scale = kind.channels, kind.out_channels, kind.scale
        self.kind = kind
        seen = _frames_seen(kind)
        # `down_conv` reads two rows of three for each of its own, and has two borders all the same.
        step = 2 if kind.op == "down_conv" else 1
        self.arena = random(seen, rows * step + kh - 1, columns * step + kw - 1, channels)
        self.slots = torch.arange(seen, dtype=torch.int32, device=device)
        weight = random(out_channels, channels, *kind.kernel).div_((channels * kt * kh * kw) ** 0.5)
        self.weight = weight.contiguous(memory_format=torch.channels_last_3d)
        self.bias = random(out_channels)
        shape = _FRAMES * kind.halves, rows * scale, columns * scale, out_channels // kind.halves
        self.out = torch.empty(shape, dtype=dtype, device=device)
        if kind.op == "upsample_conv":
            self.folded = ops.fold_upsample_weight(self.weight.squeeze(2))
        if kind.op == "head_conv":
            self.spread_over = head_conv.tiling(_FRAMES, out_channels)
            self.spread = head_conv.spread_weight(self.weight, *self.spread_over, transposed=False)

    def ours(self, tile: Tile) -> None:
        """Our kernel with this setting."""
        arena, slots, bias, out = self.arena, self.slots, self.bias, self.out
        if self.kind.op == "upsample_conv":
            conv.upsample_conv(arena, slots, self.folded, bias, out=out, transposed=False, tile=tile)
        elif self.kind.op == "down_conv":
            down_conv.down_conv(
                arena, slots, self.weight.squeeze(2), bias, out=out, out_slots=None, transposed=False, tile=tile
            )
        elif self.kind.op == "head_conv":
            frames, rows = self.spread_over
            head_conv.head_conv(
                arena, slots, self.spread, bias, frames=frames, rows=rows, out=out, transposed=False, tile=tile
            )
        else:
            conv.conv(
                arena, slots, self.weight, bias, residual=None, out=out, out_slots=None, halves=self.kind.halves,
                time_stride=self.kind.time_stride, transposed=False, tile=tile,
            )  # fmt: skip

    def cudnn(self) -> None:
        """What `ops.conv` does otherwise: frames side by side, doubled one by one, and all that cuDNN wants before."""
        kind, arena, slots, bias = self.kind, self.arena, self.slots, self.bias
        if kind.op == "upsample_conv":
            ops.upsample_conv(arena, slots, self.weight.squeeze(2), bias, folded=None, cudnn=True)
        elif kind.op == "down_conv":
            ops.down_conv(arena, slots, self.weight.squeeze(2), bias, out=self.out, cudnn=True)
        else:
            ops.conv(
                arena, slots, self.weight, bias, out=self.out, halves=kind.halves, time_stride=kind.time_stride,
                cudnn=True,
            )  # fmt: skip


def _measured(kind: LayerKind, dtype: torch.dtype, device: torch.device) -> Measured:
    tiles = candidates(kind, device)
    rows = _rows(kind, tiles, gpu(device).processors, dtype.itemsize)
    problem = _Problem(kind, rows, _COLUMNS, dtype, device)
    found = _time(problem, tiles, device)
    if found.lost:
        # Giving up equal bits takes more than one bad moment.
        found = min(found, _time(problem, tiles, device), key=lambda one: one.cudnn / max(one.ours, 1e-9))
    logger.debug("%s: %s TFLOP/s, cuDNN %.0f", kind, [round(speed) for speed in found.tiles], found.cudnn)
    return found


def _time(problem: _Problem, tiles: Sequence[Tile], device: torch.device) -> Measured:
    contestants: list[Callable[[], None]] = [*(functools.partial(problem.ours, tile) for tile in tiles), problem.cudnn]
    reasons = [_why_not(call, f"{problem.kind}, contestant {i}", device) for i, call in enumerate(contestants)]
    running = [i for i, reason in enumerate(reasons) if not reason]
    if not running:
        raise RuntimeError(f"nothing runs {problem.kind} in {problem.arena.dtype} on {device}: {reasons[0]}")
    if running == [len(tiles)]:
        say_failed(device, reasons[0])
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in contestants]
    for turn in range(_ROUNDS):
        check_cancelled()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        first = turn % len(running)
        for i in running[first:] + running[:first]:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            contestants[i]()
            stop.record()
            events[i].append((start, stop))
    torch.cuda.synchronize(device)
    flops = problem.kind.flops * problem.out.numel() / problem.kind.out_channels
    speeds = [
        flops / statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e9 if pairs else 0.0
        for pairs in events
    ]
    return Measured(tuple(speeds[:-1]), speeds[-1])


def _why_not(call: Callable[[], None], name: str, device: torch.device) -> str:
    """Warms up; what kept that from working. A setting that a GPU does not take is no reason to have none."""
    check_cancelled()
    try:
        for _ in range(2):
            call()
        torch.cuda.synchronize(device)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.debug("%s does not run: %s", name, error)
        return str(error) if isinstance(error, KernelError) else launch.reason(name, error)
    return ""


def _frames_seen(kind: LayerKind) -> int:
    """Input frames of all output frames together."""
    return (_FRAMES - 1) * kind.time_stride + kind.kernel[0]


def _rows(kind: LayerKind, tiles: Sequence[Tile], processors: int, itemsize: int) -> int:
    """H, see above."""
    positions = max(tile.positions for tile in tiles)
    # Programs for as many positions of each frame as one of them takes.
    programs = _FRAMES * kind.halves * kind.scale**2
    if kind.op == "head_conv":
        together, rows = head_conv.tiling(_FRAMES, kind.out_channels)
        positions, programs = positions * rows, _FRAMES // together
    # The arena, its frames side by side, two of them doubled; our output, cuDNN's, and that in halves.
    doubled = 2 * 4 / _FRAMES if kind.op == "upsample_conv" else 0
    elements = kind.channels * (2 * _frames_seen(kind) / _FRAMES + doubled)
    if kind.op == "down_conv":  # four positions for one; frames side by side, with their borders and without
        elements = kind.channels * 3 * 4
    elements += (2 + kind.halves // 2) * kind.scale**2 * kind.out_channels
    turn = processors * positions / programs * _FRAMES * elements * itemsize
    turns = min(_TURNS, max(1, math.floor(_MOST_BYTES / turn)))
    of_a_frame = max(1, turns * processors // programs) * positions
    if kind.op == "down_conv":  # without borders between rows
        return max(1, of_a_frame // _COLUMNS)
    return max(1, (of_a_frame - _COLUMNS) // (_COLUMNS + kind.kernel[2] - 1) + 1)
