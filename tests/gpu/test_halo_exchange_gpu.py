"""The kernel that swaps border rows, with a neighbour on both sides: three devices' parts, played on one.

Each has a process, between which a GPU switches every few milliseconds. In Triton's interpreter (see kernel_tests.py)
the two instructions that order memory between devices are plain loads and stores, as x86 orders them itself.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.gpu.kernel_tests import DEVICE, INTERPRETED, MARKS, here
from tests.parallel import launch

pytestmark = MARKS
triton = pytest.importorskip("triton", reason="there are no kernels without Triton")
# E402: what follows imports Triton, which may be missing.
import triton.language as tl  # noqa: E402

from wan_vae_parallel.ops.kernels import halo_exchange as kernels  # noqa: E402
from wan_vae_parallel.parallel.peer_memory import _as_int32  # noqa: E402

RANKS = 3
BOX = 4096
# Numbers wrap in the middle of a test.
_FIRST = 2**31 - 4
# Some of the GPU's turns among processes, in which the others come around.
_PAUSE_NANOSECONDS = 10_000_000


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
        kernels.exchange_halo(
            self.arena, slots, self.boxes[self.rank], self.signals[self.rank], above=above, below=below,
            numbers=(_as_int32(_FIRST + number),) * 2,
        )  # fmt: skip
        first, last = (self.rank if one is None else one for one in self.neighbours)
        for row, whose in ((0, first), (slice(1, -1), self.rank), (-1, last)):
            self.wrong += (self.arena[chosen, row] != 1000.0 * whose + number).sum()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(RANKS, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def swap_often(rank, world_size, swaps, columns, channels, slow):  # noqa: ARG001 (as the launcher calls it)
    """How many values were wrong."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(kernels, "_tell", _plain_tell)
            patch.setattr(kernels, "_look", _plain_look)
            patch.setattr(kernels, "_nanoseconds", time.monotonic_ns)
            # It runs them one after the other, so that of several none can be overtaken.
            patch.setattr(kernels, "PROGRAMS", 1 if slow else 2)
        # A slow one in the middle: its neighbours' next rows arrive before it has taken these.
        patch.setattr(kernels, "PAUSE", _PAUSE_NANOSECONDS if slow and rank == 1 else 0)
        kernels._plan.cache_clear()
        boxes = launch.shared(torch.full((2, 2, BOX), torch.nan, device=DEVICE))
        signals = launch.shared(torch.zeros(2 * kernels.PROGRAMS, dtype=torch.int32, device=DEVICE))
        part = Rank(rank, boxes, signals, columns, channels)
        lag = torch.Generator().manual_seed(rank)
        for number in range(swaps):
            if not (INTERPRETED or slow) and torch.rand((), generator=lag) < 0.2:
                torch.cuda._sleep(int(1e6 * torch.rand((), generator=lag)))
            part.swap(number)
        kernels._plan.cache_clear()
        wrong = int(part.wrong)
        dist.barrier(launch.group())  # until here neighbours may write
        return wrong


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("swaps", "columns", "channels"), here((6, 4, 16), gpu=[(100, 5, 3), (100, 28, 16)]))
def test_three_ranks_swap_rows_whichever_lags(ranks, swaps, columns, channels, slow):
    assert ranks.run(swap_often, swaps, columns, channels, slow) == [0] * RANKS


@pytest.mark.skipif(INTERPRETED, reason="takes 4 GiB")
def test_a_frame_may_have_more_than_2_to_the_31_values():
    columns, channels, rows = 4096, 8, 2**16 + 8
    arena = torch.zeros((1, rows, columns, channels), dtype=torch.bfloat16, device=DEVICE)
    arena[0, -2] = 2
    own, theirs = (torch.zeros((2, 2, columns * channels), dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    own[1, 1] = 3  # what has come from below
    signals, their_signals = (torch.ones(2 * kernels.PROGRAMS, dtype=torch.int32, device=DEVICE) for _ in range(2))
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    kernels.exchange_halo(arena, slots, own, signals, above=None, below=(theirs, their_signals), numbers=(0, 1))
    assert (arena[0, -1] == 3).all()
    assert (arena[0, :-2] == 0).all()
    assert (theirs[1, 0] == 2).all()
