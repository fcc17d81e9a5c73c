"""The convolutions' Triton kernels against fp64, and their bits against those of other tiles, shards, chunks and axes.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena; see kernel_tests.py
"""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.cross import GPUS
from tests.gpu.kernel_tests import (
    DEVICE,
    DTYPE,
    DTYPES,
    INTERPRETED,
    MARKS,
    SIZE,
    WIDTHS,
    conv_problem,
    here,
    norm_inputs,
    order,
    random,
    upsample_problem,
)
from tests.ops.plain import (
    changed_alone,
    eager_conv,
    errs_at_most_twice_as_much,
    in_arena,
    inside,
    plain_conv,
    plain_upsample_conv,
    relative_error,
    turned,
)
from wan_vae_parallel.ops import conv as conv_ops
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.ops import norm_silu as norm_ops
from wan_vae_parallel.ops.layer_kinds import LayerKind

pytestmark = MARKS
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import conv as conv_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import head_conv as head_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import tiles  # noqa: E402

# conv.

# Each width once on either side; bf16 and fp16 share everything but the products' type.
CONVS = list(zip(WIDTHS, [384, 1024, 320, 16, 80, 128, 96, 160, 512, 192, 48, 256], strict=True))


@pytest.mark.parametrize(
    ("dtype", "channels", "out_channels"),
    here(
        (torch.float16, 96, 16),
        (torch.float16, 80, 48),
        gpu=[(torch.bfloat16, *widths) for widths in CONVS] + [(torch.float16, 192, 96), (torch.float16, 384, 192)],
    ),
)
def test_conv_errs_at_most_twice_as_much_as_eager(dtype, channels, out_channels):
    arena, slots, weight, bias = conv_problem(SIZE, channels, out_channels, dtype=dtype)
    exact, eager = plain_conv(arena, slots, weight, bias), eager_conv(arena, slots, weight, bias)
    out = conv_ops.conv(arena, slots, weight, bias)
    assert out.shape == exact.shape
    assert errs_at_most_twice_as_much(out, eager, exact)


@pytest.mark.parametrize(
    ("kernel", "channels", "out_channels", "halves", "size"),
    [
        (
            (3, 1, 1),
            *here((32, 48), gpu=[(384, 768)])[0],
            2,
            SIZE,
        ),  # the time convolution: no border
        ((3, 3, 3), 20, 12, 1, SIZE),  # strides that TMA can't take; outputs that fill no tile
        ((1, 3, 3), 24, 16, 1, SIZE),  # no past frames; channels that end within a step
        ((3, 3, 3), 16, 16, 1, (1, 1, 1)),  # one position
    ],
    ids=["time", "no TMA", "single frames", "one position"],
)
def test_conv_of_other_kernels_and_odd_sizes(kernel, channels, out_channels, halves, size):
    arena, slots, weight, bias = conv_problem(size, channels, out_channels, kernel, dtype=DTYPE)
    exact = plain_conv(arena, slots, weight, bias, halves=halves)
    eager = eager_conv(arena, slots, weight, bias).unflatten(3, (halves, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert errs_at_most_twice_as_much(conv_ops.conv(arena, slots, weight, bias, halves=halves), eager, exact)


def test_conv_adds_a_residual_before_it_rounds_and_may_write_over_it():
    channels = 48 if INTERPRETED else 96
    arena, slots, weight, bias = conv_problem(SIZE, channels, channels, dtype=DTYPE)
    residual = random(*SIZE, channels, dtype=DTYPE, seed=3)
    before = residual.clone()
    exact = plain_conv(arena, slots, weight, bias, residual=residual)
    apart = conv_ops.conv(arena, slots, weight, bias, residual=residual)
    assert torch.equal(residual, before)
    assert errs_at_most_twice_as_much(apart, eager_conv(arena, slots, weight, bias) + residual, exact)
    assert conv_ops.conv(arena, slots, weight, bias, residual=residual, out=residual) is residual
    assert torch.equal(residual, apart)


@pytest.mark.parametrize(("kernel", "halves", "border"), [((3, 3, 3), 1, 1), ((3, 1, 1), 2, 1), ((3, 1, 1), 2, 0)])
def test_conv_writes_inside_the_borders_of_its_out_slots_alone(kernel, halves, border):
    channels = 32 if INTERPRETED else 96
    arena, slots, weight, bias = conv_problem(SIZE, channels, channels * halves, kernel, dtype=DTYPE)
    wanted = conv_ops.conv(arena, slots, weight, bias, halves=halves)
    frames, rows, columns, _ = wanted.shape
    before = random(frames + 2, rows + 2 * border, columns + 2 * border, channels, dtype=DTYPE, seed=3)
    out, out_slots = before.clone(), order(frames, spare=2, seed=1)
    conv_ops.conv(arena, slots, weight, bias, out=out, out_slots=out_slots, halves=halves)
    assert torch.equal(inside(out, out_slots, border), wanted)
    assert changed_alone(out, before, out_slots, border)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_conv_errs_at_most_twice_as_much_as_eager(dtype):
    channels, out_channels = here((48, 80), gpu=[(192, 384)])[0]  # the shortcut of Wan 2.1's widest change of width
    x = random(*SIZE, channels, dtype=dtype)
    weight = random(out_channels, channels, 1, 1, 1, dtype=dtype, seed=1) / channels**0.5
    bias, residual = random(out_channels, dtype=dtype, seed=2), random(*SIZE, out_channels, dtype=dtype, seed=3)
    exact = x.double() @ weight.flatten(1).double().T + bias.double()
    eager = F.linear(x, weight.flatten(1), bias)
    out = conv_ops.pointwise_conv(x, weight, bias)
    assert errs_at_most_twice_as_much(out, eager, exact)
    added = conv_ops.pointwise_conv(x, weight, bias, residual=residual)
    assert errs_at_most_twice_as_much(added, eager + residual, exact + residual.double())
    # A shard's rows, and attention's weights, which have an axis less.
    part = conv_ops.pointwise_conv(x[1:, 1:3].contiguous(), weight[..., 0], bias)
    assert torch.equal(part, out[1:, 1:3])
    if dtype == DTYPE:
        before = random(4, SIZE[1] + 2, SIZE[2] + 2, out_channels, dtype=dtype, seed=4)
        arena, slots = before.clone(), order(2, spare=2)
        conv_ops.pointwise_conv(x, weight, bias, out=arena, out_slots=slots)
        assert torch.equal(inside(arena, slots, 1), out)
        assert changed_alone(arena, before, slots, 1)


# upsample_conv.


def upsampled(arena, slots, weight, bias, *, transposed=False):
    folded = conv_ops.fold_upsample_weight(weight)
    return conv_ops.upsample_conv(arena, slots, weight, bias, folded=folded, transposed=transposed)


@pytest.mark.parametrize(
    ("dtype", "channels", "out_channels", "size"),
    here(
        (torch.float16, 32, 48, SIZE),
        (torch.float16, 20, 16, (1, 1, 3)),
        gpu=[
            (torch.bfloat16, 384, 192, SIZE),  # Wan 2.1's
            (torch.float16, 384, 192, SIZE),
            (torch.bfloat16, 1024, 1024, SIZE),  # the widest of Wan 2.2's
            (torch.bfloat16, 80, 160, SIZE),
            (torch.bfloat16, 20, 16, (1, 1, 3)),  # strides that TMA can't take, and one row
        ],
    ),
)
def test_upsample_conv_errs_at_most_twice_as_much_as_eager(dtype, channels, out_channels, size):
    frames, (arena, slots, weight, bias) = upsample_problem(size, channels, out_channels, dtype=dtype)
    exact = plain_upsample_conv(frames.double(), weight.double(), bias.double())
    out = upsampled(arena, slots, weight, bias)
    assert out.shape == exact.shape
    # Folded weights are rounded once more than the published ones: 1.4 times eager's error.
    assert errs_at_most_twice_as_much(out, plain_upsample_conv(frames, weight, bias), exact)


# head_conv.


def head(arena, slots, weight, bias, *, transposed=False):
    prepared = conv_ops.prepare_head(weight, len(slots) - 2, transposed=transposed)
    assert prepared is not None
    return conv_ops.head_conv(arena, slots, weight, bias, prepared=prepared, transposed=transposed)


def head_of(problem, frames, rows, transposed=False, **options):
    """The head's kernel with any spread."""
    arena, slots, weight, bias = problem
    out = arena.new_empty((len(slots) - 2, arena.shape[1] - 2, arena.shape[2] - 2, len(weight)))
    spread = head_kernels.spread_weight(weight, frames, rows, transposed=transposed)
    head_kernels.head_conv(
        arena, slots, spread, bias, frames=frames, rows=rows, out=out, transposed=transposed, **options
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_channels", [3, 12])  # Wan 2.1's, Wan 2.2's
def test_head_conv_errs_at_most_twice_as_much_as_eager(dtype, out_channels):
    problem = conv_problem((3, *SIZE[1:]), 32 if INTERPRETED else 96, out_channels, dtype=dtype)
    assert errs_at_most_twice_as_much(head(*problem), eager_conv(*problem), plain_conv(*problem))


@pytest.mark.parametrize("out_channels", [3, 12])
def test_head_conv_has_the_same_bits_with_every_tiling(out_channels):
    channels = 32 if INTERPRETED else 96
    problem = conv_problem((3, *SIZE[1:]), channels, out_channels, dtype=DTYPE)
    tilings = sorted({head_kernels.tiling(count, out_channels) for count in range(1, 9)})
    assert len(tilings) == 3
    whole = head(*problem)
    for frames, rows in tilings:
        assert same(head_of(problem, frames, rows), whole), (frames, rows)
    # Three frames together, an odd number of rows; narrow and wide tiles; without descriptors.
    if out_channels == 3:
        tile = tiles.head_tile(64, 720, channels, device=DEVICE)
        assert tile != tiles.head_tile(64, SIZE[2], channels, device=DEVICE)
        assert same(head_of(problem, 3, 5), whole)
        assert same(head_of(problem, *tilings[-1], tile=tile), whole)
        assert same(head_of(problem, *tilings[-1], descriptors=False), whole)


# What convolutions' bits must not depend on.


def same(a, b):
    """Whether bits are equal. The interpreter's products are numpy's, whose sums depend on a tile's shape."""
    if INTERPRETED:
        return a.shape == b.shape and relative_error(a, b.double()) < 1e-3
    return torch.equal(a, b)


CONV, UPSAMPLE, HEAD = (conv_ops.conv, 2, 1), (upsampled, 0, 2), (head, 2, 1)


@pytest.mark.parametrize(
    ("op", "channels", "out_channels"),
    [(CONV, *widths) for widths in here((32, 48), gpu=[(96, 96), (192, 192), (384, 384), (1024, 512)])]
    + [(UPSAMPLE, *widths) for widths in here((32, 16), gpu=[(192, 96), (384, 192)])]
    + [(HEAD, *widths) for widths in here((32, 3), gpu=[(96, 3), (256, 12)])],
    ids=lambda value: value[0].__name__ if isinstance(value, tuple) else str(value),
)
def test_bits_depend_on_no_chunk_shard_slot_or_split_axis(op, channels, out_channels):
    op, past, scale = op
    size = (3, *SIZE[1:])
    if past:
        arena, slots, weight, bias = conv_problem(size, channels, out_channels, dtype=DTYPE)
    else:
        _, (arena, slots, weight, bias) = upsample_problem(size, channels, out_channels, dtype=DTYPE)
    whole = op(arena, slots, weight, bias)
    assert torch.equal(op(arena, slots, weight, bias), whole), "again"
    for first, stop in ((0, 1), (1, 3)):
        # A copy: pointers that no multiple of 16 holds would be compiled for anew.
        part = op(arena, slots[first : stop + past].clone(), weight, bias)
        assert same(part, whole[first:stop]), f"frames {first} to {stop}"
    rows, columns = SIZE[1:]
    for top, bottom in ((0, 1), (1, rows)):
        part = op(arena[:, top : bottom + 2].contiguous(), slots, weight, bias)
        assert torch.equal(part, whole[:, scale * top : scale * bottom]), f"rows {top} to {bottom}"
    part = op(arena[:, :, 1 : columns + 1].contiguous(), slots, weight, bias)
    assert torch.equal(part, whole[:, :, scale : scale * (columns - 1)]), "columns"
    out = op(turned(arena), slots, weight, bias, transposed=True)
    assert torch.equal(turned(out), whole), "transposed"
    part = op(turned(arena[:, :, 1 : columns + 1]), slots, weight, bias, transposed=True)
    assert torch.equal(turned(part), whole[:, :, scale : scale * (columns - 1)]), "transposed, some columns"
    elsewhere = order(len(slots), spare=9, seed=5)
    frames = inside(arena, slots, 1)
    out = op(in_arena(frames, elsewhere, border=1, spare=9), elsewhere, weight, bias)
    assert torch.equal(out, whole), "other slots"


DECODERS = [(96, 96), (192, 192), (384, 384), (16, 384), (384, 192), (192, 96), (48, 1024), (1024, 1024), (512, 256)]


def tiles_of_every_shape():
    """One setting for each way to cut the work and share it out, a decoder's if there is one; steps vary too."""
    found = {}
    for channels, out_channels in (*DECODERS, *itertools.product(WIDTHS, WIDTHS)):
        kind = LayerKind("conv", channels, out_channels, (3, 3, 3))
        shipped = [tile for tile, _ in tiles._settings(channels, out_channels)]
        # Other GPUs' too: they run here as well.
        for tile in (*shipped, *tiles.candidates(kind, DEVICE), *tiles._narrow(kind, DEVICE)):
            found.setdefault((tile.positions, tile.first, tile.second, tile.warps, tile.swapped), tile)
    assert len(found) >= 25
    assert {tile.step for tile in found.values()} == {16, 32, 64}
    assert {tile.swapped for tile in found.values()} == {False, True}
    return [tiles.fit(tile, DEVICE) for tile in found.values()]


def test_conv_has_the_same_bits_with_every_tile_and_without_descriptors():
    # 80 channels end within a step of 64 and of 32; other tiles take some of the 384 at once.
    channels, out_channels = (40, 96) if INTERPRETED else (80, 384)
    arena, slots, weight, bias = conv_problem(SIZE, channels, out_channels, dtype=DTYPE)
    whole = conv_ops.conv(arena, slots, weight, bias)
    settings = tiles_of_every_shape()
    tma = conv_kernels.use_descriptors(arena)
    described = [(tile, tma) for tile in (settings[::6] if INTERPRETED else settings)]
    pointers = [(settings[0], False), (next(tile for tile in settings if tile.swapped), False)]
    for tile, descriptors in described + pointers:
        out = torch.full_like(whole, math.nan)
        conv_kernels.conv(
            arena, slots, weight, bias, residual=None, out=out, out_slots=None, halves=1, transposed=False, tile=tile,
            descriptors=descriptors,
        )  # fmt: skip
        assert same(out, whole), (tile, descriptors)


@pytest.mark.parametrize(
    "size", [(2, 3, 5), (2, 2, 15), (2, 5, 5), (1, 4, 21)], ids=["less", "as much", "one more", "three tiles"]
)
def test_a_frames_last_tile_without_descriptors_computes_positions_twice_and_stores_them_once(size):
    tile = tiles.Tile(32, 16, 0, 16, 4, 3)
    arena, slots, weight, bias = conv_problem(size, 16, 16, dtype=DTYPE)
    residual = random(*size, 16, dtype=DTYPE, seed=3)
    wanted = conv_ops.conv(arena, slots, weight, bias, residual=residual)
    for into in (torch.full_like(residual, math.nan), residual):
        conv_kernels.conv(
            arena, slots, weight, bias, residual=residual, out=into, out_slots=None, halves=1, transposed=False,
            tile=tile, descriptors=False,
        )  # fmt: skip
        assert torch.equal(into, wanted)


def test_upsample_conv_has_the_same_bits_with_other_tiles_and_without_descriptors():
    channels, out_channels = (24, 48) if INTERPRETED else (192, 96)
    _, (arena, slots, weight, bias) = upsample_problem(SIZE, channels, out_channels, dtype=DTYPE)
    whole = upsampled(arena, slots, weight, bias)
    settings = tiles.candidates(LayerKind("upsample_conv", channels, out_channels, (1, 3, 3)), DEVICE)
    described = [(tile, conv_kernels.use_descriptors(arena)) for tile in settings]
    for tile, descriptors in [*described, (settings[-1], False)]:
        out = torch.full_like(whole, math.nan)
        conv_kernels.upsample_conv(
            arena, slots, conv_ops.fold_upsample_weight(weight), bias, out=out, transposed=False, tile=tile,
            descriptors=descriptors,
        )  # fmt: skip
        assert same(out, whole), (tile, descriptors)


@pytest.mark.parametrize("out_channels", [3, 12, *WIDTHS, 768])
def test_every_width_has_tiles_that_fit_registers_and_shared_memory(monkeypatch, out_channels):
    for channels in WIDTHS:
        monkeypatch.setattr(tiles, "gpu", lambda _: GPUS["sm_90"])
        for tile, _ in tiles._settings(channels, out_channels):
            columns = tile.first + tile.second
            assert tile.positions * columns / (32 * tile.warps) <= 192  # of a thread's registers, accumulators
            assert tiles.fit(tile, DEVICE) == tile
        monkeypatch.setattr(tiles, "gpu", lambda _: GPUS["sm_89"])
        for tile in tiles._narrow(LayerKind("conv", channels, out_channels, (3, 3, 3)), DEVICE):
            columns = tile.first + tile.second
            assert tile.positions * columns / (32 * tile.warps) <= 192
            small = tiles.fit(tile, DEVICE)
            assert (small.positions, small.warps) == (tile.positions, tile.warps)
            assert small.stages >= 3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots"),
        ({"out_slots": torch.zeros(2, dtype=torch.int32)}, "out_slots"),
        ({"out": torch.empty(1, 4, 4, 15, dtype=DTYPE)}, "out must be"),
        ({"out": torch.empty(1, 4, 4, 16)}, "out must be contiguous"),
        ({"residual": torch.empty(1, 4, 4, 8, dtype=DTYPE)}, "residual"),
        ({"bias": torch.empty(3, dtype=DTYPE)}, "no output of 16 channels"),
        ({"weight": torch.empty(16, 16, 3, 3, 3, dtype=DTYPE)}, "channels_last_3d"),
        ({"arena": torch.empty(3, 6, 6, 8, dtype=DTYPE)}, "of 16 channels"),
        ({"arena": torch.empty(3, 2, 6, 16, dtype=DTYPE)}, "no output"),
    ],
)
def test_convs_kernel_says_what_it_does_not_take(change, names):
    arena, slots, weight, bias = conv_problem((1, 4, 4), 16, 16, dtype=DTYPE)
    arguments = {"arena": arena, "slots": slots, "weight": weight, "bias": bias} | {
        name: torch.zeros((1, 4, 4, 16), dtype=DTYPE, device=DEVICE) for name in ("residual", "out")
    }
    arguments |= {"out_slots": None} | {name: tensor.to(DEVICE) for name, tensor in change.items()}
    with pytest.raises(ValueError, match=names):
        conv_kernels.conv(**arguments, halves=1, transposed=False)


# Sizes and dtypes beyond.


def test_an_arena_may_have_more_than_2_to_the_31_values():
    channels, rows, columns, count = here((32, 3, 5, 7), gpu=[(96, 510, 509, 90)])[0]
    arena = torch.full((count, rows + 2, columns + 2, channels), math.nan, dtype=DTYPE, device=DEVICE)
    frame = arena[0].numel()
    if not INTERPRETED:
        assert (count - 4) * frame > 2**31
    # Slots before and behind it.
    slots = torch.tensor([count - 2, 1, count - 3], dtype=torch.int32, device=DEVICE)
    target = torch.tensor([count - 1], dtype=torch.int32, device=DEVICE)
    small = torch.zeros((3, *arena.shape[1:]), dtype=DTYPE, device=DEVICE)
    counted = torch.arange(3, dtype=torch.int32, device=DEVICE)
    arena[slots.long()] = 0
    x, gamma = norm_inputs((3, rows, columns, channels), DTYPE)
    norm_ops.norm_silu(x, gamma, arena=arena, slots=slots)
    norm_ops.norm_silu(x, gamma, arena=small, slots=counted)
    assert torch.equal(arena[slots.long()], small)
    assert arena[0].isnan().all()
    _, _, weight, bias = conv_problem((1, 1, 1), channels, channels, dtype=DTYPE)
    wanted = conv_ops.conv(small, counted, weight, bias)
    assert wanted.isfinite().all()
    for descriptors in {False, conv_kernels.use_descriptors(arena)}:
        arena[-1] = math.nan
        conv_kernels.conv(
            arena, slots, weight, bias, residual=None, out=arena, out_slots=target, halves=1, transposed=False,
            descriptors=descriptors,
        )  # fmt: skip
        assert torch.equal(inside(arena, target, 1), wanted), f"descriptors {descriptors}"
        assert arena[-1].isnan().sum() == frame - wanted.numel()
    _, _, weight, bias = conv_problem((1, 1, 1), channels, 3, dtype=DTYPE)
    wanted = head(small, counted, weight, bias)
    for descriptors in {False, conv_kernels.use_descriptors(arena)}:
        out = head_of((arena, slots, weight, bias), *head_kernels.tiling(1, 3), descriptors=descriptors)
        assert torch.equal(out, wanted), f"descriptors {descriptors}"
    # Nothing was written anywhere else.
    assert all(arena[slot].isnan().all() for slot in (0, 2, count - 4))


def test_residuals_and_outputs_may_have_more_than_2_to_the_31_values():
    channels, rows, columns, count = here((32, 3, 5, 3), gpu=[(96, 510, 509, 90)])[0]
    arena, slots, weight, bias = conv_problem((1, rows, columns), channels, channels, dtype=DTYPE)
    # The same three frames again and again.
    slots = slots[torch.arange(count + 2, device=DEVICE) % 3]
    residual = torch.zeros((count, rows, columns, channels), dtype=DTYPE, device=DEVICE)
    residual[-1] = random(rows, columns, channels, dtype=DTYPE)
    if not INTERPRETED:
        assert residual.numel() > 2**31
    out = conv_ops.conv(arena, slots, weight, bias, residual=residual)
    wanted = conv_ops.conv(arena, slots[-3:].clone(), weight, bias, residual=residual[-1:])
    assert torch.equal(out[-1:], wanted)
    # And with as many values before it.
    weight1, bias1 = random(16, channels, 1, 1, dtype=DTYPE), random(16, dtype=DTYPE)
    assert torch.equal(
        conv_ops.pointwise_conv(out, weight1, bias1)[-1:], conv_ops.pointwise_conv(wanted, weight1, bias1)
    )


def test_what_cudnn_won_has_our_bits_beyond_2_to_the_31_values(monkeypatch):
    channels, rows, columns, count = here((32, 3, 5, 3), gpu=[(96, 510, 509, 90)])[0]
    arena, slots, weight, bias = conv_problem((1, rows, columns), channels, channels, dtype=DTYPE)
    slots = slots[torch.arange(count + 2, device=DEVICE) % 3]
    if INTERPRETED:
        monkeypatch.setattr(conv_ops, "MOST_VALUES", 2000)
    assert len(slots) * arena[0].numel() > conv_ops.MOST_VALUES
    out = conv_ops.conv(arena, slots, weight, bias, cudnn=True)
    assert torch.equal(out, conv_ops.conv(arena, slots, weight, bias))


def test_upsampled_frames_may_have_more_than_2_to_the_31_values():
    channels, rows, columns, count = here((32, 3, 5, 3), gpu=[(96, 510, 509, 24)])[0]
    _, (arena, slots, weight, bias) = upsample_problem((1, rows, columns), channels, channels, dtype=DTYPE)
    out = upsampled(arena, slots.repeat(count), weight, bias)
    if not INTERPRETED:
        assert out.numel() > 2**31
    assert torch.equal(out[-1:], upsampled(arena, slots, weight, bias))


def test_fp32_goes_to_pytorchs_convolutions_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(conv_ops, "F", F)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    dispatch.say_once.cache_clear()
    arena, slots, weight, bias = conv_problem(SIZE, 16, 3)
    frames, upsampling = upsample_problem(SIZE, 16, 3)
    with caplog.at_level(logging.WARNING):
        assert conv_ops.prepare_head(weight, 2, transposed=False) is None
        close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
        exact = plain_conv(arena, slots, weight, bias)
        torch.testing.assert_close(conv_ops.conv(arena, slots, weight, bias), exact, **close)
        torch.testing.assert_close(conv_ops.head_conv(arena, slots, weight, bias, prepared=None), exact, **close)
        exact = plain_upsample_conv(*(tensor.double() for tensor in (frames, *upsampling[2:])))
        torch.testing.assert_close(upsampled(*upsampling), exact, **close)
        conv_ops.pointwise_conv(random(*SIZE, 16), random(4, 16, 1, 1), random(4))
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "convolutions of float32 tensors run on cuDNN" in text]) == 1, said
    dispatch.say_once.cache_clear()
