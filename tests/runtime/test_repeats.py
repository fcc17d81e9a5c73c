"""Frames that equal the one before them, as they come or looked for ahead, on the host and as on a GPU."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from wan_vae_parallel.runtime import repeats
from wan_vae_parallel.runtime.pieces import blocks, pieces

WAYS = {
    "as they come": repeats.counted,
    "beside": repeats._counted_beside,
    "at once": lambda parts: repeats._counted_at_once(list(parts)),
}


def video(*which):
    """Frames of 40x40 by number; equal numbers are equal frames."""
    frames = torch.rand(max(which) + 1, 40, 40, 3, generator=torch.Generator().manual_seed(1))
    return frames[list(which)]


@pytest.fixture(params=WAYS)
def counted(request):
    return WAYS[request.param]


@pytest.mark.parametrize("most", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ((0,), (0,)),
        ((0, 1, 2), (0, 0, 0)),
        ((0, 0, 0, 0, 0), (0, 1, 2, 3, 4)),
        ((0, 1, 1, 1, 0, 0, 2), (0, 0, 1, 2, 0, 1, 0)),
    ],
)
def test_counts_do_not_depend_on_the_parts_nor_on_who_looks(counted, which, expected, most):
    frames = video(*which)
    found = list(counted(blocks(frames, most)))
    assert sum((counts for _, counts in found), ()) == expected
    assert torch.equal(torch.cat([part for part, _ in found]), frames)


def test_one_value_makes_a_difference(counted):
    frames = video(0, 0, 0)
    frames[1, 17, 3, 2] += 1e-3  # beside what is looked at first
    assert [counts for _, counts in counted(blocks(frames, 1))] == [(0,), (0,), (0,)]


@pytest.mark.parametrize("ahead", [True, False])
def test_pieces_have_the_frames_that_differ(ahead):
    frames = video(0, 1, 1, 2, 2, 2)
    found = list(pieces(blocks(frames, 2), ahead=ahead))
    assert [piece.counts for piece in found] == [(0,), (0, 1), (0, 1), (2,)]
    assert [None if piece.frames is None else len(piece.frames) for piece in found] == [1, 1, 1, None]


def test_an_error_of_the_thread_reaches_who_asks(monkeypatch):
    def fails(*_):
        raise RuntimeError("no bytes")

    monkeypatch.setattr(repeats, "equal_bits", fails)
    with pytest.raises(RuntimeError, match="no bytes"):
        list(repeats.counted_ahead(blocks(video(0, 0), 1)))


def test_whoever_asks_no_more_leaves_no_thread(monkeypatch):
    def lookers():
        return [thread for thread in threading.enumerate() if thread.name == "wan-vae-parallel repeats"]

    monkeypatch.setattr(repeats, "equal_bits", lambda *_: time.sleep(0.05))
    found = repeats.counted_ahead(blocks(video(*[0] * 99), 1))
    next(found)
    assert lookers()
    found.close()
    assert not lookers()
