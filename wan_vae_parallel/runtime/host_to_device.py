"""Pixels on their way from the host to the device, while the device computes with those before.

n frames of a piece, H x W pixels, C colours
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..model.lines import Piece
from .host_bytes import copy


def to_device(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    """Copies each piece's frames to the device, contiguous there; two page-locked buffers take turns.

    A copy is begun when its piece is asked for, which is when the device still has work to do.

    Args:
        pieces: of frames ``[n, H, W, C]`` of any strides on the host, where they may change when the next piece is
            asked for, or on a device, where they stay.
        device: where to.

    Yields:
        The same pieces there.
    """
    buffers: list[_Buffer] = []
    turn = 0
    # Of its own, so that a copy does not wait for what the device computes.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for piece in pieces:
        frames = piece.frames
        if frames is None:
            yield piece
        elif stream is None:
            # Of its own on the CPU, too: a piece may wait in front of a stage, and what it came in is used again.
            own = frames.to(device, memory_format=torch.contiguous_format, copy=True)
            yield Piece(own, piece.counts)
        elif frames.is_cuda:
            yield Piece(frames.to(device).contiguous(), piece.counts)
        else:
            if len(buffers) < 2:
                buffers.append(_Buffer(stream))
            buffer = buffers[turn % len(buffers)]
            turn += 1
            yield Piece(buffer.send(frames, device), piece.counts)


class _Buffer:
    """Page-locked memory for one piece on its way, in a stream for copies."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._memory: torch.Tensor | None = None
        self._sent = torch.cuda.Event()

    def send(self, frames: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``frames`` on the device; the host goes on, and may change them, when the copy is on its way."""
        if self._memory is None or self._memory.numel() < frames.numel() or self._memory.dtype != frames.dtype:
            with torch.inference_mode(False):  # it may be written to in another mode than it was made in
                self._memory = torch.empty(frames.numel(), dtype=frames.dtype, device="cpu", pin_memory=True)
        else:
            self._sent.synchronize()
        staged = self._memory[: frames.numel()].view(frames.shape)
        copy(staged, frames)
        with torch.cuda.stream(self._stream):
            on_device = staged.to(device, non_blocking=True)
            self._sent.record()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(self._sent)
        on_device.record_stream(computing)
        return on_device
