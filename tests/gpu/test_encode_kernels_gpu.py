"""The Triton kernels that only encoding has, against fp64, and their bits.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena; see kernel_tests.py
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu.kernel_tests import DEVICE, DTYPE, INTERPRETED, MARKS, SIZE, conv_problem, here, order
from tests.ops.plain import (
    changed_alone,
    eager_conv,
    errs_at_most_twice_as_much,
    in_arena,
    inside,
    plain_conv,
    relative_error,
    turned,
)
from wan_vae_parallel.ops import conv as conv_ops
from wan_vae_parallel.ops.layer_kinds import LayerKind

pytestmark = MARKS
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import conv as conv_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import tiles  # noqa: E402


def same(a, b):
    """Whether bits are equal. The interpreter's products are numpy's, whose sums depend on a tile's shape."""
    if INTERPRETED:
        return a.shape == b.shape and relative_error(a, b.double()) < 1e-3
    return torch.equal(a, b)


# conv with a time stride.

TIME = (3, 1, 1)
STRIDED_SIZE = (3, *SIZE[1:])


@pytest.mark.parametrize(("channels", "halves", "time_stride"), [(48, 1, 2), (20, 1, 2), (48, 2, 2), (48, 1, 3)])
def test_a_strided_conv_errs_at_most_twice_as_much_as_eager(channels, halves, time_stride):
    # 20 channels: strides that TMA can't take.
    problem = conv_problem(STRIDED_SIZE, channels, 32, TIME, time_stride=time_stride, dtype=DTYPE)
    out = conv_ops.conv(*problem, halves=halves, time_stride=time_stride)
    eager = eager_conv(*problem, time_stride=time_stride).unflatten(3, (halves, -1)).permute(0, 3, 1, 2, 4)
    exact = plain_conv(*problem, halves=halves, time_stride=time_stride)
    assert errs_at_most_twice_as_much(out, eager.flatten(0, 1), exact)


def test_a_strided_convs_bits_depend_on_no_chunk_shard_slot_axis_or_tile():
    channels, out_channels = here((32, 48), gpu=[(384, 384)])[0]
    arena, slots, weight, bias = conv_problem(STRIDED_SIZE, channels, out_channels, TIME, time_stride=2, dtype=DTYPE)

    def strided(arena, slots, **options):
        return conv_ops.conv(arena, slots, weight, bias, time_stride=2, **options)

    whole = strided(arena, slots)
    for first, stop in ((0, 1), (1, 3)):
        # A copy: pointers that no multiple of 16 holds would be compiled for anew.
        assert same(strided(arena, slots[2 * first : 2 * stop + 1].clone()), whole[first:stop]), f"from frame {first}"
    # As is every other frame of those that a stride of 1 makes.
    assert same(conv_ops.conv(arena, slots, weight, bias)[::2], whole)
    assert same(strided(arena[:, 1:].contiguous(), slots), whole[:, 1:])
    assert same(turned(strided(turned(arena), slots, transposed=True)), whole)
    elsewhere = order(len(slots), spare=9, seed=5)
    assert same(strided(in_arena(arena[slots.long()], elsewhere, border=0, spare=9), elsewhere), whole)
    before = torch.full((5, SIZE[1] + 2, SIZE[2] + 2, out_channels), math.nan, dtype=DTYPE, device=DEVICE)
    out, out_slots = before.clone(), order(3, spare=2, seed=1)
    strided(arena, slots, out=out, out_slots=out_slots)
    assert same(inside(out, out_slots, 1), whole)
    assert changed_alone(out, before, out_slots, 1)
    kind = LayerKind("conv", channels, out_channels, TIME, time_stride=2)
    tma = conv_kernels.use_descriptors(arena)
    for tile, descriptors in [*((tile, tma) for tile in tiles.candidates(kind, DEVICE)), (None, False)]:
        out = torch.full_like(whole, math.nan)
        conv_kernels.conv(
            arena, slots, weight, bias, residual=None, out=out, out_slots=None, halves=1, time_stride=2,
            transposed=False, tile=tile, descriptors=descriptors,
        )  # fmt: skip
        assert same(out, whole), (tile, descriptors)


def test_only_kernels_over_time_have_a_stride():
    arena, slots, weight, bias = conv_problem((1, 4, 4), 16, 16, dtype=DTYPE)
    assert conv_kernels.takes(arena, weight)
    assert not conv_kernels.takes(arena, weight, time_stride=2)
    out = torch.zeros((1, 4, 4, 16), dtype=DTYPE, device=DEVICE)
    options = {"residual": None, "out": out, "out_slots": None, "halves": 1, "time_stride": 2, "transposed": False}
    with pytest.raises(ValueError, match="a 3x3x3 kernel takes a stride of 1 frame, not 2"):
        conv_kernels.conv(arena, slots, weight, bias, **options)
    arena, slots, weight, bias = conv_problem((2, 4, 4), 16, 16, TIME, dtype=DTYPE)
    assert conv_kernels.takes(arena, weight, time_stride=2)
    with pytest.raises(ValueError, match="4 slots end between two output frames"):
        conv_kernels.conv(arena, slots, weight, bias, **options)
