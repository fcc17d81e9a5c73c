"""Pages of frames: borders, slots, past frames. All of it is exact."""

from __future__ import annotations

import math

import pytest
import torch

from wan_vae_parallel.model.state import Frames, PageKey, PageNeed, Pages, SlotLists, StreamState, WholePicture

KEY = PageKey(scale=2, channels=3, border=1)
CPU = torch.device("cpu")


def pages(slots=7, key=KEY, users=1):
    return Pages(slots, 4, 5, key, users=users, dtype=torch.float32, device=CPU, lists=SlotLists(CPU))


@pytest.mark.parametrize("border", [0, 1])
def test_an_arena_has_a_border_around_each_frame_and_begins_as_zeros(border):
    arena = pages(key=PageKey(2, 3, border)).arena
    assert arena.shape == (7, 4 + 2 * border, 5 + 2 * border, 3)
    assert arena.is_contiguous()
    assert not arena.any()


def test_slots_are_handed_out_once_until_they_come_back_and_the_blank_one_when_nobody_needs_it():
    space = pages(users=2)
    first, second = space.take(4), space.take(2)
    assert {*first.slots, *second.slots} == set(range(1, 7))
    with pytest.raises(AssertionError, match="too small"):
        space.take(1)
    space.give((0, 0, *second.slots))  # a past of blank frames comes along
    assert set(space.take(2).slots) == set(second.slots)
    space.leave_blank()
    with pytest.raises(AssertionError, match="too small"):
        space.take(1)
    space.leave_blank()
    assert space.take(1).slots == (0,)
    space.arena.normal_()
    space.reset()
    assert not space.arena[0].any()
    assert set(space.take(6).slots) == set(range(1, 7))
    assert 0 in pages(users=0).take(7).slots  # where nobody has a past


def test_the_index_is_the_slots_and_made_once_for_all_pages():
    space = pages()
    frames = Frames(space, (5, 3, 4))
    assert frames.index.tolist() == [5, 3, 4]
    assert frames.index.dtype == torch.int32
    assert Frames(space, (5, 3, 4)).index is frames.index
    others = Pages(7, 2, 3, KEY, users=1, dtype=torch.float32, device=CPU, lists=space.lists)
    assert Frames(others, (5, 3, 4)).index is frames.index
    assert [part.slots for part in frames.split(2)] == [(5, 3), (4,)]


def test_lists_of_slots_do_not_pile_up():
    lists = SlotLists(CPU)
    for first in range(3 * SlotLists.MOST):
        assert lists((first, 1)).tolist() == [first, 1]
    assert len(lists._lists) <= SlotLists.MOST


@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_convolution_sees_blank_frames_and_then_what_it_saw_last(new):
    space = pages(slots=2 + new)  # the blank frame has the place of one that will be kept
    state = StreamState({KEY: space}, edges=WholePicture())
    conv, seen_values = object(), [0.0, 0.0]
    for step in range(6):  # again and again: no slot is lost
        frames = state.take(KEY, new)
        for i, slot in enumerate(frames.slots):
            space.arena[slot].fill_(math.nan).fill_(1 + step * new + i)
            seen_values.append(float(1 + step * new + i))
        seen = state.with_past(conv, frames, 2)
        assert [space.arena[slot, 0, 0, 0].item() for slot in seen.slots] == seen_values[-2 - new :]
        state.keep_past(conv, seen, 2)
    assert 0 in {*space.take(new).slots, *state.with_past(conv, Frames(space, ()), 2).slots}


def test_two_convolutions_have_a_past_each():
    space = pages(users=2)
    state = StreamState({KEY: space}, edges=WholePicture())
    for conv in ("one", "other"):
        frames = state.take(KEY, 2)
        state.keep_past(conv, state.with_past(conv, frames, 2), 2)
    past = [state.with_past(conv, Frames(space, ()), 2).slots for conv in ("one", "other")]
    assert len({*past[0], *past[1]}) == 4


def test_an_image_keeps_nothing():
    space = pages(slots=3)
    state = StreamState({KEY: space}, edges=WholePicture(), keeps=False)
    for conv in ("one", "other", "third"):
        frames = state.take(KEY, 2)
        state.keep_past(conv, state.with_past(conv, frames, 2), 2)


def test_needs_add_up_where_frames_stay_and_take_turns_where_they_pass():
    both = PageNeed(convs=1, kept=2, passing=3) | PageNeed(convs=1, kept=2, waiting=6, passing=1)
    assert both == PageNeed(convs=2, kept=4, passing=3, waiting=6)
    assert both.slots(1, keeps=True) == 4 + 3
    assert both.slots(2, keeps=True) == 2 * 4 + 3 + 6
    assert both.slots(1, keeps=False) == 3  # images have no past, not even a blank one
    assert PageNeed(passing=3).slots(1, keeps=False) == 3


def test_the_whole_picture_has_zeros_around_it_and_all_rows():
    frames = pages().take(2)
    frames.arena.normal_()
    before = frames.arena.clone()
    WholePicture().fill_halo(frames)
    assert torch.equal(frames.arena, before)  # the zeros are in place already
    rows = torch.randn(1, 3, 3, 2)
    assert WholePicture().all_rows(rows) is rows
