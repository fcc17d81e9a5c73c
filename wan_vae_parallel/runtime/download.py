"""Frames on their way from the device to the host, while the device computes the next ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def to_host(frames: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Copies each tensor of ``frames`` to the host, one step behind the device.

    The copy of one step runs while the device works on the next; two page-locked buffers take turns.

    Args:
        frames: contiguous tensors on ``device``.
        device: where they are; on the CPU they pass through.

    Yields:
        The same tensors on the host, each valid until the next one is asked for.
    """
    if device.type != "cuda":
        yield from frames
        return
    buffers = [torch.empty(0), torch.empty(0)]
    waiting: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for count, batch in enumerate(frames):
        slot = count % 2
        if buffers[slot].numel() < batch.numel():
            buffers[slot] = torch.empty(batch.numel(), dtype=batch.dtype, pin_memory=True)
        host = buffers[slot][: batch.numel()].view(batch.shape)
        with torch.cuda.device(device):
            host.copy_(batch, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, copied
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]
