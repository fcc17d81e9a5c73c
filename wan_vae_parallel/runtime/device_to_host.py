"""Frames and latents on their way from the device to the host, while the device computes the next ones."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import torch

from .steps import Frames, Latents


def to_host(
    frames: Iterator[Frames], device: torch.device, ahead: int = 1, light_ahead: int = 1
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Copies each step's values to the host, some steps behind the device.

    The copy of one step runs while the device works on the next; page-locked buffers take turns. All work goes to the
    stream that is current at the beginning, whichever is when the next tensor is asked for.

    Args:
        frames: of steps, on ``device``.
        device: where they are; on the CPU they pass through.
        ahead: steps that the device gets before the first of them is waited for.
        light_ahead: the same, where all but ``ahead`` of them are light.

    Yields:
        The values on the host, each valid until the next ones are asked for, and whether they are free of NaN.
    """
    if device.type != "cuda":
        for on_host in frames:
            yield on_host.values, bool(on_host.finite)
        return
    stream = torch.cuda.current_stream(device)
    waiting: collections.deque[_Buffer] = collections.deque()
    spare: collections.deque[_Buffer] = collections.deque()
    most = 0
    while True:
        with torch.cuda.stream(stream):
            step = next(frames, None)
            if step is not None:
                buffer = spare.popleft() if spare else None
                if buffer is None or not buffer.fits(step.values):
                    most = max(most, step.values.numel())
                    buffer = _Buffer(most, step.values.dtype)
                buffer.take(step)
                waiting.append(buffer)
        while waiting and (step is None or too_many([buffer.light for buffer in waiting], ahead, light_ahead)):
            yield waiting[0].content()
            spare.append(waiting.popleft())
        if step is None:
            return


def too_many(light: Sequence[bool], ahead: int, light_ahead: int) -> bool:
    """Whether the first of the steps on their way is to be waited for, by which of them are light; as `to_host`'s."""
    return light.count(False) > ahead or len(light) > max(ahead, light_ahead)


class _Buffer:
    """Page-locked memory for steps of at most so many values."""

    def __init__(self, values: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # they may be written to in another mode than they were made in
            self._memory = torch.empty(values, dtype=dtype, device="cpu", pin_memory=True)
            self._finite = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._copied = torch.cuda.Event()
        self._frames = self._memory
        # Whether the step is.
        self.light = False

    def fits(self, batch: torch.Tensor) -> bool:
        return batch.numel() <= self._memory.numel()

    def take(self, step: Frames) -> None:
        """Copies a step, after what the current stream has to do before."""
        self.light = step.light
        self._frames = self._memory[: step.values.numel()].view(step.values.shape)
        self._frames.copy_(step.values, non_blocking=True)
        self._finite.copy_(step.finite, non_blocking=True)
        self._copied.record()

    def content(self) -> tuple[torch.Tensor, bool]:
        """What was copied, once it is there."""
        self._copied.synchronize()
        return self._frames, bool(self._finite)


def latents_to_host(
    steps: Iterator[Latents], device: torch.device, ahead: int = 1, light_ahead: int = 1
) -> Iterator[tuple[torch.Tensor | None, bool, float, float]]:
    """`to_host` for the steps of an encode, which are light where no pixels come with them.

    Yields:
        Means ``[z, t, h, w]`` on the host, valid until the next step is asked for, or None; whether they are finite;
        and the least and the largest of the pixels that were read, 0 if none were.
    """
    shapes: collections.deque[torch.Size | None] = collections.deque()

    def packed() -> Iterator[Frames]:
        for step in steps:
            like = step.means if step.means is not None else step.pixel_range
            wide = torch.promote_types(like.dtype, torch.float32) if like is not None else torch.float32
            bounds = torch.zeros(2, device=device) if step.pixel_range is None else step.pixel_range
            shapes.append(None if step.means is None else step.means.shape)
            means = [] if step.means is None else [step.means.flatten()]
            flat = torch.cat([bounds.to(wide), *means])
            yield Frames(flat, flat.sum().isfinite(), light=step.pixel_range is None)

    for flat, finite in to_host(packed(), device, ahead, light_ahead):
        shape = shapes.popleft()
        least, most = flat[:2].tolist()
        yield None if shape is None else flat[2:].view(shape), finite, least, most
