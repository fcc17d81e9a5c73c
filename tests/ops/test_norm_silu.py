"""RMSNorm and SiLU against torch.nn.functional's, into the slots of an arena."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.plain import (
    changed_alone,
    eager_norm,
    errs_at_most_twice_as_much,
    inside,
    order,
    plain_norm,
    random,
)
from wan_vae_parallel.ops import norm_silu as module
from wan_vae_parallel.ops.norm_silu import norm_silu, rms_norm


def inputs(shape, dtype=torch.float32):
    x = 3 * random(*shape, dtype=dtype)
    return x, 1 + 0.1 * random(shape[-1], 1, 1, 1, dtype=dtype, seed=1)


def into_slots(x, gamma, border=1):
    """The arena that `norm_silu` wrote, NaN before; the slots, in no order; and what lies in them."""
    frames, rows, columns, channels = x.shape
    arena = x.new_full((frames + 2, rows + 2 * border, columns + 2 * border, channels), math.nan)
    slots = order(frames, spare=2)
    norm_silu(x, gamma, arena=arena, slots=slots)
    return arena, slots, inside(arena, slots, border)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 6, 8, 96),  # a plain one
        (1, 3, 5, 384),  # odd sides, the widest of Wan 2.1
        (2, 1, 1, 8),  # one position
        (3, 2, 7, 1),  # one channel: its norm is its size
        (1, 5, 1, 24),  # one column
    ],
)
@pytest.mark.parametrize("border", [0, 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_matches_the_reference_and_writes_inside_the_borders_of_its_slots_alone(shape, border, dtype, bound):
    x, gamma = inputs(shape, dtype)
    arena, slots, out = into_slots(x, gamma, border)
    assert (out - F.silu(plain_norm(x, gamma))).abs().max() <= bound * x.abs().max()
    assert changed_alone(arena, torch.full_like(arena, math.nan), slots, border)


@pytest.mark.parametrize(
    "elements",
    [
        1,  # row by row
        3 * 16 * 2,  # two rows at a time, of five: the last block is smaller
        3 * 16 * 5 * 2,  # two frames at a time, of three
    ],
)
def test_working_in_blocks_changes_nothing(monkeypatch, elements):
    x, gamma = inputs((3, 5, 3, 16))
    *_, whole = into_slots(x, gamma)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    *_, blocks = into_slots(x, gamma)
    # Close, not exact: torch's CPU kernels treat the elements behind the last full vector by another path.
    torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_eager(dtype):
    x, gamma = inputs((2, 7, 9, 96), dtype)
    *_, out = into_slots(x, gamma)
    assert errs_at_most_twice_as_much(out, F.silu(eager_norm(x, gamma)), F.silu(plain_norm(x, gamma)))


def test_squares_that_overflow_fp16_are_summed_in_fp32():
    x = torch.full((1, 1, 1, 96), 1000.0, dtype=torch.float16)
    *_, out = into_slots(x, torch.ones(96, dtype=torch.float16))
    torch.testing.assert_close(out.float(), F.silu(torch.ones(1, 1, 1, 96)), atol=1e-3, rtol=0)


def test_zeros_stay_zeros():
    # 0 / 0 would be NaN: a black border of the latent must not become one.
    *_, out = into_slots(torch.zeros(1, 2, 2, 8), torch.ones(8))
    assert torch.equal(out, torch.zeros_like(out))


def test_leaves_its_input_alone():
    # The residual's shortcut still needs it.
    x, gamma = inputs((2, 3, 4, 8))
    before = x.clone()
    into_slots(x, gamma)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((3, 3, 4, 9), 2),  # other channels
        ((3, 5, 5, 8), 2),  # a border of rows alone
        ((3, 4, 5, 8), 2),  # half a border
        ((3, 1, 2, 8), 2),  # smaller than the frames
        ((3, 3, 4, 8), 1),  # a slot too few
        ((3, 3, 4, 8), 3),  # a slot too many
    ],
)
def test_refuses_an_arena_or_slots_that_do_not_fit(shape, count):
    arena = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"takes x \(2, 3, 4, 8\) to no arena"):
        norm_silu(torch.ones(2, 3, 4, 8), torch.ones(8), arena=arena, slots=order(count))
    assert not arena.any()


def test_refuses_a_gamma_of_another_length():
    # One value would broadcast and scale everything alike.
    with pytest.raises(ValueError, match=r"gamma \(1,\)"):
        norm_silu(torch.zeros(2, 3, 4, 8), torch.ones(1), arena=torch.zeros(2, 3, 4, 8), slots=order(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norm_rounds_once_to_its_inputs_dtype(dtype):
    x, gamma = inputs((2, 3, 4, 8), dtype)
    normalized = rms_norm(x, gamma)
    assert normalized.dtype == dtype
    exact = plain_norm(x, gamma)
    # Half a unit in the last place, and what fp32's statistics err.
    slack = torch.finfo(dtype).eps * (0.51 if dtype in (torch.bfloat16, torch.float16) else 4)
    torch.testing.assert_close(normalized.double(), exact, atol=0, rtol=slack)


def test_rms_norm_of_strided_frames_is_contiguous():
    x, gamma = inputs((4, 3, 2, 8))
    normalized = rms_norm(x.transpose(0, 2), gamma)
    assert normalized.is_contiguous()
    torch.testing.assert_close(normalized, rms_norm(x, gamma).transpose(0, 2))
