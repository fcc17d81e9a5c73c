"""Pixels on their way from the host to the device, while the device computes with those before.

n frames of a piece, H x W pixels, C colours
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..model.encoder import Piece


def to_device(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    """Copies each piece's frames to the device, contiguous there; two page-locked buffers take turns.

    A copy is begun when its piece is asked for, which is when the device still has work to do.

    Args:
        pieces: of frames ``[n, H, W, C]`` on the host, of any strides, or on a device.
        device: where to.

    Yields:
        The same pieces there.
    """
    buffers: list[_Buffer] = []
    turn = 0
    for piece in pieces:
        frames = piece.frames
        if frames is None:
            yield piece
        elif device.type != "cuda" or frames.is_cuda:
            yield Piece(frames.to(device).contiguous(), piece.counts)
        else:
            if len(buffers) < 2:
                buffers.append(_Buffer())
            buffer = buffers[turn % len(buffers)]
            turn += 1
            yield Piece(buffer.send(frames, device), piece.counts)


class _Buffer:
    """Page-locked memory for one piece on its way."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._sent = torch.cuda.Event()

    def send(self, frames: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``frames`` on the device; the host goes on, and may change them, when the copy is on its way."""
        if self._memory is None or self._memory.numel() < frames.numel() or self._memory.dtype != frames.dtype:
            self._memory = torch.empty(frames.numel(), dtype=frames.dtype, device="cpu", pin_memory=True)
        else:
            self._sent.synchronize()
        staged = self._memory[: frames.numel()].view(frames.shape)
        staged.copy_(frames)
        on_device = staged.to(device, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(device))
        return on_device
