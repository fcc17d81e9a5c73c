"""The way of the frames to the host. On the CPU there is none; the GPU's is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from wan_vae_parallel.runtime.device_to_host import to_host
from wan_vae_parallel.runtime.steps import Frames


def test_on_the_cpu_frames_pass_through_one_by_one():
    made = []

    def frames():
        for i in range(3):
            made.append(torch.full((1, i + 1, 2, 2, 3), float(i)))
            yield Frames.of(made[-1])

    downloaded = to_host(frames(), torch.device("cpu"))
    for i, (batch, finite) in enumerate(downloaded):
        assert batch is made[i]
        assert finite
        assert len(made) == i + 1  # nothing is computed ahead of who takes it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_nan_anywhere_is_seen(dtype):
    steps = [torch.ones((2, 3, 4, 5, 3), dtype=dtype) for _ in range(3)]
    steps[1][1, 2, 3, 4, 2] = torch.nan
    assert [finite for _, finite in to_host(map(Frames.of, steps), torch.device("cpu"))] == [True, False, True]


def test_closing_it_closes_the_frames():
    closed = []

    def frames():
        try:
            while True:
                yield Frames.of(torch.zeros(1))
        finally:
            closed.append(True)

    downloaded = to_host(frames(), torch.device("cpu"))
    next(downloaded)
    downloaded.close()
    assert closed
