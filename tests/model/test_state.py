"""The shared workspace and the feature caches. All of it is exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from wan_vae_parallel.model.state import DecodeState, WholePicture, Workspace


def border_of(buffer, border):
    """The values of ``buffer`` outside its interior."""
    inside = torch.zeros(buffer.shape, dtype=torch.bool)
    inside[:, border:-border, border:-border] = True
    return buffer[~inside]


def workspace():
    return Workspace(torch.float32, torch.device("cpu"))


# (frames, rows, columns, channels, border); any may follow any.
TAKES = [
    (3, 4, 6, 8, 1),
    (6, 4, 6, 8, 1),  # more frames of the same size
    (3, 6, 4, 8, 1),  # as many elements in another shape: old interior lies where the new border is
    (3, 4, 6, 8, 0),  # no border at all: everything is written
    (3, 8, 12, 4, 1),  # the next resolution, more elements: the memory grows
    (1, 1, 1, 8, 1),  # the smallest
    (3, 4, 6, 8, 2),  # a wider border
]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(TAKES, TAKES)))
def test_borders_are_zero_whatever_used_the_memory_before(before, after):
    space = workspace()
    for *shape, border in (before, after, before):
        buffer = space.take(*shape, border=border)
        frames, rows, columns, channels = shape
        assert buffer.shape == (frames, rows + 2 * border, columns + 2 * border, channels)
        assert buffer.is_contiguous()
        if border:
            assert not border_of(buffer, border).any()
            # What a producer may leave: anything, in the interior alone.
            buffer[:, border:-border, border:-border] = math.nan
        else:
            buffer.fill_(math.nan)


def test_the_memory_is_shared_by_all_takes_that_fit():
    space = workspace()
    largest = space.take(4, 8, 8, 8, border=1)
    assert space.take(3, 4, 4, 8, border=1).data_ptr() == largest.data_ptr()
    assert space.take(4, 8, 8, 8, border=0).data_ptr() == largest.data_ptr()


def test_a_cache_returns_what_was_kept_and_zeros_before_that():
    state = DecodeState(edges=WholePicture(), workspace=workspace())
    conv, other = nn.Identity(), nn.Identity()
    past = torch.full((2, 3, 3, 4), math.nan)
    state.load_past(conv, past)
    assert not past.any()  # nothing seen: zeros, not what lay in the buffer

    first, second = torch.randn(2, 3, 3, 4), torch.randn(2, 3, 3, 4)
    for seen in (first, second):  # the first is copied, the second written over it
        buffer = seen.clone()
        state.keep_past(conv, buffer)
        buffer.fill_(math.nan)  # the workspace goes on to others: the cache must not lie in it
        state.load_past(conv, past)
        assert torch.equal(past, seen)
    state.load_past(other, past)
    assert not past.any()  # each convolution has its own


def test_the_last_step_keeps_nothing():
    state = DecodeState(edges=WholePicture(), workspace=workspace())
    conv = nn.Identity()
    state.keep_past(conv, torch.randn(2, 3, 3, 4))
    state.last = True
    state.keep_past(conv, torch.randn(2, 3, 3, 4))
    assert not state._past
    state.keep_past(nn.Identity(), torch.randn(2, 3, 3, 4))  # one that never kept anything
    assert not state._past


def test_the_whole_picture_has_zeros_around_it_and_all_rows():
    buffer = torch.randn(1, 3, 3, 2)
    before = buffer.clone()
    WholePicture().fill_halo(buffer)
    assert torch.equal(buffer, before)  # the zeros are in place already
    assert WholePicture().all_rows(buffer) is buffer
