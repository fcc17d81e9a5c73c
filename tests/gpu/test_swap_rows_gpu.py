"""The kernel that swaps border rows, with a neighbour on both sides: three devices' parts, played on one.

On a GPU they run on three streams, in Triton's interpreter in three processes; see kernel_tests.py. In the interpreter
the two instructions that order memory between devices are plain loads and stores, as x86 orders them itself.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from tests.gpu.kernel_tests import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS
triton = pytest.importorskip("triton", reason="there are no kernels without Triton")
import triton.language as tl  # noqa: E402

from wan_vae_parallel.ops.kernels import swap_rows as kernels  # noqa: E402

RANKS = 3
BOX = 4096


@triton.jit
def _plain_tell(signal, number):
    tl.store(signal, number)


@triton.jit
def _plain_look(signal):
    return tl.load(signal)


class Rank:
    """One device's part: frames whose values say whose they are and of which swap."""

    def __init__(self, rank, boxes, signals, columns, channels):
        self.rank, self.boxes, self.signals = rank, boxes, signals
        self.arena = torch.full((9, 5, columns, channels), torch.nan, device=boxes[0].device)
        self.neighbours = [other if 0 <= other < RANKS else None for other in (rank - 1, rank + 1)]
        self.wrong = torch.zeros((), dtype=torch.int64, device=boxes[0].device)

    def swap(self, number):
        """One swap, and a look at all rows that it may have touched."""
        slots = torch.arange(number % 5, 9, 1 + number % 3, dtype=torch.int32, device=self.arena.device)
        chosen = slots.long()
        self.arena[chosen] = 1000.0 * self.rank + number
        above, below = (None if one is None else (self.boxes[one], self.signals[one]) for one in self.neighbours)
        kernels.swap_rows(
            self.arena, slots, self.boxes[self.rank], self.signals[self.rank], above=above, below=below,
            numbers=(number, number),
        )  # fmt: skip
        first, last = (self.rank if one is None else one for one in self.neighbours)
        for row, whose in ((0, first), (slice(1, -1), self.rank), (-1, last)):
            self.wrong += (self.arena[chosen, row] != 1000.0 * whose + number).sum()


def memory():
    """Boxes and signals of all ranks."""
    boxes = [torch.full((2, 2, BOX), torch.nan, device=DEVICE) for _ in range(RANKS)]
    return boxes, [torch.zeros(2 * kernels.PROGRAMS, dtype=torch.int32, device=DEVICE) for _ in range(RANKS)]


def _in_a_process(rank, boxes, signals, answers):
    kernels._tell, kernels._look = _plain_tell, _plain_look
    kernels.PROGRAMS = 2  # it runs them one after the other
    part = Rank(rank, boxes, signals, 4, 16)
    for number in range(1, 7):
        part.swap(number)
    answers.put((rank, int(part.wrong)))


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU")
def test_three_processes_swap_rows_in_the_interpreter():
    boxes, signals = memory()
    for tensor in (*boxes, *signals):
        tensor.share_memory_()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_in_a_process, args=(rank, boxes, signals, answers)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * RANKS
    assert sorted(answers.get() for _ in processes) == [(rank, 0) for rank in range(RANKS)]


@pytest.mark.skipif(INTERPRETED, reason="there is no GPU")
@pytest.mark.parametrize(("columns", "channels"), [(5, 3), (30, 16)])
def test_three_streams_swap_rows_whichever_lags(columns, channels):
    boxes, signals = memory()
    streams = [torch.cuda.Stream(DEVICE) for _ in range(RANKS)]
    parts = [Rank(rank, boxes, signals, columns, channels) for rank in range(RANKS)]
    torch.cuda.synchronize(DEVICE)
    lag = torch.Generator().manual_seed(1)
    for number in range(1, 200):
        for stream, part in zip(streams, parts, strict=True):
            with torch.cuda.stream(stream):
                if torch.rand((), generator=lag) < 0.2:
                    torch.cuda._sleep(int(1e6 * torch.rand((), generator=lag)))
                part.swap(number)
    torch.cuda.synchronize(DEVICE)
    assert [int(part.wrong) for part in parts] == [0] * RANKS
