"""Last activations to pictures, against a loop over the patch's places. Places are exact, values within a rounding."""

from __future__ import annotations

import pytest
import torch

from wan_vae_parallel.ops.frames import to_frames


def plain_frames(x, patch):
    frames, rows, columns, channels = x.shape
    out = torch.empty(frames, rows * patch, columns * patch, channels // patch**2, dtype=torch.float64)
    for colour in range(out.shape[-1]):
        for column in range(patch):
            for row in range(patch):
                out[:, row::patch, column::patch, colour] = x[..., (colour * patch + column) * patch + row].double()
    return ((out + 1) / 2).clamp(0, 1)


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
def test_every_value_lands_in_its_place(size, colours, patch, dtype, wide, bound):
    x = torch.randn(*size, colours * patch**2, generator=torch.Generator().manual_seed(0)).to(dtype)
    frames = to_frames(x, patch)
    assert frames.dtype == wide
    assert frames.is_contiguous()
    assert frames.shape == (size[0], size[1] * patch, size[2] * patch, colours)
    assert (frames.double() - plain_frames(x, patch)).abs().max() <= bound


def test_maps_the_ends_of_the_range_exactly_and_clamps_beyond():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0, torch.inf]).view(2, 1, 1, 3)
    assert to_frames(x, 1).flatten().tolist() == [0, 0, 0.5, 1, 1, 1]


def test_leaves_its_input_alone():
    x = torch.randn(1, 2, 2, 3)
    before = x.clone()
    to_frames(x, 1)
    assert torch.equal(x, before)
