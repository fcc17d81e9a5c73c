"""Attention over each frame against a softmax that is written out."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.plain import errs_at_most_twice_as_much, plain_attention, random
from wan_vae_parallel.ops.attention import frame_attention


def random_inputs(frames, queries, keys, channels, dtype=torch.float32):
    return [random(frames, size, channels, dtype=dtype, seed=i) for i, size in enumerate((queries, keys, keys))]


@pytest.mark.parametrize(
    ("frames", "queries", "keys", "channels"),
    [
        (1, 12, 12, 32),  # one frame whole
        (3, 35, 35, 32),  # frames don't look at one another
        (3, 10, 35, 32),  # a shard's queries, all rows' keys
        (2, 1, 1, 8),  # one position: it sees itself
        (2, 1, 7, 1),  # one channel
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_matches_softmax_attention(frames, queries, keys, channels, dtype, bound):
    inputs = random_inputs(frames, queries, keys, channels, dtype)
    out = frame_attention(*inputs)
    assert out.is_contiguous()
    assert out.shape == (frames, queries, channels)
    torch.testing.assert_close(out, plain_attention(*inputs), atol=5 * bound, rtol=5 * bound)


def test_takes_strided_slices_of_one_projection():
    # As the model hands them over: query, key and value lie in one tensor, key and value maybe in another.
    query, key, value = random(2, 6, 24).chunk(3, dim=-1)
    torch.testing.assert_close(frame_attention(query, key, value), plain_attention(query, key, value))
    key, value = random(2, 9, 16, seed=1).chunk(2, dim=-1)
    torch.testing.assert_close(frame_attention(query, key, value), plain_attention(query, key, value))


def test_nan_stays_in_its_frame():
    query, key, value = random_inputs(3, 4, 6, 8)
    key[1], value[1] = math.nan, math.nan
    out = frame_attention(query, key, value)
    assert out[1].isnan().all()
    assert not out[0::2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_eager(dtype):
    half = random_inputs(2, 40, 40, 64, dtype)
    exact = plain_attention(*(tensor.double() for tensor in half))
    assert errs_at_most_twice_as_much(frame_attention(*half), plain_attention(*half), exact)


def test_refuses_keys_of_fewer_frames():
    query, key, value = random_inputs(3, 5, 5, 8)
    with pytest.raises(ValueError, match=r"frame_attention takes"):
        frame_attention(query, key[:2], value)
