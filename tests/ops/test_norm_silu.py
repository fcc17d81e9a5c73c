"""RMSNorm and SiLU against torch.nn.functional's, into the interiors of bordered buffers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from wan_vae_parallel.ops import norm_silu as module
from wan_vae_parallel.ops.norm_silu import norm_silu, rms_norm


def reference(x, gamma):
    return F.silu(F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) * gamma.reshape(-1))


def poisoned_interior(shape, dtype=torch.float32):
    """A bordered buffer full of NaN and its interior, of ``shape``."""
    frames, rows, columns, channels = shape
    buffer = torch.full((frames + 2, rows + 2, columns + 2, channels), math.nan, dtype=dtype)
    return buffer, buffer[2:, 1:-1, 1:-1]


def inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    return x, 1 + 0.1 * torch.randn((shape[-1], 1, 1, 1), generator=generator, dtype=dtype)


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
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_matches_the_reference_and_writes_every_element_of_out_alone(shape, dtype, bound):
    x, gamma = inputs(shape, dtype)
    buffer, interior = poisoned_interior(shape, dtype)
    norm_silu(x, gamma, out=interior)
    assert (interior - reference(x, gamma)).abs().max() <= bound * x.abs().max()
    # Nothing but the interior was touched.
    assert buffer.isnan().sum() == buffer.numel() - interior.numel()


def test_takes_a_contiguous_out_too():
    x, gamma = inputs((2, 3, 4, 8))
    out = torch.full_like(x, math.nan)
    norm_silu(x, gamma, out=out)
    torch.testing.assert_close(out, reference(x, gamma))


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
    whole, blocks = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    norm_silu(x, gamma, out=whole)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    norm_silu(x, gamma, out=blocks)
    # Close, not exact: torch's CPU kernels treat the elements behind the last full vector by another path.
    torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_eager(dtype):
    x, gamma = (tensor.to(dtype) for tensor in inputs((2, 7, 9, 96)))
    exact = reference(x.double(), gamma.double())
    # Eager as diffusers does it: the statistics in fp32, the scaling in half precision.
    normalized = F.normalize(x.float(), dim=-1).to(dtype)
    eager = F.silu(normalized * math.sqrt(96) * gamma.reshape(-1))
    _, out = poisoned_interior(x.shape, dtype)
    norm_silu(x, gamma, out=out)
    assert (out.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


def test_squares_that_overflow_fp16_are_summed_in_fp32():
    x = torch.full((1, 1, 1, 96), 1000.0, dtype=torch.float16)
    out = torch.full_like(x, math.nan)
    norm_silu(x, torch.ones(96, dtype=torch.float16), out=out)
    torch.testing.assert_close(out.float(), F.silu(torch.ones(1, 1, 1, 96)), atol=1e-3, rtol=0)


def test_zeros_stay_zeros():
    # 0 / 0 would be NaN: a black border of the latent must not become one.
    out = torch.full((1, 2, 2, 8), math.nan)
    norm_silu(torch.zeros(1, 2, 2, 8), torch.ones(8), out=out)
    assert torch.equal(out, torch.zeros_like(out))


def test_leaves_its_input_alone():
    # The residual's shortcut still needs it.
    x, gamma = inputs((2, 3, 4, 8))
    before = x.clone()
    norm_silu(x, gamma, out=torch.empty_like(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2, 3, 4, 9), (2, 3, 5, 8), (1, 3, 4, 8)])
def test_refuses_an_out_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"x \(2, 3, 4, 8\), out"):
        norm_silu(torch.zeros(2, 3, 4, 8), torch.ones(8), out=torch.zeros(shape))


def test_refuses_a_gamma_of_another_length():
    # One value would broadcast and scale everything alike.
    with pytest.raises(ValueError, match=r"gamma \(1,\)"):
        norm_silu(torch.zeros(2, 3, 4, 8), torch.ones(1), out=torch.zeros(2, 3, 4, 8))


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_rms_norm_leaves_the_rounding_to_its_caller(dtype, wide):
    x, gamma = inputs((2, 3, 4, 8), dtype)
    normalized = rms_norm(x, gamma)
    assert normalized.dtype == wide
    expected = F.normalize(x.double(), dim=-1) * math.sqrt(8) * gamma.double().reshape(-1)
    torch.testing.assert_close(normalized.double(), expected, atol=1e-6, rtol=1e-6)
