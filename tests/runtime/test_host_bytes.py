"""Large copies and comparisons on the host: any strides, any dtype, however many parts, after a fork too."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from wan_vae_parallel.runtime.host_bytes import copy, equal_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]


def video(dtype, shape=(2, 3, 300, 400, 4)):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return (255 * values).to(dtype) if dtype == torch.uint8 else values.to(dtype)


VIEWS = {
    "whole": lambda x: x,
    "one frame": lambda x: x[1, 2],
    "a few": lambda x: x[:, 1:],
    "rows": lambda x: x[:, :, 7:290],
    "columns": lambda x: x[:, :, :, 5:333],
    "colours": lambda x: x[..., :3],
    "transposed": lambda x: x.transpose(2, 3),
    "none": lambda x: x[:, :0],
    "one value": lambda x: x[0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_a_copy_is_torchs(name, dtype):
    values = VIEWS[name](video(dtype))
    for into in (torch.zeros(values.shape, dtype=dtype), VIEWS[name](torch.zeros(2, 3, 300, 400, 4, dtype=dtype))):
        copy(into, values)
        assert torch.equal(into, values)
        assert equal_bits(into, values)


def test_nothing_around_a_view_is_written():
    into = torch.zeros(2, 3, 300, 400, 4)
    copy(into[:, :, 7:290, 5:333], torch.ones(2, 3, 283, 328, 4))
    assert into.sum() == 2 * 3 * 283 * 328 * 4


@pytest.mark.parametrize("place", [0, 123_456, 359_999])
def test_one_value_makes_a_difference_wherever_it_lies(place):
    one, other = video(torch.float32, (300, 400, 3)), video(torch.float32, (300, 400, 3))
    assert equal_bits(one, other)
    other.view(-1)[place] += 1e-3
    assert not equal_bits(one, other)


def test_bits_are_compared_and_not_values():
    nan, zero = torch.full((5,), torch.nan), torch.zeros(5)
    assert equal_bits(nan, nan.clone())
    assert not equal_bits(zero, -zero)


def test_other_dtypes_and_shapes_are_left_to_torch():
    into = torch.zeros(3, 4, 5)
    copy(into, torch.ones(5, dtype=torch.float64))
    assert into.eq(1).all()


def test_values_may_be_of_inference_mode_and_want_gradients():
    with torch.inference_mode():
        values = video(torch.float32)
    into = torch.empty_like(values)
    copy(into, values)
    assert torch.equal(into, values)
    wanting = video(torch.float32).requires_grad_()
    copy(into, wanting)
    assert torch.equal(into, wanting)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_fork_has_threads_of_its_own():
    values = video(torch.float32)
    copy(torch.empty_like(values), values)
    child = os.fork()
    if not child:
        into = torch.empty_like(values)
        copy(into, values)
        os._exit(0 if torch.equal(into, values) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
