"""The whole decoder: a chain of stages through which a video passes in steps of time.

T latent frames, t frames of a step, h rows of this shard, w columns, z latent channels
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import nn

from ..architecture import Architecture
from .blocks import AttentionBlock, ResidualBlock, UpBlock, stage_modules
from .layers import CausalConv3d, PointwiseConv, RMSNorm, norm_silu_conv
from .state import DecodeState


class _Decoder(nn.Module):
    """What Wan's checkpoints keep under ``decoder.``; `WanDecoder` runs it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        first, last = architecture.first_channels, architecture.width
        self.conv1 = CausalConv3d(architecture.z_dim, first)
        self.middle = nn.ModuleList([ResidualBlock(first, first), AttentionBlock(first), ResidualBlock(first, first)])
        if architecture.residual:
            self.upsamples = nn.ModuleList([UpBlock(stage) for stage in architecture.stages])
        else:
            self.upsamples = nn.ModuleList([m for stage in architecture.stages for m in stage_modules(stage)])
        out_channels = architecture.output_channels * architecture.patch**2
        self.output = RMSNorm(last), CausalConv3d(last, out_channels)  # a tuple, so not registered twice
        # "0" and "2" are the indices of the published nn.Sequential.
        self.head = nn.ModuleDict(dict(zip(("0", "2"), self.output, strict=True)))


class WanDecoder(nn.Module):
    """Latents in, raw frames out, in steps of time; strict about its state dict (Wan's original keys)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv2 = PointwiseConv(architecture.z_dim, architecture.z_dim)
        self.decoder = _Decoder(architecture)

    def stages(self) -> list[list[nn.Module]]:
        """The modules of each stage, coarse to fine; the middle block belongs to the first."""
        modules = list(self.decoder.upsamples)
        if self.architecture.residual:
            stages = [[module] for module in modules]
        else:
            lengths = [stage.blocks + (stage.upsample is not None) for stage in self.architecture.stages]
            stages = [[modules.pop(0) for _ in range(length)] for length in lengths]
        return [[*self.decoder.middle, *stages[0]], *stages[1:]]

    def stream(self, latents: torch.Tensor, state: DecodeState, chunk: int) -> Iterator[torch.Tensor]:
        """Decodes one video, step by step.

        The first latent frame goes alone, the others ``chunk`` at a time; and no stage takes more than ``chunk``
        frames at once, however many the stages before it have made of them. As all that passes from one step to
        the next lies in feature caches, the result does not depend on ``chunk``.

        Args:
            latents: ``[T, h, w, z]``, contiguous, in the weights' dtype and on their device.
            state: a fresh one.
            chunk: latent frames at once, >= 1.

        Yields:
            ``[t, rows, columns, colours * patch**2]`` with t <= ``chunk``, roughly in [-1, 1], not clamped.
        """
        stages = self.stages()
        # What waits in front of each stage. The finest stage that has work goes first: little waits anywhere, and
        # the video's first frame has left before the second latent frame enters.
        queues: list[deque[torch.Tensor]] = [deque() for _ in range(len(stages) + 1)]
        queues[0].extend((latents[:1], *(latents[1:].split(chunk) if len(latents) > 1 else ())))
        while any(queues):
            finest = max(i for i, queue in enumerate(queues) if queue)
            x = queues[finest].popleft()
            state.last = not any(queues[: finest + 1])
            if finest == len(stages):
                yield norm_silu_conv(x, *self.decoder.output, state)
                del x
                state.first = False
                continue
            if finest == 0:
                x = self._enter(x, state)
            for module in stages[finest]:
                x = module(x, state)
            queues[finest + 1].extend(x.split(chunk))
            del x

    def _enter(self, latents: torch.Tensor, state: DecodeState) -> torch.Tensor:
        conv = self.decoder.conv1
        buffer = conv.input_buffer(latents.shape, state)
        conv.interior(buffer).copy_(self.conv2(latents))
        return conv(buffer, state)
