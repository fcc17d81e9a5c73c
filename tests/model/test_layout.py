"""Every convolution is asked for in channels-last order. tests/gpu looks at copies and kernels on CUDA too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.layouts import LayoutSpy, layouts_of_a_decode
from tests.oracle import FAMILIES, oracle_vae, random_latents
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.runtime.local import LocalDecoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (1, 1)])  # (1, 1): strides of size-1 axes
def test_every_convolution_gets_channels_last_tensors(family, rows, columns):
    checkpoint = checkpoint_from_state_dict(oracle_vae(family).state_dict(), source="the oracle")
    decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=CPU, dtype=torch.float32)
    latents = random_latents(family, frames=4, rows=rows, columns=columns)
    spy = layouts_of_a_decode(decoder, latents, 2)
    assert spy.convolutions > 60
    # Copies are judged on CUDA alone: for small inputs torch's CPU kernels answer in planar order whatever they get.
    assert not spy.planar


def test_the_spy_sees_what_it_looks_for():
    x, weight = torch.randn(1, 8, 3, 4, 5), torch.randn(8, 8, 3, 3, 3)
    with torch.no_grad():
        with LayoutSpy() as spy:
            F.conv3d(x, weight)
        assert len(spy.planar) == 2  # input and weight
        with LayoutSpy() as spy:
            x.contiguous(memory_format=torch.channels_last_3d)
        assert len(spy.reordered) == 1
        with LayoutSpy() as spy:
            x.permute(0, 2, 3, 4, 1).contiguous()
        assert len(spy.reordered) == 1
        with LayoutSpy() as spy:
            x[:, :, 1:].clone()
        assert not spy.reordered
