"""Frames and latents on their way from the device to the host, while the device computes the next ones."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch

from .steps import Latents


def to_host(frames: Iterator[torch.Tensor], device: torch.device) -> Iterator[tuple[torch.Tensor, bool]]:
    """Copies each tensor of ``frames`` to the host, one step behind the device.

    The copy of one step runs while the device works on the next; two page-locked buffers take turns. All work goes to
    the stream that is current at the beginning, whichever is when the next tensor is asked for.

    Args:
        frames: contiguous tensors on ``device``, of values in [0, 1].
        device: where they are; on the CPU they pass through.

    Yields:
        The same tensors on the host, each valid until the next one is asked for, and whether they are free of NaN.
    """
    if device.type != "cuda":
        for on_host in frames:
            yield on_host, bool(_finite(on_host))
        return
    stream = torch.cuda.current_stream(device)
    first = waiting = None
    second: _Buffer | None = None
    while True:
        with torch.cuda.stream(stream):
            batch = next(frames, None)
            if batch is not None:
                first, second = second, first
                if first is None or not first.fits(batch):
                    first = _Buffer(batch)
                first.take(batch)
        if waiting:
            yield waiting.content()
        if batch is None:
            return
        waiting = first


def _finite(frames: torch.Tensor) -> torch.Tensor:
    # One pass without a mask: a sum of values in [0, 1] is NaN only where one of them is.
    return frames.sum().isfinite()


class _Buffer:
    """Page-locked memory for steps of at most as many frames as ``batch`` has."""

    def __init__(self, batch: torch.Tensor) -> None:
        with torch.inference_mode(False):  # they may be written to in another mode than they were made in
            self._memory = torch.empty(batch.numel(), dtype=batch.dtype, device="cpu", pin_memory=True)
            self._finite = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._copied = torch.cuda.Event()
        self._frames = self._memory

    def fits(self, batch: torch.Tensor) -> bool:
        return batch.numel() <= self._memory.numel()

    def take(self, batch: torch.Tensor) -> None:
        """Copies ``batch``, after what the current stream has to do before."""
        self._frames = self._memory[: batch.numel()].view(batch.shape)
        self._frames.copy_(batch, non_blocking=True)
        self._finite.copy_(_finite(batch), non_blocking=True)
        self._copied.record()

    def content(self) -> tuple[torch.Tensor, bool]:
        """What was copied, once it is there."""
        self._copied.synchronize()
        return self._frames, bool(self._finite)


def latents_to_host(
    steps: Iterator[Latents], device: torch.device
) -> Iterator[tuple[torch.Tensor | None, bool, float, float]]:
    """`to_host` for the steps of an encode.

    Yields:
        Means ``[z, t, h, w]`` on the host, valid until the next step is asked for, or None; whether they are finite;
        and the least and the largest of the pixels that were read, 0 if none were.
    """
    shapes: collections.deque[torch.Size | None] = collections.deque()

    def packed() -> Iterator[torch.Tensor]:
        for step in steps:
            like = step.means if step.means is not None else step.pixel_range
            wide = torch.promote_types(like.dtype, torch.float32) if like is not None else torch.float32
            bounds = torch.zeros(2, device=device) if step.pixel_range is None else step.pixel_range
            shapes.append(None if step.means is None else step.means.shape)
            means = [] if step.means is None else [step.means.flatten()]
            yield torch.cat([bounds.to(wide), *means])

    for flat, finite in to_host(packed(), device):
        shape = shapes.popleft()
        least, most = flat[:2].tolist()
        yield None if shape is None else flat[2:].view(shape), finite, least, most
