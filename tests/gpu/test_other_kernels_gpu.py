"""The Triton kernels of norms, attention, shortcuts and frames against fp64, and their bits.

T frames, H rows, W columns, C channels, S slots of an arena; see kernel_tests.py
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
    WIDTHS,
    eager_of,
    here,
    norm_inputs,
    order,
    random,
)
from tests.ops.plain import (
    bits,
    changed_alone,
    eager_norm,
    errs_at_most_twice_as_much,
    inside,
    plain_attention,
    plain_duplicated,
    plain_frames,
    plain_norm,
    relative_error,
    turned,
)
from wan_vae_parallel.ops import attention as attention_ops
from wan_vae_parallel.ops import frames as frames_ops
from wan_vae_parallel.ops import norm_silu as norm_ops
from wan_vae_parallel.ops import shortcut as shortcut_ops

pytestmark = MARKS
pytest.importorskip("triton", reason="there are no kernels without Triton")

# E402: what follows imports Triton, which may be missing.
from wan_vae_parallel.ops.kernels import attention as attention_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import attention_two_passes  # noqa: E402
from wan_vae_parallel.ops.kernels import frames as frames_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import norm as norm_kernels  # noqa: E402
from wan_vae_parallel.ops.kernels import shortcut as shortcut_kernels  # noqa: E402

# norm_silu, rms_norm.


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
        (torch.float16, 144),  # 9 times a power of two, as Qwen-Image-2.1 has them
        (torch.float32, 16),
        (torch.float16, 24),  # 3 times 8, the narrowest of a light VAE
        gpu=[(torch.bfloat16, channels) for channels in (*WIDTHS, 144, 288, 576, 1152)]
        + [(torch.float16, channels) for channels in (24, 40, 80, 384)]
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


@pytest.mark.parametrize("channels", here(96, 24, gpu=[24, 72, 96, 384, 1024]))
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
    monkeypatch.setattr(attention_two_passes, "WEIGHTS_AT_ONCE", 1)
    assert torch.equal(attention_ops.frame_attention(query, key, value)[1], whole[1])


@pytest.mark.parametrize("channels", here(80, 384, gpu=[80, 384, 1024]))
@pytest.mark.parametrize("two_passes", [False, True])
def test_attention_without_tma_or_room_errs_no_more(monkeypatch, channels, two_passes):
    """As GPUs do that have no descriptors, or shared memory for less."""
    inputs = attention_inputs(*here((2, 3, 150), gpu=[(2, 200, 333)])[0], channels)
    if not two_passes and not attention_kernels._fits(channels, DEVICE):
        pytest.skip("this many channels take two passes")
    exact = plain_attention(*(tensor.double() for tensor in inputs))
    eager = F.scaled_dot_product_attention(*(tensor.contiguous()[:, None] for tensor in inputs))[:, 0]
    monkeypatch.setattr(attention_kernels, "_fits", lambda *_: not two_passes)
    found = []
    for descriptors in (False, True):
        if descriptors and not attention_kernels.use_descriptors(inputs[0]):
            continue
        for module in (attention_kernels, attention_two_passes):
            monkeypatch.setattr(module, "use_descriptors", lambda _, descriptors=descriptors: descriptors)
        for wide in (False, True):
            monkeypatch.setattr(attention_two_passes, "wide_products", lambda _, wide=wide: wide)
            if INTERPRETED or wide == attention_kernels.wide_products(DEVICE):
                found.append(attention_kernels.frame_attention(*inputs))
                assert errs_at_most_twice_as_much(found[-1], eager, exact)
                shard = attention_kernels.frame_attention(inputs[0][1:, 1:3], inputs[1][1:], inputs[2][1:])
                assert torch.equal(shard, found[-1][1:, 1:3])
    if not INTERPRETED:  # whose products are numpy's
        assert all(torch.equal(out, found[0]) for out in found)


# to_frames, add_duplicated: every value by itself, so that PyTorch's bits are the kernels'.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_to_frames_has_eagers_bits(dtype, transposed, patch):
    x = 2 * random(*SIZE, 3 * patch**2, dtype=dtype)  # beyond [-1, 1] on both sides
    x[0, 0, 0, 0] = math.nan
    x[0, 0, 1] = math.inf
    seen = turned(x) if transposed else x
    assert not frames_kernels.why_not(seen, patch)
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


# More than 2^31 values: the last frame is as it is alone.


def last_alone(shape):
    """Zeros but for the last frame, and that frame."""
    frames = torch.zeros(shape, dtype=DTYPE, device=DEVICE)
    frames[-1] = random(*shape[1:], dtype=DTYPE)
    if not INTERPRETED:
        assert frames.numel() > 2**31
    return frames, frames[-1:].clone()


def test_a_norm_of_more_than_2_to_the_31_values():
    whole, last = last_alone(here((3, 2, 5, 96), gpu=[(90, 510, 509, 96)])[0])
    gamma = random(96, dtype=DTYPE)
    assert torch.equal(norm_ops.rms_norm(whole, gamma)[-1:], norm_ops.rms_norm(last, gamma))


@pytest.mark.parametrize("transposed", [False, True])
def test_frames_of_more_than_2_to_the_31_values(transposed):
    whole, last = last_alone(here((3, 4, 6, 3), gpu=[(80, 3000, 3001, 3)])[0])
    frames = frames_ops.to_frames(whole, 1, transposed=transposed)
    assert torch.equal(frames[-1:], frames_ops.to_frames(last, 1, transposed=transposed))


def test_a_shortcut_of_more_than_2_to_the_31_values():
    frames, rows, columns = here((3, 2, 5), gpu=[(12, 400, 450)])[0]
    out, last = last_alone((2 * frames, 2 * rows, 2 * columns, 128))
    x = random(frames, rows, columns, 128, dtype=DTYPE)
    shortcut_ops.add_duplicated(x, time_factor=2, phases=(0, 2), out=out)
    shortcut_ops.add_duplicated(x[-1:], time_factor=2, phases=(1, 2), out=last)
    assert torch.equal(out[-1:], last)


def test_attention_over_more_than_2_to_the_31_values():
    frames, queries, keys = here((2, 5, 7), gpu=[(600, 9400, 60)])[0]
    query, last = last_alone((frames, queries, 384))
    key, value = (random(frames, keys, 384, dtype=DTYPE, seed=seed) for seed in (1, 2))
    out = attention_ops.frame_attention(query, key, value)
    assert torch.equal(out[-1:], attention_ops.frame_attention(last, key[-1:], value[-1:]))
