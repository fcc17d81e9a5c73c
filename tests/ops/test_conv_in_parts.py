"""Convolutions of more values than torch's own can count: our kernels', even where cuDNN is faster, or done in parts.

With a limit that small tensors reach. Results are close: torch's kernels differ between sizes in their last bits.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from tests.ops.plain import (
    conv_problem,
    down_problem,
    plain_conv,
    plain_down_conv,
    plain_upsample_conv,
    random,
    turned,
    upsample_problem,
)
from wan_vae_parallel.ops import conv as ops
from wan_vae_parallel.ops import kernels

FP32 = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
SIZE = (5, 7, 6)
# From one part to parts of a single row; the least is what one row of one frame takes.
LIMITS = [10**6, 4000, 2600, 1500]


@pytest.fixture(params=LIMITS)
def limited(request, monkeypatch):
    """Calls a function with a limit, and looks at what torch's convolutions get and make meanwhile."""

    def limited(function, *arguments, **options):
        sizes = []

        def spied(real):
            def convolve(x, *others, **named):
                out = real(x, *others, **named)
                sizes.append(max(x.numel(), out.numel()))
                return out

            return convolve

        with monkeypatch.context() as patch:
            patch.setattr(ops, "MOST_VALUES", request.param)
            for name in ("conv2d", "conv3d"):
                patch.setattr(F, name, spied(getattr(F, name)))
            out = function(*arguments, **options)
        assert 0 < max(sizes) <= request.param
        # In no more parts than need be: doubling all of them goes beyond the limit.
        assert len(sizes) == 1 or 4 * max(sizes) > request.param or function is ops.upsample_conv
        return out

    return limited


@pytest.mark.parametrize(("kernel", "stride", "halves"), [((3, 3, 3), 1, 1), ((3, 1, 1), 2, 1), ((3, 1, 1), 1, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_conv(limited, kernel, stride, halves, transposed):
    arena, slots, weight, bias = conv_problem(SIZE, 16, 24, kernel, time_stride=stride)
    expected = plain_conv(arena, slots, weight, bias, time_stride=stride, halves=halves)
    residual = random(*expected.shape, seed=7)
    given, added = (turned(arena), turned(residual)) if transposed else (arena, residual)
    out = limited(
        ops.conv,
        *(given, slots, weight, bias),
        residual=added,
        time_stride=stride,
        halves=halves,
        transposed=transposed,
    )
    torch.testing.assert_close(turned(out) if transposed else out, expected + residual, **FP32)
    assert out.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_upsample_conv(limited, transposed):
    frames, (arena, slots, weight, bias) = upsample_problem((2, 5, 6), 16, 8)
    given = turned(arena) if transposed else arena
    out = limited(ops.upsample_conv, given, slots, weight, bias, folded=None, transposed=transposed)
    torch.testing.assert_close(turned(out) if transposed else out, plain_upsample_conv(frames, weight, bias), **FP32)


@pytest.mark.parametrize("transposed", [False, True])
def test_down_conv(limited, transposed):
    pictures, (arena, slots, weight, bias) = down_problem(SIZE, 16, 8)
    out = limited(ops.down_conv, turned(arena) if transposed else arena, slots, weight, bias, transposed=transposed)
    torch.testing.assert_close(turned(out) if transposed else out, plain_down_conv(pictures, weight, bias), **FP32)


def test_head_conv(limited):
    arena, slots, weight, bias = conv_problem(SIZE, 16, 3)
    out = limited(ops.head_conv, arena, slots, weight, bias, prepared=None)
    torch.testing.assert_close(out, plain_conv(arena, slots, weight, bias), **FP32)


class Taken(Exception):
    """A kernel of ours was called."""


@pytest.fixture
def ours(monkeypatch):
    """Kernels that take everything, and say so."""

    def taken(*_, **__):
        raise Taken

    names = ("conv", "upsample_conv", "down_conv", "head_conv")
    stand_in = types.SimpleNamespace(takes=lambda *_, **__: True, **dict.fromkeys(names, taken))
    for name in ("conv", "down_conv", "head_conv"):
        monkeypatch.setitem(sys.modules, f"wan_vae_parallel.ops.kernels.{name}", stand_in)
        monkeypatch.setattr(kernels, name, stand_in, raising=False)
    monkeypatch.setattr(ops, "kernels_run", lambda _: True)


def _conv():
    ops.conv(*conv_problem(SIZE, 16, 24), cudnn=True)


def _upsample_conv():
    _, (arena, slots, weight, bias) = upsample_problem(SIZE, 16, 8)
    ops.upsample_conv(arena, slots, weight, bias, folded=weight, cudnn=True)


def _down_conv():
    ops.down_conv(*down_problem(SIZE, 16, 8)[1], cudnn=True)


def _head_conv():
    arena, slots, weight, bias = conv_problem(SIZE, 16, 3)
    prepared = ops.PreparedHead(weight, 4, 2, False)
    ops.head_conv(arena, slots, weight, bias, prepared=prepared, cudnn=True)


def _head_conv_that_has_no_kernel():
    ops.head_conv(*conv_problem(SIZE, 16, 3), prepared=None, cudnn=True)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("convolve", [_conv, _upsample_conv, _down_conv, _head_conv, _head_conv_that_has_no_kernel])
def test_what_cudnn_won_is_our_kernels_where_it_has_more_values_than_that_counts(monkeypatch, convolve):
    convolve()  # cuDNN's
    monkeypatch.setattr(ops, "MOST_VALUES", 1000)
    with pytest.raises(Taken):
        convolve()


def test_the_limit_is_that_of_32_bits():
    assert ops.MOST_VALUES == 2**31 - 1
