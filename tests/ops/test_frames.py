"""Last activations to pictures, against a loop over the patch's places. Places are exact, values within a rounding."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.plain import plain_frames, random
from wan_vae_parallel.ops.frames import to_frames


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("colours", [3, 4])  # 4: with alpha
@pytest.mark.parametrize("size", [(3, 4, 6), (1, 3, 5), (2, 1, 1)])
@pytest.mark.parametrize(
    ("dtype", "wide", "bound"),
    [
        (torch.float32, torch.float32, 1e-7),
        (torch.bfloat16, torch.float32, 1e-7),  # not rounded to bf16 again: its pictures would show bands
        (torch.float16, torch.float32, 1e-7),
        (torch.float64, torch.float64, 0),
    ],
)
def test_every_value_lands_in_its_place(monkeypatch, size, colours, patch, dtype, wide, bound):
    x = random(*size, colours * patch**2, dtype=dtype)
    expected = plain_frames(x, patch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    frames = to_frames(x, patch)
    assert frames.dtype == wide
    assert frames.is_contiguous()
    assert frames.shape == (size[0], size[1] * patch, size[2] * patch, colours)
    assert (frames.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("patch", [1, 2])
def test_transposed_activations_make_the_same_pictures(patch):
    x = random(2, 3, 5, 3 * patch**2)
    frames = to_frames(x.transpose(1, 2).contiguous(), patch, transposed=True)
    assert frames.is_contiguous()
    assert torch.equal(frames, to_frames(x, patch))


def test_maps_the_ends_of_the_range_exactly_and_clamps_beyond():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0, torch.inf]).view(2, 1, 1, 3)
    assert to_frames(x, 1).flatten().tolist() == [0, 0, 0.5, 1, 1, 1]


def test_leaves_its_input_alone():
    x = random(1, 2, 2, 3)
    before = x.clone()
    to_frames(x, 1)
    assert torch.equal(x, before)
