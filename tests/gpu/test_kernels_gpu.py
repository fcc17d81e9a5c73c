"""The Triton kernels of each op against fp64, and their bits against those of other tiles, shards, chunks and axes.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena

Without a GPU the same tests run on small shapes in Triton's interpreter, in fp16 (of bf16 it multiplies the bits):
``TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels_gpu.py``. Each kernel setting takes a GPU about a second to
compile, so that tests share settings where they can: widths, dtypes and columns are not chosen at random.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os

import pytest
import torch
import torch.nn.functional as F

from tests.ops.plain import (
    bits,
    changed_alone,
    conv_problem,
    eager_conv,
    eager_norm,
    errs_at_most_twice_as_much,
    in_arena,
    inside,
    order,
    plain_attention,
    plain_conv,
    plain_duplicated,
    plain_frames,
    plain_norm,
    plain_upsample_conv,
    random,
    relative_error,
    turned,
    upsample_problem,
)
from wan_vae_parallel.ops import attention as attention_ops
from wan_vae_parallel.ops import conv as conv_ops
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.ops import frames as frames_ops
from wan_vae_parallel.ops import norm_silu as norm_ops
from wan_vae_parallel.ops import shortcut as shortcut_ops
from wan_vae_parallel.ops.kinds import LayerKind

INTERPRETED = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="no CUDA device is there"),
]
pytest.importorskip("triton", reason="there are no kernels without Triton")

from wan_vae_parallel.ops.kernels import attention as attention_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import conv as conv_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import frames as frames_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import head_conv as head_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import norm as norm_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import shortcut as shortcut_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import tiles  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
DTYPE = DTYPES[0]
# Several tiles of positions, and none full.
SIZE = (2, 3, 5) if INTERPRETED else (2, 11, 45)
# As channels in and out: all widths of the decoders, and others.
WIDTHS = [16, 48, 80, 96, 128, 160, 192, 256, 320, 384, 512, 1024]
OPS = (conv_ops, norm_ops, attention_ops, frames_ops, shortcut_ops)


@pytest.fixture(autouse=True)
def _kernels_alone(monkeypatch):
    """No test passes because PyTorch's own kernels stood in; and all that an op allocates is NaN at first."""
    monkeypatch.setattr(conv_ops, "F", None)
    monkeypatch.setattr(attention_ops, "F", None)
    monkeypatch.setattr(norm_ops, "_wide_norm", None)

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    if INTERPRETED:
        for module in OPS:
            monkeypatch.setattr(module, "kernels_run", lambda _: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))


def here(*interpreted, gpu):
    """Cases for a GPU, or fewer and smaller ones for the interpreter."""
    return list(interpreted) if INTERPRETED else gpu


def eager_of(module, function, *args, **kwargs):
    """What an op makes on PyTorch's own kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernels_run", lambda _: False)
        return function(*args, **kwargs)


on_device = {"device": DEVICE}
conv_problem = functools.partial(conv_problem, **on_device)
upsample_problem = functools.partial(upsample_problem, **on_device)
random = functools.partial(random, **on_device)
order = functools.partial(order, **on_device)


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
        for tile in (*shipped, *tiles.candidates(kind, DEVICE), *tiles._narrow(channels, out_channels)):
            found.setdefault((tile.positions, tile.first, tile.second, tile.warps, tile.swapped), tile)
    assert len(found) >= 30
    assert {tile.step for tile in found.values()} == {16, 32, 64}
    assert {tile.swapped for tile in found.values()} == {False, True}
    return [tiles.fit(tile, tiles.gpu(DEVICE)[1]) for tile in found.values()]


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
def test_every_width_has_tiles_that_fit_registers_and_shared_memory(out_channels):
    for channels in WIDTHS:
        for tile, _ in tiles._settings(channels, out_channels):
            columns = tile.first + tile.second
            assert tile.positions * columns / (32 * tile.warps) <= 192  # of a thread's registers, accumulators
            assert tiles.fit(tile, 232448) == tile  # Hopper
            small = tiles.fit(tile, 101376)  # consumer GPUs
            assert (small.positions + small.first + small.second) * small.step * 2 * small.stages <= 101376


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


# norm_silu, rms_norm.


def norm_inputs(shape, dtype):
    return 3 * random(*shape, dtype=dtype), 1 + 0.1 * random(shape[-1], dtype=dtype, seed=1)


def into_slots(x, gamma, border=1):
    """The arena that `norm_silu` wrote, NaN before; the slots, in no order; and what lies in them."""
    frames, rows, columns, channels = x.shape
    arena = x.new_full((frames + 2, rows + 2 * border, columns + 2 * border, channels), math.nan)
    slots = order(frames, spare=2)
    norm_ops.norm_silu(x, gamma, arena=arena, slots=slots)
    return arena, slots, inside(arena, slots, border)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    here(
        (torch.float16, 96),
        (torch.float32, 16),
        gpu=[(torch.bfloat16, channels) for channels in WIDTHS]
        + [(torch.float16, channels) for channels in (80, 384)]
        + [(torch.float32, 96)],
    ),
)
@pytest.mark.parametrize("border", [0, 1])
def test_norm_silu_errs_at_most_twice_as_much_as_eager_and_writes_its_slots_alone(dtype, channels, border):
    x, gamma = norm_inputs((*SIZE, channels), dtype)
    arena, slots, out = into_slots(x, gamma, border)
    exact = F.silu(plain_norm(x, gamma))
    if dtype == torch.float32:  # eager's is no measure where a GPU approximates roots and exponentials
        assert relative_error(out, exact) < 1e-6
    else:
        assert errs_at_most_twice_as_much(out, F.silu(eager_norm(x, gamma)), exact)
    assert changed_alone(arena, torch.full_like(arena, math.nan), slots, border)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_errs_at_most_twice_as_much_as_eager(dtype):
    x, gamma = norm_inputs((*SIZE, 96 if INTERPRETED else 384), dtype)
    out = norm_ops.rms_norm(x, gamma)
    assert out.is_contiguous()
    assert errs_at_most_twice_as_much(out, eager_norm(x, gamma), plain_norm(x, gamma))


@pytest.mark.parametrize("channels", here(96, gpu=[96, 384, 1024]))
def test_a_norms_bits_depend_on_no_chunk_shard_slot_or_tile(monkeypatch, channels):
    x, gamma = norm_inputs((3, *SIZE[1:], channels), DTYPE)
    *_, whole = into_slots(x, gamma)
    *_, shard = into_slots(x[1:, 1:3].contiguous(), gamma, border=0)
    assert torch.equal(shard, whole[1:, 1:3])
    *_, columns = into_slots(x[:, :, 1:4].contiguous(), gamma)
    assert torch.equal(columns, whole[:, :, 1:4])
    *_, transposed = into_slots(turned(x), gamma)
    assert torch.equal(turned(transposed), whole)
    # A tile of four times the size.
    monkeypatch.setattr(norm_kernels, "_MIN_BLOCK", 8192)
    assert torch.equal(into_slots(x, gamma)[2], whole)


def test_a_norm_of_zeros_is_zeros_and_of_large_fp16_is_finite():
    _, _, out = into_slots(torch.zeros(1, 2, 3, 96, device=DEVICE, dtype=DTYPE), random(96, dtype=DTYPE))
    assert torch.equal(out, torch.zeros_like(out))
    _, _, out = into_slots(torch.full((1, 2, 3, 96), 1000.0, device=DEVICE, dtype=torch.float16), random(96).half())
    assert out.isfinite().all()


# frame_attention.


def attention_inputs(frames, queries, keys, channels, dtype=DTYPE):
    """Slices of one projection with NaN behind each frame's positions, as a gathered buffer may have."""
    qkv = random(frames, max(queries, keys) + 5, 3 * channels, dtype=dtype)
    qkv[:, queries:, :channels] = math.nan
    qkv[:, keys:, channels:] = math.nan
    return qkv[:, :queries, :channels], *qkv[:, :keys, channels:].chunk(2, dim=2)


def attention_kernels_for(inputs):
    """All kernels that take these."""
    found = [attention_kernels.frame_attention]
    try:
        from wan_vae_parallel.ops.kernels import attention_hopper
    except ImportError:
        return found
    return [*found, attention_hopper.frame_attention] if attention_hopper.can_attend(*inputs) else found


from_hopper_on = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability(0) < (9, 0), reason="older GPUs have PyTorch's"
)


@from_hopper_on
@pytest.mark.parametrize(
    ("dtype", "channels"),
    here(
        (torch.float16, 80),
        (torch.float16, 512),
        # Parts of 16 and 128 channels, one to five of them; then the kernels for many channels.
        gpu=[(torch.bfloat16, channels) for channels in (16, 80, 256, 384, 512, 1024)] + [(torch.float16, 384)],
    ),
)
def test_attention_errs_at_most_twice_as_much_as_eager_and_all_kernels_have_the_same_bits(dtype, channels):
    # Neither fills its tiles; and no multiples of 16, nor 1, for which kernels would be compiled anew.
    inputs = attention_inputs(*here((2, 3, 150), gpu=[(2, 200, 333)])[0], channels, dtype)
    exact = plain_attention(*(tensor.double() for tensor in inputs))
    eager = F.scaled_dot_product_attention(*(tensor.contiguous()[:, None] for tensor in inputs))[:, 0]
    out = attention_ops.frame_attention(*inputs)
    assert out.is_contiguous()
    assert errs_at_most_twice_as_much(out, eager, exact)
    for kernel in attention_kernels_for(inputs):
        assert torch.equal(kernel(*inputs), out), kernel.__module__


@from_hopper_on
@pytest.mark.parametrize("channels", here(80, 512, gpu=[256, 384, 1024]))
def test_a_querys_bits_depend_on_its_own_frame_alone(monkeypatch, channels):
    query, key, value = attention_inputs(*here((2, 5, 150), gpu=[(2, 200, 333)])[0], channels)
    whole = attention_ops.frame_attention(query, key, value)
    queries = query.shape[1]
    for first, stop in ((0, 3), (queries // 5, queries * 4 // 5)):  # a shard's queries
        for kernel in attention_kernels_for((query, key, value)):
            shard = kernel(query[1:, first:stop], key[1:], value[1:])
            assert torch.equal(shard, whole[1:, first:stop]), kernel.__module__
    # Other frames' keys may be anything.
    key[0], value[0] = math.nan, math.nan
    out = attention_ops.frame_attention(query, key, value)
    assert out[0].isnan().all()
    assert torch.equal(out[1], whole[1])
    # Few weights at a time: a frame's queries in several goes.
    monkeypatch.setattr(attention_kernels, "WEIGHTS_AT_ONCE", 1)
    assert torch.equal(attention_ops.frame_attention(query, key, value)[1], whole[1])


# to_frames, add_duplicated: every value by itself, so that PyTorch's bits are the kernels'.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_to_frames_has_eagers_bits(dtype, transposed, patch):
    x = 2 * random(*SIZE, 3 * patch**2, dtype=dtype)  # beyond [-1, 1] on both sides
    x[0, 0, 0, 0] = math.nan
    x[0, 0, 1] = math.inf
    seen = turned(x) if transposed else x
    assert frames_kernels.can_convert_to_frames(seen, patch)
    frames = frames_ops.to_frames(seen, patch, transposed=transposed)
    assert frames.is_contiguous()
    assert torch.equal(bits(frames), bits(eager_of(frames_ops, frames_ops.to_frames, x, patch)))
    torch.testing.assert_close(frames.double(), plain_frames(x, patch), atol=1e-7, rtol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "channels", "out_channels", "time_factor", "phases"),
    [
        (DTYPE, 64, 64, 2, (0, 2)),  # Wan 2.2's first stages
        (DTYPE, 64, 64, 2, (1, 2)),  # and their first frame
        (DTYPE, 64, 32, 1, (0, 1)),  # its third stage
        (DTYPE, 48, 12, 2, (0, 1)),  # channels that fill no block
        *here(gpu=[(DTYPE, 1024, 1024, 2, (0, 2))]),  # more than a block of channels
        (torch.float16, 64, 64, 2, (0, 2)),
        (torch.float32, 64, 64, 2, (0, 2)),
    ],
)
def test_add_duplicated_has_eagers_bits(dtype, channels, out_channels, time_factor, phases, transposed):
    x = random(*SIZE, channels, dtype=dtype)
    shortcut = plain_duplicated(x, out_channels, time_factor, phases)
    before = random(*shortcut.shape, dtype=dtype, seed=1)
    out = turned(before) if transposed else before.clone()
    x = turned(x) if transposed else x
    assert shortcut_kernels.takes(x, out)
    shortcut_ops.add_duplicated(x, time_factor=time_factor, phases=phases, transposed=transposed, out=out)
    assert torch.equal(turned(out) if transposed else out, before + shortcut)


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
