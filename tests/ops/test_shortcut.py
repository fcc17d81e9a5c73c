"""Wan 2.2's shortcuts against DupUp3D and AvgDown3D written as in Wan's code. The first is exact."""

from __future__ import annotations

import pytest
import torch

from tests.ops.plain import plain_averaged, plain_duplicated, random, turned
from wan_vae_parallel.ops.shortcut import add_averaged, add_duplicated


@pytest.mark.parametrize(
    ("frames", "channels", "out_channels", "time_factor", "phases"),
    [
        (3, 32, 32, 2, (0, 2)),  # first stages of Wan 2.2: each channel fills its own eight places
        (1, 32, 32, 2, (1, 2)),  # the video's first frame: only the later half of the places
        (2, 32, 32, 2, (0, 1)),  # the earlier half, of several frames
        (2, 32, 32, 2, (1, 2)),  # the later half, of several frames
        (3, 32, 16, 1, (0, 1)),  # third stage: two channels share an output's four places
        (2, 32, 16, 2, (0, 2)),  # two channels to an output, over frames as well
        (1, 32, 16, 2, (1, 2)),  # and the second of them alone
        (2, 32, 8, 1, (0, 1)),  # every place has its own channel
        (1, 8, 8, 1, (0, 1)),  # one channel for all four
        (2, 16, 2, 2, (0, 2)),  # eight channels, eight places
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (3, 5), (1, 1)])
def test_adds_what_dup_up_3d_makes_in_these_phases(frames, channels, out_channels, time_factor, phases, rows, columns):
    x = random(frames, rows, columns, channels)
    shortcut = plain_duplicated(x, out_channels, time_factor, phases)
    before = random(*shortcut.shape, seed=1)
    out = before.clone()
    add_duplicated(x, time_factor=time_factor, phases=phases, out=out)
    assert torch.equal(out, before + shortcut)


@pytest.mark.parametrize(("out_channels", "time_factor", "phases"), [(8, 2, (0, 2)), (8, 2, (1, 2)), (4, 1, (0, 1))])
def test_transposed_is_the_same_with_rows_and_columns_in_each_others_place(out_channels, time_factor, phases):
    x = random(2, 3, 5, 16)
    shortcut = plain_duplicated(x, out_channels, time_factor, phases)
    before = random(*shortcut.shape, seed=1)
    out = before.transpose(1, 2).contiguous()
    x = x.transpose(1, 2).contiguous()
    add_duplicated(x, time_factor=time_factor, phases=phases, transposed=True, out=out)
    assert torch.equal(out.transpose(1, 2), before + shortcut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounds_once_in_other_dtypes(dtype):
    x = random(2, 3, 5, 8, dtype=dtype)
    shortcut = plain_duplicated(x, 8, 2, (0, 2))
    before = random(*shortcut.shape, seed=1, dtype=dtype)
    out = before.clone()
    add_duplicated(x, time_factor=2, phases=(0, 2), out=out)
    assert torch.equal(out, before + shortcut)


def test_leaves_its_input_alone():
    x = random(2, 3, 5, 8)
    before = x.clone()
    add_duplicated(x, time_factor=1, phases=(0, 1), out=torch.zeros(2, 6, 10, 8))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("channels", "time_factor", "phases", "out_shape"),
    [
        (8, 2, (0, 2), (3, 6, 10, 8)),  # a frame too few
        (8, 2, (0, 2), (4, 6, 10, 3)),  # output channels that don't divide the input's
        (128, 2, (0, 2), (4, 6, 10, 8)),  # more channels than an output has places
        (8, 2, (0, 2), (4, 6, 9, 8)),  # columns not doubled
        (8, 2, (0, 2), (4, 3, 10, 8)),  # rows not doubled
        (8, 2, (1, 2), (4, 6, 10, 8)),  # all phases' frames for one phase
        (8, 2, (1, 3), (4, 6, 10, 8)),  # a phase that there is not
        (8, 1, (0, 2), (4, 6, 10, 8)),  # nor here
        (8, 2, (1, 1), (0, 6, 10, 8)),  # no phase
        (8, 2, (-1, 1), (4, 6, 10, 8)),  # a negative one
    ],
)
def test_refuses_shapes_that_do_not_fit(channels, time_factor, phases, out_shape):
    out = torch.zeros(out_shape)
    with pytest.raises(ValueError, match="can't spread"):
        add_duplicated(random(2, 3, 5, channels), time_factor=time_factor, phases=phases, out=out)
    assert not out.any()  # refused before anything was added


# add_averaged.


AVERAGES = [
    (2, 16, 16, 1),  # first stage of Wan 2.2: each channel by itself
    (4, 8, 16, 2),  # its others: each frame goes to channels of its own
    (1, 8, 16, 2),  # the video's first frame, with a blank one before it
    (3, 16, 8, 1),  # two channels are averaged
    (2, 16, 8, 2),  # channels and frames
    (1, 16, 8, 2),  # where half of what is averaged is blank
    (1, 4, 16, 1),  # every value has its own channel
    (2, 24, 16, 1),  # groups of 6 that end within a channel
]


@pytest.mark.parametrize(("frames", "channels", "out_channels", "time_factor"), AVERAGES)
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (3, 5), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_adds_what_avg_down_3d_makes(frames, channels, out_channels, time_factor, rows, columns, transposed):
    x = random(frames, 2 * rows, 2 * columns, channels)
    shortcut = plain_averaged(x, out_channels, time_factor)
    before = random(*shortcut.shape, seed=1)
    out = (turned(before) if transposed else before).clone()
    kept = x.clone()
    add_averaged(turned(x) if transposed else x, time_factor=time_factor, transposed=transposed, out=out)
    result = turned(out) if transposed else out
    torch.testing.assert_close(result.double(), before.double() + shortcut, atol=1e-6, rtol=1e-6)
    assert torch.equal(x, kept)


def test_plain_averages_are_those_of_values_written_out():
    x = random(2, 2, 2, 3)
    # (channel, frame, row, column): four neighbours of one channel and frame.
    out = plain_averaged(x, 6, 2)
    for channel in range(3):
        for frame in range(2):
            mean = sum(x[frame, row, column, channel].double() for row in range(2) for column in range(2)) / 4
            torch.testing.assert_close(out[0, 0, 0, 2 * channel + frame], mean)
    out = plain_averaged(x[:1], 6, 2)
    assert not out[..., ::2].any()
    torch.testing.assert_close(out[0, 0, 0, 1::2], x[0].double().mean(dim=(0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_are_rounded_once_in_other_dtypes(dtype):
    x = random(4, 6, 10, 8, dtype=dtype)
    shortcut = plain_averaged(x, 16, 2)
    before = random(*shortcut.shape, seed=1, dtype=dtype)
    out = before.clone()
    add_averaged(x, time_factor=2, out=out)
    torch.testing.assert_close(out.double(), before.double() + shortcut, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("shape", "time_factor", "out_shape"),
    [
        ((3, 6, 10, 8), 2, (2, 3, 5, 8)),  # three frames are no pairs
        ((2, 5, 10, 8), 1, (2, 2, 5, 8)),  # odd rows
        ((2, 6, 9, 8), 1, (2, 3, 4, 8)),  # odd columns
        ((2, 6, 10, 8), 1, (1, 3, 5, 8)),  # a frame too few
        ((2, 6, 10, 8), 2, (2, 3, 5, 8)),  # one too many
        ((2, 6, 10, 8), 1, (2, 5, 3, 8)),  # rows and columns in each other's place
        ((2, 6, 10, 8), 1, (2, 3, 5, 12)),  # channels that don't divide what is averaged
    ],
)
def test_refuses_shapes_that_can_not_be_averaged(shape, time_factor, out_shape):
    out = torch.zeros(out_shape)
    with pytest.raises(ValueError, match="add_averaged can't take"):
        add_averaged(random(*shape), time_factor=time_factor, out=out)
    assert not out.any()
