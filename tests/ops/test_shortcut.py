"""Wan 2.2's shortcut against DupUp3D written as in Wan's code. All of it is exact."""

from __future__ import annotations

import pytest
import torch

from tests.ops.plain import plain_duplicated, random
from wan_vae_parallel.ops.shortcut import add_duplicated


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
