"""Convolutions over bordered buffers against torch's on padded NCDHW tensors.

Layout facts are exact, values close: torch's CPU kernels differ between memory formats in their last bits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan_vae_parallel.ops.conv import causal_conv3d, frame_conv2d, pointwise_conv

FP32 = {"atol": 1e-5, "rtol": 1e-5}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bordered(x, past, border):
    """``[T, H, W, C]`` behind ``past`` zero frames and inside ``border`` zeros, contiguous."""
    return F.pad(x, (0, 0, border, border, border, border, past, 0)).contiguous()


def plain_causal_conv3d(x, weight, bias):
    """The same in NCDHW, padded by torch: zeros before the first frame, none after the last."""
    border = weight.shape[-1] // 2
    padded = F.pad(x.permute(3, 0, 1, 2)[None], (border,) * 4 + (weight.shape[2] - 1, 0))
    return F.conv3d(padded.contiguous(), weight.contiguous(), bias)[0].permute(1, 2, 3, 0)


SHAPES = [
    (4, 6, 8, 16, 24),  # a plain one
    (1, 3, 5, 8, 8),  # one frame, odd sides
    (2, 1, 1, 8, 4),  # one position, with zeros all around
    (3, 1, 4, 4, 8),  # one row: strides of size-1 axes are ambiguous
    (1, 1, 1, 1, 1),  # every axis is of size 1
    (2, 3, 3, 1, 5),  # one channel in
    (2, 3, 3, 5, 1),  # one channel out
]


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=["space and time", "time only"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_causal_conv3d_matches_a_padded_convolution(shape, kernel, memory_format):
    *size, channels, out_channels = shape
    x = random(*size, channels)
    weight, bias = random(out_channels, channels, *kernel, seed=1), random(out_channels, seed=2)
    buffer = bordered(x, past=2, border=kernel[1] // 2)
    out = causal_conv3d(buffer, weight.contiguous(memory_format=memory_format), bias)
    assert out.shape == (*size, out_channels)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_causal_conv3d(x, weight, bias), **FP32)


def test_causal_conv3d_in_two_parts_is_the_whole():
    # What the feature caches rest on: the past frames stand in the buffer instead of zeros.
    x, weight, bias = random(5, 4, 6, 8), random(8, 8, 3, 3, 3, seed=1), random(8, seed=2)
    buffer = bordered(x, past=2, border=1)
    parts = [causal_conv3d(buffer[:4].contiguous(), weight, bias), causal_conv3d(buffer[2:], weight, bias)]
    torch.testing.assert_close(torch.cat(parts), plain_causal_conv3d(x, weight, bias), **FP32)


def test_causal_conv3d_in_fp64():
    x, weight, bias = (random(*shape, dtype=torch.float64) for shape in ((3, 4, 5, 8), (6, 8, 3, 3, 3), (6,)))
    out = causal_conv3d(bordered(x, past=2, border=1), weight.contiguous(memory_format=torch.channels_last_3d), bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain_causal_conv3d(x, weight, bias), atol=1e-12, rtol=1e-12)


def test_causal_conv3d_in_bf16_errs_at_most_twice_as_much_as_eager():
    x, weight, bias = random(3, 5, 7, 16), random(16, 16, 3, 3, 3, seed=1), random(16, seed=2)
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    exact = plain_causal_conv3d(*(tensor.double() for tensor in half))
    eager = plain_causal_conv3d(*half)
    out = causal_conv3d(bordered(half[0], past=2, border=1), half[1].to(memory_format=torch.channels_last_3d), half[2])
    assert (out.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


def test_causal_conv3d_refuses_a_buffer_that_is_not_contiguous():
    # The channels-last view of an NCDHW tensor: its bytes are not what its shape says.
    buffer = random(8, 5, 6, 7).permute(1, 2, 3, 0)
    with pytest.raises(ValueError, match=r"contiguous buffer, not one with strides \(42, 7, 1, 210\)"):
        causal_conv3d(buffer, random(4, 8, 3, 3, 3), random(4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frame_conv2d_matches_a_padded_convolution(shape, memory_format):
    *size, channels, out_channels = shape
    x = random(*size, channels)
    weight, bias = random(out_channels, channels, 3, 3, seed=1), random(out_channels, seed=2)
    buffer = bordered(x, past=0, border=1)
    out = frame_conv2d(buffer, weight.contiguous(memory_format=memory_format), bias)
    expected = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=1).permute(0, 2, 3, 1)
    assert out.shape == (*size, out_channels)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, **FP32)


def test_frame_conv2d_in_bf16_errs_at_most_twice_as_much_as_eager():
    x, weight, bias = (t.bfloat16() for t in (random(3, 5, 7, 16), random(16, 16, 3, 3, seed=1), random(16, seed=2)))
    planes = x.permute(0, 3, 1, 2).contiguous()
    exact = F.conv2d(planes.double(), weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    eager = F.conv2d(planes, weight, bias, padding=1).permute(0, 2, 3, 1)
    out = frame_conv2d(bordered(x, past=0, border=1), weight.to(memory_format=torch.channels_last), bias)
    assert (out.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


def test_frame_conv2d_refuses_a_buffer_that_is_not_contiguous():
    with pytest.raises(ValueError, match="contiguous buffer, not one with strides"):
        frame_conv2d(random(8, 5, 6, 7).permute(1, 2, 3, 0), random(4, 8, 3, 3), random(4))


@pytest.mark.parametrize("axes", [2, 3])  # attention's weights have two trailing axes, shortcuts' three
@pytest.mark.parametrize("contiguous", [True, False])
def test_pointwise_conv_matches_a_convolution(axes, contiguous):
    x = random(3, 4, 5, 8) if contiguous else random(8, 3, 4, 5).permute(1, 2, 3, 0)
    weight, bias = random(6, 8, *(1,) * axes, seed=1), random(6, seed=2)
    out = pointwise_conv(x, weight, bias)
    if axes == 3:
        expected = F.conv3d(x.permute(3, 0, 1, 2)[None].contiguous(), weight, bias)[0].permute(1, 2, 3, 0)
    else:
        expected = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias).permute(0, 2, 3, 1)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, **FP32)
