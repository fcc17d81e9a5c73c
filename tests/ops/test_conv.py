"""Convolutions over paged frames against sums over taps that are written out, in fp64.

Places are exact (untouched slots and borders, aliases), values close: torch's CPU kernels differ between memory
formats and sizes in their last bits.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.plain import (
    changed_alone,
    conv_problem,
    down_problem,
    eager_conv,
    errs_at_most_twice_as_much,
    inside,
    order,
    plain_conv,
    plain_down_conv,
    plain_upsample_conv,
    random,
    turned,
    upsample_problem,
)
from wan_vae_parallel.ops.conv import (
    conv,
    down_conv,
    fold_upsample_weight,
    head_conv,
    pointwise_conv,
    prepare_head,
    put_frames,
    upsample_conv,
)

FP32 = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
FP64 = {"atol": 1e-12, "rtol": 1e-12}


SHAPES = [
    ((4, 6, 8), 16, 24),  # a plain one
    ((1, 3, 5), 8, 8),  # one frame, odd sides
    ((2, 1, 1), 8, 4),  # one position, with zeros all around
    ((3, 1, 4), 4, 8),  # one row: strides of size-1 axes are ambiguous
    ((1, 1, 1), 1, 1),  # every axis is of size 1
    ((2, 3, 3), 1, 5),  # one channel in
    ((2, 3, 3), 5, 1),  # one channel out
]
by_shape = pytest.mark.parametrize(("size", "channels", "out_channels"), SHAPES)


# conv.


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=["space and time", "time only"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@by_shape
def test_conv_sees_the_frames_of_its_slots_in_their_order(size, channels, out_channels, kernel, memory_format):
    arena, slots, weight, bias = conv_problem(size, channels, out_channels, kernel)
    out = conv(arena, slots, weight.contiguous(memory_format=memory_format), bias)
    assert out.shape == (*size, out_channels)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_conv(arena, slots, weight, bias), **FP32)


def test_conv_takes_one_slot_more_than_once():
    # As blank past frames do: both lie in one slot, or in the two that all videos share.
    arena, _, weight, bias = conv_problem((2, 3, 5), 8, 8)
    arena = arena.nan_to_num()
    slots = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    torch.testing.assert_close(conv(arena, slots, weight, bias), plain_conv(arena, slots, weight, bias), **FP32)


def test_conv_in_two_steps_is_the_whole():
    # What the pages rest on: the next step names the frames that the last one saw, where they lie.
    arena, slots, weight, bias = conv_problem((5, 4, 6), 8, 8)
    steps = [conv(arena, slots[:4], weight, bias), conv(arena, slots[2:], weight, bias)]
    torch.testing.assert_close(torch.cat(steps), plain_conv(arena, slots, weight, bias), **FP32)


def test_conv_reads_halo_rows_from_the_border():
    arena, slots, weight, bias = conv_problem((2, 7, 5), 8, 8)
    whole = conv(arena, slots, weight, bias)
    shard = arena[:, 2:7].contiguous()  # rows 2 to 4 with a neighbour's row on either side
    torch.testing.assert_close(conv(shard, slots, weight, bias), whole[:, 2:5], **FP32)


def test_conv_in_fp64():
    arena, slots, weight, bias = conv_problem((3, 4, 5), 8, 6, dtype=torch.float64)
    out = conv(arena, slots, weight, bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_conv(arena, slots, weight, bias), **FP64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_errs_at_most_twice_as_much_as_eager(dtype, with_residual):
    arena, slots, weight, bias = conv_problem((3, 5, 7), 16, 16, dtype=dtype)
    eager = eager_conv(arena, slots, weight, bias)
    residual = None
    if with_residual:
        residual = random(3, 5, 7, 16, dtype=dtype, seed=3)
        eager = eager + residual
    exact = plain_conv(arena, slots, weight, bias, residual=residual)
    assert errs_at_most_twice_as_much(conv(arena, slots, weight, bias, residual=residual), eager, exact)


@pytest.mark.parametrize("border", [0, 1])
def test_conv_writes_inside_the_borders_of_its_out_slots_alone(border):
    arena, slots, weight, bias = conv_problem((3, 4, 5), 8, 6)
    before = random(5, 4 + 2 * border, 5 + 2 * border, 6, seed=3)
    out_slots = torch.tensor([3, 0, 4], dtype=torch.int32)
    before[out_slots.long(), border : 4 + border, border : 5 + border] = math.nan
    out = before.clone()
    assert conv(arena, slots, weight, bias, out=out, out_slots=out_slots) is out
    torch.testing.assert_close(inside(out, out_slots, border), plain_conv(arena, slots, weight, bias), **FP32)
    assert changed_alone(out, before, out_slots, border)


def test_conv_may_write_into_other_slots_of_the_arena_that_it_reads():
    arena, slots, weight, bias = conv_problem((1, 4, 5), 8, 8)
    free = torch.tensor([slot for slot in range(len(arena)) if slot not in slots][:1], dtype=torch.int32)
    before = arena.clone()
    conv(arena, slots, weight, bias, out=arena, out_slots=free)
    torch.testing.assert_close(inside(arena, free, 1), plain_conv(before, slots, weight, bias), **FP32)
    assert changed_alone(arena, before, free, 1)


@pytest.mark.parametrize("where", ["apart", "in place", "made"])
def test_conv_adds_a_residual_that_it_may_write_over(where):
    arena, slots, weight, bias = conv_problem((2, 3, 5), 8, 6)
    residual = random(2, 3, 5, 6, seed=3)
    before = residual.clone()
    given = {"apart": torch.full_like(residual, math.nan), "in place": residual, "made": None}[where]
    out = conv(arena, slots, weight, bias, residual=residual, out=given)
    assert given is None or out is given
    torch.testing.assert_close(out, plain_conv(arena, slots, weight, bias, residual=before), **FP32)
    assert torch.equal(residual, out if where == "in place" else before)


@pytest.mark.parametrize("where", ["made", "given", "slots"])
def test_halves_of_the_channels_become_frames_the_earlier_one_first(where):
    arena, slots, weight, bias = conv_problem((3, 4, 5), 8, 12, (3, 1, 1))
    exact = plain_conv(arena, slots, weight, bias, halves=2)
    # Frame 2t is made by the first half of the weight, frame 2t + 1 by the second.
    torch.testing.assert_close(exact[0::2], plain_conv(arena, slots, weight[:6], bias[:6]))
    torch.testing.assert_close(exact[1::2], plain_conv(arena, slots, weight[6:], bias[6:]))
    options = {}
    if where == "given":
        options = {"out": torch.full((6, 4, 5, 6), math.nan), "residual": random(6, 4, 5, 6, seed=3)}
        exact = exact + options["residual"]
    elif where == "slots":
        options = {"out": torch.full((8, 6, 7, 6), math.nan), "out_slots": order(6, spare=2, seed=1)}
    out = conv(arena, slots, weight, bias, halves=2, **options)
    if where == "slots":
        assert changed_alone(out, torch.full_like(out, math.nan), options["out_slots"], 1)
        out = inside(out, options["out_slots"], 1)
    assert out.is_contiguous()
    torch.testing.assert_close(out, exact, **FP32)


@pytest.mark.parametrize(("kernel", "halves"), [((3, 3, 3), 1), ((3, 1, 1), 2)])
def test_transposed_is_the_same_with_rows_and_columns_in_each_others_place(kernel, halves):
    arena, slots, weight, bias = conv_problem((2, 4, 7), 8, 6, kernel)
    out = conv(turned(arena), slots, weight, bias, halves=halves, transposed=True)
    assert out.is_contiguous()
    torch.testing.assert_close(turned(out), plain_conv(arena, slots, weight, bias, halves=halves), **FP32)


@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_time_stride_makes_one_frame_of_every_two(size, transposed):
    arena, slots, weight, bias = conv_problem(size, 8, 6, (3, 1, 1), time_stride=2)
    assert len(slots) == 2 * size[0] + 1
    out = conv(turned(arena) if transposed else arena, slots, weight, bias, time_stride=2, transposed=transposed)
    assert out.shape == ((size[0], size[2], size[1], 6) if transposed else (*size, 6))
    exact = plain_conv(arena, slots, weight, bias, time_stride=2)
    torch.testing.assert_close(turned(out) if transposed else out, exact, **FP32)
    # Frame t is the one that frames 2t to 2t + 2 make alone.
    alone = [plain_conv(arena, slots[2 * t : 2 * t + 3], weight, bias) for t in range(size[0])]
    torch.testing.assert_close(torch.cat(alone), exact)


def test_a_time_stride_leaves_borders_and_other_slots_alone():
    arena, slots, weight, bias = conv_problem((3, 4, 5), 8, 6, (3, 1, 1), time_stride=2)
    before = torch.full((5, 6, 7, 6), math.nan)
    out, out_slots = before.clone(), order(3, spare=2, seed=1)
    assert conv(arena, slots, weight, bias, out=out, out_slots=out_slots, time_stride=2) is out
    exact = plain_conv(arena, slots, weight, bias, time_stride=2)
    torch.testing.assert_close(inside(out, out_slots, 1), exact, **FP32)
    assert changed_alone(out, before, out_slots, 1)


def test_conv_refuses_slots_that_end_between_two_output_frames():
    arena, slots, weight, bias = conv_problem((3, 4, 5), 8, 6, (3, 1, 1), time_stride=2)
    with pytest.raises(ValueError, match=r"6 slots.* a stride of 2 frames"):
        conv(arena, slots[:-1], weight, bias, time_stride=2)


def test_conv_leaves_its_inputs_alone():
    arena, slots, weight, bias = conv_problem((2, 3, 5), 8, 8)
    tensors = [arena, slots, weight, bias]
    before = [tensor.clone() for tensor in tensors]
    conv(*tensors, residual=random(2, 3, 5, 8), transposed=False)
    assert all(changed_alone(a, b, slots[:0], 0) for a, b in zip(tensors[:1], before[:1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors[1:], before[1:], strict=True))


@pytest.mark.parametrize(
    "arena",
    [
        random(8, 5, 6, 7).permute(
            1, 2, 3, 0
        ),  # the channels-last view of NCTHW: its bytes are not what its shape says
        random(5, 6, 7, 7),  # other channels than the weight's
    ],
)
def test_conv_and_upsample_conv_refuse_an_arena_that_they_would_misread(arena):
    slots = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"conv takes a contiguous arena of 8 channels, not \(5, 6, 7,"):
        conv(arena, slots, random(4, 8, 3, 3, 3), random(4))
    with pytest.raises(ValueError, match=r"upsample_conv takes a contiguous arena of 8 channels, not \(5, 6, 7,"):
        upsample_conv(arena, slots, random(4, 8, 3, 3), random(4), folded=None)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": torch.zeros(1, 4, 5, 6)},  # one frame for all
        {"residual": torch.zeros(2, 4, 5, 1)},  # one channel for all
        {"out": torch.zeros(2, 2, 4, 5, 6)},  # the frames twice
        {"out_slots": torch.arange(2, dtype=torch.int32)},  # slots of nothing
    ],
    ids=["a frame's residual", "a channel's residual", "out of another shape", "out_slots without out"],
)
def test_conv_refuses_what_it_would_have_to_guess_at(options):
    arena, slots, weight, bias = conv_problem((2, 4, 5), 8, 6)
    with pytest.raises(ValueError, match=r"residual|out"):
        conv(arena, slots, weight, bias, **options)


# upsample_conv.


@by_shape
def test_upsample_conv_matches_interpolation_and_a_padded_convolution(size, channels, out_channels):
    frames, (arena, slots, weight, bias) = upsample_problem(size, channels, out_channels)
    out = upsample_conv(arena, slots, weight, bias, folded=None)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_upsample_conv(frames, weight, bias), **FP32)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transposed", [False, True])
def test_upsample_conv_doubles_a_halo_row_too(transposed, weight_format):
    # A shard's rows, with a neighbour's row above and below, are the rows of the larger picture.
    frames, (arena, slots, weight, bias) = upsample_problem((2, 6, 5), 8, 6)
    weight = weight.contiguous(memory_format=weight_format)
    shard = arena[:, 1:6].contiguous()  # rows 1 to 3, and rows 0 and 4
    assert shard[slots.long()][:, [0, -1]].any()
    if transposed:
        shard = turned(shard)
    out = upsample_conv(shard, slots, weight, bias, folded=None, transposed=transposed)
    assert out.is_contiguous()
    whole = plain_upsample_conv(frames, weight, bias)
    torch.testing.assert_close(turned(out) if transposed else out, whole[:, 2:8], **FP32)


def test_upsample_conv_in_fp64():
    frames, (arena, slots, weight, bias) = upsample_problem((2, 3, 5), 8, 6, dtype=torch.float64)
    out = upsample_conv(arena, slots, weight, bias, folded=None)
    torch.testing.assert_close(out, plain_upsample_conv(frames, weight, bias), **FP64)


def test_upsample_conv_in_bf16_errs_at_most_twice_as_much_as_eager():
    frames, (arena, slots, weight, bias) = upsample_problem((3, 5, 7), 16, 16, dtype=torch.bfloat16)
    exact = plain_upsample_conv(frames.double(), weight.double(), bias.double())
    out = upsample_conv(arena, slots, weight, bias, folded=None)
    assert errs_at_most_twice_as_much(out, plain_upsample_conv(frames, weight, bias), exact)


def test_folded_weights_make_the_convolution_of_doubled_frames_from_four_of_the_small_ones():
    # Whole numbers: fp64 has room for all of these sums, so that the two ways must agree to the bit.
    frames, weight = ((8 * random(*shape, dtype=torch.float64)).round() for shape in ((2, 3, 5, 7), (4, 7, 3, 3)))
    exact = plain_upsample_conv(frames, weight, torch.zeros(4, dtype=torch.float64))
    folded = fold_upsample_weight(weight)
    assert folded.is_contiguous()
    padded = F.pad(frames, (0, 0, 1, 1, 1, 1))
    made = torch.full_like(exact, math.nan)
    for row, column in itertools.product(range(2), repeat=2):
        # Output row 2h sees rows h - 1 and h, row 2h + 1 rows h and h + 1, which lie one further down in the padded.
        total = 0
        for down, right in itertools.product(range(2), repeat=2):
            seen = padded[:, row + down :, column + right :][:, :3, :5]
            total = total + seen @ folded[row, column, down, right].T
        made[:, row::2, column::2] = total
    assert torch.equal(made, exact)


def test_folded_weights_are_summed_in_fp32_and_rounded_once():
    weight = random(16, 16, 3, 3, dtype=torch.bfloat16)
    wide = fold_upsample_weight(weight.float())
    folded = fold_upsample_weight(weight)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, wide.bfloat16())
    assert not torch.equal(wide.bfloat16().float(), wide)  # there was something to round


# down_conv.


@by_shape
def test_down_conv_matches_a_convolution_padded_below_and_on_the_right(size, channels, out_channels):
    frames, (arena, slots, weight, bias) = down_problem(size, channels, out_channels)
    out = down_conv(arena, slots, weight, bias)
    assert out.shape == (*size, out_channels)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_down_conv(frames, weight, bias), **FP32)


def test_plain_down_conv_is_a_sum_over_taps():
    frames, (_, _, weight, bias) = down_problem((2, 3, 5), 4, 6)
    padded = F.pad(frames.double(), (0, 0, 0, 1, 0, 1))
    total = bias.double().expand(2, 3, 5, 6)
    for down, right in itertools.product(range(3), repeat=2):
        total = total + padded[:, down : down + 6 : 2, right : right + 10 : 2] @ weight[:, :, down, right].double().T
    torch.testing.assert_close(plain_down_conv(frames, weight, bias), total, **FP32)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transposed", [False, True])
def test_down_conv_reads_a_halo_row_below(transposed, weight_format):
    # A shard's rows 4 to 7 of 10, with the row below; in their bottom border lies what would be padding else.
    frames, (arena, slots, weight, bias) = down_problem((2, 5, 4), 8, 6)
    weight = weight.contiguous(memory_format=weight_format)
    shard = arena[:, 4:10].contiguous()
    shard[:, 0] = math.nan  # row 3 is not read
    out = down_conv(turned(shard) if transposed else shard, slots, weight, bias, transposed=transposed)
    assert out.is_contiguous()
    whole = plain_down_conv(frames, weight, bias)
    torch.testing.assert_close(turned(out) if transposed else out, whole[:, 2:4], **FP32)


@pytest.mark.parametrize("border", [0, 1])
def test_down_conv_writes_inside_the_borders_of_its_out_slots_alone(border):
    frames, (arena, slots, weight, bias) = down_problem((3, 4, 5), 8, 6)
    before = torch.full((5, 4 + 2 * border, 5 + 2 * border, 6), math.nan)
    out, out_slots = before.clone(), order(3, spare=2, seed=1)
    assert down_conv(arena, slots, weight, bias, out=out, out_slots=out_slots) is out
    torch.testing.assert_close(inside(out, out_slots, border), plain_down_conv(frames, weight, bias), **FP32)
    assert changed_alone(out, before, out_slots, border)
    given = torch.full((3, 4, 5, 6), math.nan)
    assert down_conv(arena, slots, weight, bias, out=given) is given
    torch.testing.assert_close(given, plain_down_conv(frames, weight, bias), **FP32)


def test_down_conv_in_fp64_and_in_bf16():
    frames, problem = down_problem((2, 3, 5), 8, 6, dtype=torch.float64)
    torch.testing.assert_close(down_conv(*problem), plain_down_conv(frames, *problem[2:]), **FP64)
    frames, problem = down_problem((2, 5, 7), 16, 16, dtype=torch.bfloat16)
    exact = plain_down_conv(*(tensor.double() for tensor in (frames, *problem[2:])))
    assert errs_at_most_twice_as_much(down_conv(*problem), plain_down_conv(frames, *problem[2:]), exact)


@pytest.mark.parametrize(
    "shape",
    [(5, 9, 10, 8), (5, 8, 9, 8), (5, 2, 8, 8), (5, 8, 8, 7)],
    ids=["odd rows", "odd columns", "no rows", "other channels"],
)
def test_down_conv_refuses_arenas_that_it_would_misread(shape):
    slots = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"down_conv takes a contiguous arena of 8 channels and even rows"):
        down_conv(random(*shape), slots, random(4, 8, 3, 3), random(4))
    with pytest.raises(ValueError, match=r"out must be contiguous"):
        down_conv(random(5, 8, 8, 8), slots, random(4, 8, 3, 3), random(4), out=torch.zeros(3, 3, 3, 5))


# head_conv.


@pytest.mark.parametrize("transposed", [False, True])
def test_head_conv_without_prepared_weights_is_a_convolution(transposed):
    arena, slots, weight, bias = conv_problem((3, 4, 5), 16, 3)
    prepared = prepare_head(weight, 3, transposed=transposed)
    assert prepared is None  # that is for GPUs
    seen = turned(arena) if transposed else arena
    out = head_conv(seen, slots, weight, bias, prepared=prepared, transposed=transposed)
    assert out.is_contiguous()
    torch.testing.assert_close(turned(out) if transposed else out, plain_conv(arena, slots, weight, bias), **FP32)


# pointwise_conv.


def plain_pointwise(x, weight, bias):
    return x.double() @ weight.flatten(1).double().T + bias.double()


@pytest.mark.parametrize("axes", [2, 3])  # attention's weights have two trailing axes, shortcuts' three
@pytest.mark.parametrize("contiguous", [True, False])
def test_pointwise_conv_is_a_product_over_channels(axes, contiguous):
    x = random(3, 4, 5, 8) if contiguous else random(8, 3, 4, 5).permute(1, 2, 3, 0)
    weight, bias = random(6, 8, *(1,) * axes, seed=1), random(6, seed=2)
    out = pointwise_conv(x, weight, bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_pointwise(x, weight, bias), **FP32)


def test_pointwise_conv_adds_a_residual_that_it_may_write_over():
    x, weight, bias = random(3, 4, 5, 8), random(6, 8, 1, 1, seed=1), random(6, seed=2)
    residual = random(3, 4, 5, 6, seed=3)
    exact = plain_pointwise(x, weight, bias) + residual
    torch.testing.assert_close(pointwise_conv(x, weight, bias, residual=residual), exact, **FP32)
    assert pointwise_conv(x, weight, bias, residual=residual, out=residual) is residual
    torch.testing.assert_close(residual, exact, **FP32)


@pytest.mark.parametrize("border", [0, 1])
def test_pointwise_conv_writes_inside_the_borders_of_its_out_slots_alone(border):
    x, weight, bias = random(3, 4, 5, 8), random(6, 8, 1, 1, 1, seed=1), random(6, seed=2)
    before = torch.full((5, 4 + 2 * border, 5 + 2 * border, 6), math.nan)
    out, slots = before.clone(), order(3, spare=2)
    assert pointwise_conv(x, weight, bias, out=out, out_slots=slots) is out
    torch.testing.assert_close(inside(out, slots, border), plain_pointwise(x, weight, bias), **FP32)
    assert changed_alone(out, before, slots, border)


# put_frames.


@pytest.mark.parametrize("border", [0, 1])
def test_put_frames_writes_inside_the_borders_of_its_slots_alone(border):
    frames, slots = random(3, 1, 5, 4), order(3, spare=2)
    before = torch.full((5, 1 + 2 * border, 5 + 2 * border, 4), math.nan)
    arena = before.clone()
    put_frames(arena, slots, frames)
    assert torch.equal(inside(arena, slots, border), frames)
    assert changed_alone(arena, before, slots, border)
