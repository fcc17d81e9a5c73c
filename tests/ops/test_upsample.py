"""Nearest upsampling in space and time, and Wan 2.2's shortcut, against plain references. All of it is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wan_vae_parallel.ops.upsample import add_duplicated, interleave_time, upsample_nearest


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_upsample(x):
    """``[T, H, W, C]`` to twice its rows and columns, by the module that Wan's code uses."""
    return nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def plain_interleave(x):
    """``[T, H, W, 2C]`` to ``[2T, H, W, C]`` as Wan's code does it: reshape, stack, reshape."""
    frames, rows, columns, channels = x.shape
    x = x.permute(3, 0, 1, 2).reshape(2, channels // 2, frames, rows, columns)
    return torch.stack((x[0], x[1]), 2).reshape(channels // 2, frames * 2, rows, columns).permute(1, 2, 3, 0)


def plain_duplicated(x, out_channels, time_factor, drop_first):
    """Wan 2.2's DupUp3D: repeat channels, read them as (channel, frame, row, column)."""
    frames, rows, columns, channels = x.shape
    spread = x.permute(3, 0, 1, 2).repeat_interleave(out_channels * time_factor * 4 // channels, dim=0)
    spread = spread.view(out_channels, time_factor, 2, 2, frames, rows, columns).permute(0, 4, 1, 5, 2, 6, 3)
    spread = spread.reshape(out_channels, frames * time_factor, 2 * rows, 2 * columns).permute(1, 2, 3, 0)
    return spread[time_factor - 1 :] if drop_first else spread


@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 4, 6, 8),  # space alone
        (3, 2, 4, 6, 8),  # frames that a time convolution doubled
        (1, 2, 3, 5, 16),  # one step, odd sides
        (2, 1, 1, 1, 1),  # one position, one channel
    ],
)
def test_upsample_nearest_writes_all_of_an_interior_and_nothing_else(shape):
    frames, phases, rows, columns, channels = shape
    # Strided as interleave_time leaves it: phases lie among the channels.
    x = random(frames, rows, columns, phases, channels).permute(0, 3, 1, 2, 4)
    buffer = torch.full((frames * phases, 2 * rows + 2, 2 * columns + 2, channels), math.nan)
    interior = buffer[:, 1:-1, 1:-1]
    upsample_nearest(x, out=interior)
    assert torch.equal(interior, plain_upsample(x.reshape(frames * phases, rows, columns, channels)))
    assert buffer.isnan().sum() == buffer.numel() - interior.numel()


@pytest.mark.parametrize(
    "shape",
    [
        (3, 8, 12, 8),  # phases forgotten
        (6, 8, 12, 4),  # other channels
        (6, 4, 12, 8),  # rows not doubled
        (6, 8, 6, 8),  # columns not doubled
    ],
)
def test_upsample_nearest_refuses_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="to twice its rows and columns"):
        upsample_nearest(random(3, 2, 4, 6, 8), out=torch.empty(shape))


@pytest.mark.parametrize("shape", [(3, 4, 6, 16), (1, 3, 5, 2), (2, 1, 1, 8)])
def test_interleave_time_alternates_the_halves_of_the_channels(shape):
    x = random(*shape)
    interleaved = interleave_time(x)
    assert interleaved.data_ptr() == x.data_ptr()  # a view: no pass over memory
    assert torch.equal(interleaved.flatten(0, 1), plain_interleave(x))


@pytest.mark.parametrize(
    ("channels", "out_channels", "time_factor", "drop_first", "frames"),
    [
        (32, 32, 2, False, 3),  # first stages of Wan 2.2: each channel fills its own eight places
        (32, 32, 2, True, 1),  # the video's first frame: only the later half of the places
        (32, 16, 1, False, 3),  # third stage: two channels share an output's four places
        (32, 16, 1, True, 1),  # nothing to drop where time isn't doubled
        (32, 16, 1, True, 3),  # so more than one frame is fine there
        (32, 16, 2, False, 2),  # two channels to an output, over frames as well
        (32, 16, 2, True, 1),
        (32, 8, 1, False, 2),  # every place has its own channel
        (8, 8, 1, False, 1),  # one channel for all four
        (16, 2, 2, False, 2),  # eight channels, eight places
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (3, 5), (1, 1)])
def test_add_duplicated_adds_what_dup_up_3d_makes(
    channels, out_channels, time_factor, drop_first, frames, rows, columns
):
    x = random(frames, rows, columns, channels)
    shortcut = plain_duplicated(x, out_channels, time_factor, drop_first)
    before = random(*shortcut.shape, seed=1)
    out = before.clone()
    add_duplicated(x, time_factor=time_factor, drop_first=drop_first, out=out)
    assert torch.equal(out, before + shortcut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_add_duplicated_rounds_once_in_other_dtypes(dtype):
    x = random(2, 3, 5, 8).to(dtype)
    shortcut = plain_duplicated(x, 8, 2, False)
    before = random(*shortcut.shape, seed=1).to(dtype)
    out = before.clone()
    add_duplicated(x, time_factor=2, drop_first=False, out=out)
    assert torch.equal(out, before + shortcut)


@pytest.mark.parametrize(
    ("frames", "channels", "time_factor", "drop_first", "out_shape"),
    [
        (2, 8, 2, False, (3, 6, 10, 8)),  # a frame too few
        (2, 8, 2, False, (4, 6, 10, 3)),  # output channels that don't divide the input's
        (2, 128, 2, False, (4, 6, 10, 8)),  # more channels than an output has places
        (2, 8, 2, False, (4, 6, 9, 8)),  # columns not doubled
        (2, 8, 2, False, (4, 3, 10, 8)),  # rows not doubled
        (2, 8, 2, True, (3, 6, 10, 8)),  # the first frame comes alone or not at all
        (1, 8, 2, True, (2, 6, 10, 8)),  # nothing dropped
    ],
)
def test_add_duplicated_refuses_shapes_that_do_not_fit(frames, channels, time_factor, drop_first, out_shape):
    out = torch.zeros(out_shape)
    with pytest.raises(ValueError, match="can't spread"):
        add_duplicated(random(frames, 3, 5, channels), time_factor=time_factor, drop_first=drop_first, out=out)
    assert not out.any()  # refused before anything was added
