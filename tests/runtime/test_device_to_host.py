"""The way of the frames to the host. On the CPU there is none; the GPU's is tested in tests/gpu."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from wan_vae_parallel.runtime.device_to_host import to_host, too_many
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


@pytest.mark.parametrize(
    ("light", "ahead", "light_ahead", "expected"),
    [
        ([], 1, 1, False),
        ([False], 1, 1, False),
        ([False, False], 1, 1, True),
        # Whoever wants one answer for each step gets it, light or not.
        ([True, True], 1, 1, True),
        ([False] * 4 + [True] * 12, 4, 16, False),
        ([False] * 4 + [True] * 13, 4, 16, True),
        ([True, False, True, False], 1, 16, True),
    ],
)
def test_light_steps_may_be_more(light, ahead, light_ahead, expected):
    assert too_many(light, ahead, light_ahead) == expected


class _NoEvent:
    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.mark.parametrize("ahead", [(1, 1), (4, 4), (1, 4), (2, 3), (9, 9)])
def test_values_that_wait_are_not_written_over(monkeypatch, ahead):
    """The GPU's way with everything in order, on the CPU: which step is held back, and in which memory."""
    empty = torch.empty

    def unpinned(*size, **how):
        assert how.pop("pin_memory")
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", _NoEvent)
    sizes = [1, 4, 2, 2, 8, 3, 1, 1, 5]
    light = [False, True, True, False, False, True, True, True, False]
    made, most = 0, 0

    def frames():
        nonlocal made
        for i, size in enumerate(sizes):
            made += 1
            values = torch.full((size, 2), float(i))
            yield Frames(values, values.sum().isfinite(), light=light[i])

    for i, (values, finite) in enumerate(to_host(frames(), types.SimpleNamespace(type="cuda"), *ahead)):
        assert finite
        assert values.tolist() == [[i, i]] * sizes[i]
        waiting = light[i:made]
        most = max(most, len(waiting) - 1)
        assert waiting[:-1].count(False) <= ahead[0]
    assert i == len(sizes) - 1
    assert most == min(max(ahead), len(sizes) - 1)
