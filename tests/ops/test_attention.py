"""Attention over each frame against a softmax that is written out."""

from __future__ import annotations

import math

import pytest
import torch

from wan_vae_parallel.ops.attention import frame_attention


def plain_attention(query, key, value):
    scores = torch.einsum("tnc,tmc->tnm", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("tnm,tmc->tnc", scores.softmax(-1), value)


def random_inputs(frames, queries, keys, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(frames, size, channels, generator=generator, dtype=dtype) for size in sizes]


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


def test_takes_the_strided_halves_of_a_joint_key_and_value():
    # As the model hands them over: slices of one projection's output.
    query, *_ = random_inputs(2, 6, 6, 8)
    both = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    key, value = both.chunk(2, dim=-1)
    torch.testing.assert_close(frame_attention(query, key, value), plain_attention(query, key, value))


def test_in_bf16_errs_at_most_twice_as_much_as_eager():
    half = random_inputs(2, 40, 40, 64, torch.bfloat16)
    exact = plain_attention(*(tensor.double() for tensor in half))
    eager = plain_attention(*half)
    error = (frame_attention(*half).double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max()


def test_refuses_keys_of_fewer_frames():
    query, key, value = random_inputs(3, 5, 5, 8)
    with pytest.raises(ValueError, match="shorter"):
        frame_attention(query, key[:2], value)
