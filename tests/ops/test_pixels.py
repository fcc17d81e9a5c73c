"""Neighbourhoods of pixels against each of their values written out, and the convolution that they make of Wan's.

Places are exact, values too: each is one of a pixel, rounded once.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.plain import bits, changed_alone, inside, order, plain_taps, random, random_weight, turned
from wan_vae_parallel.ops.conv import conv
from wan_vae_parallel.ops.pixels import Margins, gather_taps, spread_pixel_weight, tap_channels

SIZE = (3, 4, 5)


def pixels_of(size, patch, colours=3, dtype=torch.float32):
    frames, rows, columns = size
    return random(frames, rows * patch, columns * patch, colours, dtype=torch.float64).sigmoid().to(dtype)


def gathered(pixels, patch, *, margins=None, transposed=False, dtype=torch.float32):
    """What `gather_taps` wrote into slots in no order, and nothing else."""
    margins = margins or Margins()
    frames, height, width, colours = pixels.shape
    shape = height // patch - margins.top - margins.bottom, width // patch - margins.left - margins.right
    before = torch.full(
        (frames + 2, *(shape[::-1] if transposed else shape), tap_channels(colours * patch**2)), math.nan, dtype=dtype
    )
    arena, slots = before.clone(), order(frames, spare=2)
    gather_taps(pixels, patch=patch, margins=margins, transposed=transposed, arena=arena, slots=slots)
    assert changed_alone(arena, before, slots, 0)
    return inside(arena, slots, 0)


@pytest.mark.parametrize("size", [SIZE, (1, 1, 1), (2, 1, 3), (1, 3, 2)])
@pytest.mark.parametrize(("patch", "colours", "values"), [(1, 3, 32), (2, 3, 112), (1, 4, 48)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_value_of_a_neighbourhood_has_its_place(size, patch, colours, values, transposed):
    pixels = pixels_of(size, patch, colours, torch.float64)
    out = gathered(pixels, patch, transposed=transposed, dtype=torch.float64)
    assert out.shape[3] == values
    assert torch.equal(turned(out) if transposed else out, plain_taps(pixels, patch, values))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("margins", [(0, 1, 0, 0), (1, 1, 0, 0), (1, 0, 0, 1), (0, 0, 1, 1), (1, 1, 1, 1)])
def test_a_part_with_margins_has_the_bits_of_the_whole(margins, patch, transposed):
    pixels = pixels_of((2, 6, 7), patch)
    pixels[0, 0, 0, 0] = math.nan
    whole = gathered(pixels, patch, dtype=torch.bfloat16)
    top, bottom, left, right = margins
    # Where there is no margin, there the picture ends.
    rows = slice(2 * top, 6 - 2 * bottom)
    columns = slice(2 * left, 7 - 2 * right)
    part = pixels[
        :,
        (rows.start - top) * patch : (rows.stop + bottom) * patch,
        (columns.start - left) * patch : (columns.stop + right) * patch,
    ]
    edges = Margins(top=top, bottom=bottom, left=left, right=right)
    out = gathered(part.contiguous(), patch, margins=edges, transposed=transposed, dtype=torch.bfloat16)
    out = turned(out) if transposed else out
    assert torch.equal(bits(out), bits(whole[:, rows, columns].contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_mapped_in_fp32_and_rounded_once(dtype):
    pixels = pixels_of(SIZE, 2)
    wanted = gathered(pixels, 2).to(dtype)
    assert torch.equal(gathered(pixels, 2, dtype=dtype), wanted)
    twice = gathered(pixels.to(dtype), 2, dtype=dtype)
    assert not torch.equal(twice, wanted)  # there was something to round


@pytest.mark.parametrize(("patch", "colours"), [(1, 3), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_with_spread_weights_it_is_the_first_convolution(patch, colours, transposed):
    # Wan 2.2 folds pixels into channels in the order (colour, pixel column, pixel row) before it.
    frames, rows, columns = SIZE
    pixels = pixels_of(SIZE, patch, colours, torch.float64)
    channels = colours * patch**2
    weight, bias = random_weight(6, channels, 3, 3, 3, dtype=torch.float64), random(6, dtype=torch.float64, seed=2)
    folded = (2 * pixels - 1).reshape(frames, rows, patch, columns, patch, colours).permute(5, 4, 2, 0, 1, 3)
    padded = F.pad(folded.reshape(1, channels, *SIZE), (1, 1, 1, 1, 0, 0))
    exact = F.conv3d(padded, weight, bias)[0].permute(1, 2, 3, 0)
    spread = spread_pixel_weight(weight, patch)
    assert spread.shape == (6, tap_channels(channels), 3, 1, 1)
    assert spread.is_contiguous(memory_format=torch.channels_last_3d)
    arena = gathered(pixels, patch, transposed=transposed, dtype=torch.float64)
    out = conv(arena, torch.arange(3, dtype=torch.int32), spread, bias, transposed=transposed)
    torch.testing.assert_close(turned(out) if transposed else out, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 2},  # an odd number of rows
        {"arena": torch.zeros(5, 3, 5, 27)},  # no room for the zeros
        {"arena": torch.zeros(5, 5, 3, 32)},  # rows and columns in each other's place
        {"transposed": True},  # alike
        {"margins": Margins(top=1)},  # a row less
        {"margins": Margins(left=1, right=1)},
        {"slots": torch.arange(2, dtype=torch.int32)},
        {"pixels": torch.zeros(3, 0, 5, 3), "arena": torch.zeros(5, 0, 5, 32)},  # no row
    ],
    ids=["patch", "values", "turned arena", "transposed", "margins", "columns", "slots", "no rows"],
)
def test_refuses_shapes_that_do_not_fit(change):
    arena = torch.zeros(5, 3, 5, 32)
    options = {
        "pixels": torch.zeros(3, 3, 5, 3), "patch": 1, "margins": Margins(), "arena": arena,
        "slots": torch.arange(3, dtype=torch.int32),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match="gather_taps takes pixels"):
        gather_taps(**options)
    assert not options["arena"].any()
