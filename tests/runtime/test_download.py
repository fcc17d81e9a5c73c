"""The way of the frames to the host. On the CPU there is none; the GPU's is tested in tests/gpu."""

from __future__ import annotations

import torch

from wan_vae_parallel.runtime.download import to_host


def test_on_the_cpu_frames_pass_through_one_by_one():
    made = []

    def frames():
        for i in range(3):
            made.append(torch.full((1, i + 1, 2, 2, 3), float(i)))
            yield made[-1]

    downloaded = to_host(frames(), torch.device("cpu"))
    for i, batch in enumerate(downloaded):
        assert batch is made[i]
        assert len(made) == i + 1  # nothing is computed ahead of who takes it


def test_closing_it_closes_the_frames():
    closed = []

    def frames():
        try:
            while True:
                yield torch.zeros(1)
        finally:
            closed.append(True)

    downloaded = to_host(frames(), torch.device("cpu"))
    next(downloaded)
    downloaded.close()
    assert closed
