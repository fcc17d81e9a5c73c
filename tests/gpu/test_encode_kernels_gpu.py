"""The Triton kernels that only encoding has, against fp64, and their bits.

T frames, H rows, W columns, C channels in, O channels out, S slots of an arena; see kernel_tests.py
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.kernel_tests import (
    DEVICE,
    DTYPE,
    DTYPES,
    INTERPRETED,
    MARKS,
    SIZE,
    conv_problem,
    down_problem,
    eager_of,
    here,
    order,
    random,
)
from tests.ops.plain import (
    bits,
    changed_alone,
    eager_conv,
    errs_at_most_twice_as_much,
    in_arena,
    inside,
    plain_averaged,
    plain_conv,
    plain_down_conv,
    plain_taps,
    relative_error,
    turned,
)
from wan_vae_parallel.ops import conv as conv_ops
from wan_vae_parallel.ops import pixels as pixels_ops
from wan_vae_parallel.ops import shortcut as shortcut_ops
from wan_vae_parallel.ops.layer_kinds import LayerKind
from wan_vae_parallel.ops.pixels import Margins, tap_channels

pytestmark = MARKS
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import conv as conv_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import down_conv as down_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import measure, tiles  # noqa: E402
from wan_vae_parallel.ops.kernels import pixels as pixels_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import shortcut as shortcut_kernels  # noqa: E402


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


# down_conv.

# Rows of several tiles, the last of which ends outside; for the interpreter of one tile but where there is a small one.
DOWN_SIZE = here((2, 3, 18), gpu=[(2, 5, 150)])[0]


@pytest.mark.parametrize(
    ("dtype", "channels", "out_channels", "size"),
    here(
        (torch.float16, 32, 48, DOWN_SIZE),
        (torch.float16, 80, 16, (1, 2, 3)),
        (torch.float16, 20, 16, (1, 1, 1)),
        gpu=[
            *((torch.bfloat16, width, width, DOWN_SIZE) for width in (96, 192, 384)),  # Wan 2.1's
            *((torch.bfloat16, width, width, DOWN_SIZE) for width in (160, 320, 640)),  # Wan 2.2's
            (torch.float16, 192, 192, DOWN_SIZE),
            (torch.bfloat16, 384, 384, (1, 1, 1)),  # one position
            (torch.bfloat16, 24, 48, DOWN_SIZE),  # channels that end within a step
            (torch.bfloat16, 20, 16, (1, 1, 3)),  # strides that TMA can't take
        ],
    ),
)
def test_down_conv_errs_at_most_twice_as_much_as_eager(dtype, channels, out_channels, size):
    frames, (arena, slots, weight, bias) = down_problem(size, channels, out_channels, dtype=dtype)
    assert down_kernels.takes(arena, weight)
    exact = plain_down_conv(frames.double(), weight.double(), bias.double())
    out = conv_ops.down_conv(arena, slots, weight, bias)
    assert out.shape == exact.shape
    assert errs_at_most_twice_as_much(out, plain_down_conv(frames, weight, bias), exact)


@pytest.mark.parametrize("border", [0, 1])
def test_down_conv_writes_inside_the_borders_of_its_out_slots_alone(border):
    channels = 32 if INTERPRETED else 96
    _, (arena, slots, weight, bias) = down_problem(DOWN_SIZE, channels, channels, dtype=DTYPE)
    wanted = conv_ops.down_conv(arena, slots, weight, bias)
    frames, rows, columns, _ = wanted.shape
    before = random(frames + 2, rows + 2 * border, columns + 2 * border, channels, dtype=DTYPE, seed=3)
    out, out_slots = before.clone(), order(frames, spare=2, seed=1)
    conv_ops.down_conv(arena, slots, weight, bias, out=out, out_slots=out_slots)
    assert torch.equal(inside(out, out_slots, border), wanted)
    assert changed_alone(out, before, out_slots, border)


@pytest.mark.parametrize(
    ("channels", "out_channels"), here((32, 48), gpu=[(96, 96), (192, 192), (384, 384), (640, 640)])
)
def test_down_convs_bits_depend_on_no_chunk_shard_slot_or_axis(channels, out_channels):
    frames, (arena, slots, weight, bias) = down_problem(DOWN_SIZE, channels, out_channels, dtype=DTYPE)
    whole = conv_ops.down_conv(arena, slots, weight, bias)
    assert same(conv_ops.down_conv(arena, slots[1:].clone(), weight, bias), whole[1:]), "a frame alone"
    _, rows, columns = DOWN_SIZE
    # Rows and columns of a shard and those behind them, which are the picture's: its own border is not read at all.
    for top, bottom, left, right in ((0, 1, 0, columns), (1, rows, 0, columns), (1, 2, 1, 3), (0, rows, 2, columns)):
        part = arena[:, 2 * top : 2 * bottom + 2, 2 * left : 2 * right + 2].contiguous()
        part[:, 0], part[:, :, 0] = math.nan, math.nan
        wanted = whole[:, top:bottom, left:right]
        assert same(conv_ops.down_conv(part, slots, weight, bias), wanted), (top, bottom, left, right)
        out = conv_ops.down_conv(turned(part), slots, weight, bias, transposed=True)
        assert same(turned(out), wanted), (top, bottom, left, right, "transposed")
    elsewhere = order(len(slots), spare=9, seed=5)
    out = conv_ops.down_conv(in_arena(frames, elsewhere, border=1, spare=9), elsewhere, weight, bias)
    assert torch.equal(out, whole), "other slots"


def test_down_conv_has_the_same_bits_with_every_tile_and_without_descriptors():
    # 40 channels end within a step of 64, 32 and 16; other tiles take some of the 384 at once.
    channels, out_channels = (40, 96) if INTERPRETED else (40, 384)
    _, (arena, slots, weight, bias) = down_problem(DOWN_SIZE, channels, out_channels, dtype=DTYPE)
    whole = conv_ops.down_conv(arena, slots, weight, bias)
    found = {}
    for width in (96, 160, 192, 320, 384, 640):
        kind = LayerKind("down_conv", width, width, (1, 3, 3))
        # Other GPUs' too: they run here as well.
        shipped = [tile for tile, _ in tiles._settings(width, width)]
        for tile in (*shipped, *tiles.candidates(kind, DEVICE), *tiles._narrow(kind, DEVICE)):
            found.setdefault((tile.positions, tile.first, tile.second, tile.warps, tile.swapped), tile)
    assert {tile.step for tile in found.values()} == {32, 64}
    assert {tile.swapped for tile in found.values()} == {False, True}
    settings = [tiles.fit(tile, DEVICE) for tile in found.values()]
    swapped = next(tile for tile in settings if tile.swapped)
    tma = conv_kernels.use_descriptors(arena)
    if INTERPRETED:
        settings = [tiles.Tile(16, 64, 32, 32, 4, 2), *settings[::8]]
    described = [(tile, tma) for tile in settings]
    for tile, descriptors in [*described, (swapped, tma), (settings[0], False), (swapped, False)]:
        out = torch.full_like(whole, math.nan)
        down_kernels.down_conv(
            arena, slots, weight, bias, out=out, out_slots=None, transposed=False, tile=tile, descriptors=descriptors
        )
        assert same(out, whole), (tile, descriptors)


@pytest.mark.parametrize("descriptors", [False, True])
def test_down_conv_reads_nothing_of_another_position_where_a_step_passes_the_last_channel(descriptors):
    # 24 channels, steps of 16 or 32. What is not finite spoils the positions that see it, as infinity, not as NaN,
    # which a product of it with a zero would be.
    _, (arena, slots, weight, bias) = down_problem((1, 2, 3), 24, 16, dtype=DTYPE)
    if descriptors and not conv_kernels.use_descriptors(arena):
        pytest.skip("this GPU has no descriptors")
    weight = weight.abs() + 0.125
    for row, column in ((3, 4), (4, 5), (3, 5), (4, 4)):
        seen = arena.clone()
        seen[slots.long(), row, column] = math.inf
        out = arena.new_full((1, 2, 3, 16), math.nan)
        down_kernels.down_conv(
            seen, slots, weight, bias, out=out, out_slots=None, transposed=False, descriptors=descriptors,
            tile=tiles.Tile(64, 16, 0, 32, 4, 2),
        )  # fmt: skip
        expected = [
            2 * h + 1 <= row <= 2 * h + 3 and 2 * w + 1 <= column <= 2 * w + 3 for h in range(2) for w in range(3)
        ]
        assert not out.isnan().any()
        assert out.isinf().flatten(0, 2).all(dim=1).tolist() == expected
        assert out.isinf().flatten(0, 2).any(dim=1).tolist() == expected


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots"),
        ({"out_slots": torch.zeros(2, dtype=torch.int32)}, "out_slots must be 1"),
        ({"out": torch.empty(1, 4, 4, 15, dtype=DTYPE)}, "out must be"),
        ({"out": torch.empty(1, 4, 4, 16)}, "out must be contiguous"),
        ({"bias": torch.empty(3, dtype=DTYPE)}, "with 3 biases"),
        ({"weight": torch.empty(16, 16, 3, 3, dtype=DTYPE)}, "channels_last"),
        ({"weight": torch.empty(16, 16, 1, 1, dtype=DTYPE)}, r"\[O, C, 3, 3\]"),
        ({"arena": torch.empty(3, 10, 10, 8, dtype=DTYPE)}, "of 16 channels"),
        ({"arena": torch.empty(3, 9, 10, 16, dtype=DTYPE)}, "must be even"),
        ({"arena": torch.empty(3, 10, 2, 16, dtype=DTYPE)}, "no output"),
    ],
)
def test_down_convs_kernel_says_what_it_does_not_take(change, names):
    _, (arena, slots, weight, bias) = down_problem((1, 4, 4), 16, 16, dtype=DTYPE)
    out = torch.zeros((1, 4, 4, 16), dtype=DTYPE, device=DEVICE)
    arguments = {"arena": arena, "slots": slots, "weight": weight, "bias": bias, "out": out, "out_slots": None}
    arguments |= {name: tensor.to(DEVICE) for name, tensor in change.items()}
    with pytest.raises(ValueError, match=names):
        down_kernels.down_conv(**arguments, transposed=False)


# Measuring.


@pytest.mark.parametrize(
    "kind",
    [LayerKind("conv", 48, 32, TIME, time_stride=2), LayerKind("down_conv", 48, 32, (1, 3, 3))],
    ids=str,
)
def test_what_is_measured_is_the_layer_and_cudnns_is_the_same(monkeypatch, kind):
    monkeypatch.setattr(conv_ops, "F", F)
    problem = measure._Problem(kind, 3, 18, DTYPE, DEVICE)
    problem.cudnn()
    wanted = problem.out.clone()
    assert wanted.shape == (measure._FRAMES, 3, 18, 32)
    assert wanted.isfinite().all()
    for tile in tiles.candidates(kind, DEVICE):
        problem.out.fill_(math.nan)
        problem.ours(tile)
        assert relative_error(problem.out, wanted.double()) < 1e-2, tile


@pytest.mark.parametrize("processors", [132, 46])
@pytest.mark.parametrize(
    "kind",
    [LayerKind("conv", width, width, TIME, time_stride=2) for width in (192, 384, 320, 640)]
    + [LayerKind("down_conv", width, width, (1, 3, 3)) for width in (96, 192, 384, 160, 320, 640)],
    ids=str,
)
def test_what_is_measured_fits_its_memory_and_fills_a_gpu(kind, processors):
    found = tiles.candidates(kind, DEVICE)
    rows = measure._rows(kind, found, processors, 2)
    # Every two rows take as much as the next two; what two and four take is small.
    two, four = (measure._Problem(kind, count, measure._COLUMNS, torch.float16, DEVICE) for count in (2, 4))
    arena, out = (
        2 * (few.numel() + (many.numel() - few.numel()) // 2 * (rows - 2))
        for few, many in ((two.arena, four.arena), (two.out, four.out))
    )
    side_by_side = 2 if kind.op == "down_conv" else 1  # with their borders, then without
    most = max(tile.positions for tile in found)
    # The largest tiles, of GPUs without TMA, take one turn's memory at most widths.
    assert arena * (1 + side_by_side) + 2 * out <= (640 if most > 128 else 450) * 2**20
    assert measure._FRAMES * rows * measure._COLUMNS >= 0.75 * processors * most


# gather_taps: every value by itself, so that PyTorch's bits are the kernel's.


def pixels_of(patch, colours, dtype):
    frames, rows, columns = SIZE
    pixels = random(frames, rows * patch, columns * patch, colours, dtype=torch.float64).sigmoid().to(dtype)
    pixels[0, 0, 0, 0], pixels[-1, -1, -1, -1] = math.nan, math.inf
    return pixels


def gathered(pixels, patch, dtype, *, margins=None, transposed=False):
    """The arena that `gather_taps` wrote, NaN before; and the slots, in no order."""
    margins = margins or Margins()
    frames, height, width, colours = pixels.shape
    shape = height // patch - margins.top - margins.bottom, width // patch - margins.left - margins.right
    values = tap_channels(colours * patch**2)
    arena = torch.full((frames + 2, *(shape[::-1] if transposed else shape), values), math.nan, dtype=dtype)
    arena, slots = arena.to(DEVICE), order(frames, spare=2)
    pixels_ops.gather_taps(pixels, patch=patch, margins=margins, transposed=transposed, arena=arena, slots=slots)
    return arena, slots


@pytest.mark.parametrize(("patch", "colours"), [(1, 3), (2, 3), (1, 4)])  # Wan 2.1's, Wan 2.2's, K of 48
@pytest.mark.parametrize(
    ("pixels_dtype", "dtype"),
    [(torch.float32, dtype) for dtype in (*DTYPES, torch.float32)] + [(DTYPE, DTYPE), (DTYPE, torch.float32)],
)
def test_gather_taps_has_eagers_bits(patch, colours, pixels_dtype, dtype):
    pixels = pixels_of(patch, colours, pixels_dtype)
    arena, slots = gathered(pixels, patch, dtype)
    assert not pixels_kernels.why_not(pixels, arena)
    assert changed_alone(arena, torch.full_like(arena, math.nan), slots, 0)
    wanted, _ = eager_of(pixels_ops, gathered, pixels, patch, dtype)
    out, wanted = inside(arena, slots, 0), inside(wanted, slots, 0)
    exact = plain_taps(pixels, patch, arena.shape[3])
    for other in (wanted, exact):
        assert torch.equal(out.isnan(), other.isnan())
    # There are many NaNs.
    assert torch.equal(bits(out.masked_fill(out.isnan(), 0)), bits(wanted.masked_fill(wanted.isnan(), 0)))
    rounding = {"atol": 1e-7, "rtol": torch.finfo(dtype).eps}
    torch.testing.assert_close(out.double(), exact, **rounding, equal_nan=True)


@pytest.mark.parametrize("patch", [1, 2])
def test_gathered_taps_depend_on_no_shard_axis_or_tile(monkeypatch, patch):
    pixels = pixels_of(patch, 3, torch.float32)
    arena, _ = gathered(pixels, patch, DTYPE)
    rows, columns = SIZE[1:]
    for tile in (pixels_kernels._TILE_VALUES, 512):
        monkeypatch.setattr(pixels_kernels, "_TILE_VALUES", tile)
        monkeypatch.setattr(pixels_kernels, "_TRANSPOSED_TILE_VALUES", tile)
        assert torch.equal(bits(gathered(pixels, patch, DTYPE)[0]), bits(arena)), tile
        out, _ = gathered(pixels, patch, DTYPE, transposed=True)
        assert torch.equal(bits(turned(out)), bits(arena)), (tile, "transposed")
    for top, bottom, left, right in ((0, 1, 0, columns), (1, rows, 0, columns), (1, 2, 2, 4), (0, rows, 3, columns)):
        edges = Margins(top=top > 0, bottom=bottom < rows, left=left > 0, right=right < columns)
        part = pixels[
            :,
            (top - edges.top) * patch : (bottom + edges.bottom) * patch,
            (left - edges.left) * patch : (right + edges.right) * patch,
        ].contiguous()
        wanted = arena[:, top:bottom, left:right].contiguous()
        out, _ = gathered(part, patch, DTYPE, margins=edges)
        assert torch.equal(bits(out), bits(wanted)), edges
        out, _ = gathered(part, patch, DTYPE, margins=edges, transposed=True)
        assert torch.equal(bits(turned(out)), bits(wanted)), (edges, "transposed")


def test_gather_taps_kernel_says_what_it_does_not_take():
    pixels, slots = random(2, 4, 6, 3), torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    arena = torch.zeros((2, 4, 6, 32), dtype=DTYPE, device=DEVICE)
    options = {"patch": 1, "margins": Margins(), "transposed": False}
    for change, said in (
        ({"pixels": pixels.double()}, "not pixels in torch.float64"),
        ({"arena": arena.double()}, "an arena in torch.float64"),
        ({"pixels": turned(pixels).transpose(1, 2)}, "takes contiguous tensors"),
        ({"pixels": pixels[:1].expand(70000, 4, 6, 3).contiguous()}, "up to 65535 frames"),
        ({"slots": slots.long()}, "slots must be"),
        ({"slots": slots[:1]}, "slots must be"),
    ):
        given = {"pixels": pixels, "arena": arena, "slots": slots} | change
        assert bool(pixels_kernels.why_not(given["pixels"], given["arena"])) == ("slots" not in change)
        with pytest.raises(ValueError, match=said):
            pixels_kernels.gather_taps(**given, **options)


# add_averaged.


AVERAGES = [
    (64, 64, 1),  # Wan 2.2's first stage
    (32, 64, 2),  # its others: each frame goes to channels of its own
    (24, 12, 2),  # groups of 16; channels that fill no block
    (24, 16, 1),  # groups of 6, which no division by a power of two makes
]


def averaged(x, before, time_factor, transposed=False):
    out = turned(before) if transposed else before.clone()
    x = turned(x) if transposed else x
    assert shortcut_kernels.takes_average(x, out)
    shortcut_ops.add_averaged(x, time_factor=time_factor, transposed=transposed, out=out)
    return turned(out) if transposed else out


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("channels", "out_channels", "time_factor"), AVERAGES)
def test_add_averaged_rounds_once(channels, out_channels, time_factor, frames, dtype):
    rows, columns = SIZE[1:]
    # One frame alone has a blank one before it.
    x = random(1 if frames == 1 else frames * time_factor, 2 * rows, 2 * columns, channels, dtype=dtype)
    shortcut = plain_averaged(x, out_channels, time_factor)
    before = random(*shortcut.shape, dtype=dtype, seed=1)
    out = averaged(x, before, time_factor)
    exact = before.double() + shortcut
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)
    # Not twice, as the rounded average plus what was there is.
    assert relative_error(out, exact) <= 1.01 * relative_error(exact.to(dtype), exact) + 1e-7
    # To a rounding what PyTorch makes.
    eager = before.clone()
    eager_of(shortcut_ops, shortcut_ops.add_averaged, x, time_factor=time_factor, out=eager)
    torch.testing.assert_close(out, eager, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert torch.equal(averaged(x, before, time_factor, transposed=True), out)


@pytest.mark.parametrize(("channels", "out_channels", "time_factor"), AVERAGES)
def test_averages_depend_on_no_chunk_shard_or_tile(monkeypatch, channels, out_channels, time_factor):
    rows, columns = SIZE[1:]
    x = random(2 * time_factor, 2 * rows, 2 * columns, channels, dtype=DTYPE)
    before = random(2, rows, columns, out_channels, dtype=DTYPE, seed=1)
    whole = averaged(x, before, time_factor)
    assert torch.equal(averaged(x[time_factor:].clone(), before[1:].clone(), time_factor), whole[1:])
    for transposed in (False, True):
        part = averaged(x[:, 2:4, 4:].contiguous(), before[:, 1:2, 2:].contiguous(), time_factor, transposed)
        assert torch.equal(part, whole[:, 1:2, 2:])
    monkeypatch.setattr(shortcut_kernels, "_TILE_VALUES", 256)
    assert torch.equal(averaged(x, before, time_factor), whole)


def test_averages_of_very_many_values_or_in_fp64_are_pytorchs():
    x, out = random(2, 2, 2, 64, dtype=DTYPE), random(1, 1, 1, 8, dtype=DTYPE)
    assert shortcut_kernels.takes_average(x, out)
    assert not shortcut_kernels.takes_average(x, out[..., :4].contiguous())
    assert not shortcut_kernels.takes_average(x.double(), out.double())


# More than 2^31 values: the last frame is as it is alone.


def test_pixels_and_averages_of_more_than_2_to_the_31_values():
    frames, rows, columns = here((3, 2, 5), gpu=[(80, 900, 950)])[0]
    pixels = torch.zeros((frames, rows, columns, 3), device=DEVICE)
    pixels[-1] = random(rows, columns, 3)
    arena = torch.zeros((frames, rows, columns, 32), dtype=DTYPE, device=DEVICE)
    if not INTERPRETED:
        assert arena.numel() > 2**31
    slots = torch.arange(frames, dtype=torch.int32, device=DEVICE)
    pixels_ops.gather_taps(pixels, patch=1, margins=Margins(), arena=arena, slots=slots)
    alone = torch.zeros_like(arena[:1])
    pixels_ops.gather_taps(pixels[-1:].clone(), patch=1, margins=Margins(), arena=alone, slots=slots[:1])
    assert torch.equal(arena[-1:], alone)
    del pixels, alone
    # The same values as frames that are to be averaged.
    x = arena[:, : rows // 2 * 2, : columns // 2 * 2].contiguous()
    x = x.expand(2, *x.shape).flatten(0, 1)
    out = torch.zeros((frames, rows // 2, columns // 2, 64), dtype=DTYPE, device=DEVICE)
    shortcut_ops.add_averaged(x, time_factor=2, out=out)
    last = torch.zeros_like(out[-1:])
    shortcut_ops.add_averaged(x[-2:].clone(), time_factor=2, out=last)
    assert torch.equal(out[-1:], last)


def test_down_conv_in_and_out_of_more_than_2_to_the_31_values():
    channels, rows, columns, count, frames = here((32, 2, 5, 5, 3), gpu=[(96, 510, 509, 24, 90)])[0]
    _, (small, slots, weight, bias) = down_problem((1, rows, columns), channels, channels, dtype=DTYPE)
    wanted = conv_ops.down_conv(small, slots, weight, bias)
    assert wanted.isfinite().all()
    arena = torch.full((count, *small.shape[1:]), math.nan, dtype=DTYPE, device=DEVICE)
    arena[-1] = small[slots[0].item()]
    last = torch.full((frames,), count - 1, dtype=torch.int32, device=DEVICE)
    if not INTERPRETED:
        assert (count - 1) * arena[0].numel() > 2**31
        assert frames * wanted.numel() > 2**31
    for descriptors in {False, conv_kernels.use_descriptors(arena)}:
        out = torch.full((frames, rows, columns, channels), math.nan, dtype=DTYPE, device=DEVICE)
        down_kernels.down_conv(
            arena, last, weight, bias, out=out, out_slots=None, transposed=False, descriptors=descriptors
        )
        assert torch.equal(out[-1:], wanted), f"descriptors {descriptors}"
        assert torch.equal(out[:1], wanted), f"descriptors {descriptors}"
