"""The whole decoder: a chain of stages through which a video passes in steps of time.

T latent frames, t frames of a step, h rows of this shard, w columns, z latent channels
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture
from .blocks import Needs, Resample, StageRun, UpBlock, Waiting, add_needs, middle_modules, stage_modules
from .layers import CausalConv3d, HeadConv, PointwiseConv, RMSNorm, UpsampleConv, norm_silu_frames
from .state import PageKey, Pages, SlotLists, StreamState, make_pages


class _Decoder(nn.Module):
    """What Wan's checkpoints keep under ``decoder.``; `WanDecoder` runs it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        first, last, seen = architecture.first_channels, architecture.width, architecture.kernel_frames
        self.conv1 = CausalConv3d(architecture.z_dim, first, scale=1, kernel=(seen, 3, 3))
        self.middle = nn.ModuleList(middle_modules(first, seen))
        if architecture.residual:
            self.upsamples = nn.ModuleList([UpBlock(stage, seen) for stage in architecture.stages])
        else:
            self.upsamples = nn.ModuleList([m for stage in architecture.stages for m in stage_modules(stage, seen)])
        out_channels = architecture.output_channels * architecture.patch**2
        scale = architecture.stages[-1].scale
        head = HeadConv(last, out_channels, scale=scale, kernel_frames=seen, order=_head_order(architecture))
        self.output = RMSNorm(last), head  # a tuple, so not registered twice
        # "0" and "2" are the indices of the published nn.Sequential.
        self.head = nn.ModuleDict(dict(zip(("0", "2"), self.output, strict=True)))


def _head_order(architecture: Architecture) -> list[int] | None:
    """Published channels in the order (colour, column, row), which frames are made of; None if they are in it.

    Frames of twice the size were published as (colour, row, column), as `torch.nn.functional.pixel_shuffle` has them.
    """
    if architecture.upscale == 1:
        return None
    indices = torch.arange(architecture.output_channels * architecture.upscale**2, device="cpu")
    order: list[int] = indices.view(-1, architecture.upscale, architecture.upscale).transpose(1, 2).flatten().tolist()
    return order


class WanDecoder(nn.Module):
    """Latents in, raw frames out, in steps of time; strict about its state dict (Wan's original keys)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv2 = PointwiseConv(architecture.z_dim, architecture.z_dim)
        self.decoder = _Decoder(architecture)

    def stages(self) -> list[StageRun]:
        """The stages, coarse to fine; the middle block belongs to the first."""
        residual = self.architecture.residual
        modules: list[Any] = list(self.decoder.upsamples)
        runs: list[StageRun] = []
        lead: list[Any] = list(self.decoder.middle)
        entry: Resample | None = None
        for stage in self.architecture.stages:
            if residual:
                own = list(modules.pop(0).upsamples)
            else:
                own = [modules.pop(0) for _ in range(stage.blocks + (stage.upsample is not None))]
            exit = own.pop() if stage.upsample else None
            runs.append(StageRun(entry, lead, own, exit, shortcut=residual and exit is not None))
            lead, entry = [], exit
        return runs

    def convolutions(self) -> list[CausalConv3d | UpsampleConv]:
        """All layers that see more than one position; the others are matrix products, and take little time."""
        found = (module for module in self.modules() if isinstance(module, (CausalConv3d, UpsampleConv)))
        return [module for module in found if module.kind.kernel != (1, 1, 1)]

    def page_needs(self, chunk: int, *, image: bool = False) -> Needs:
        """The pages that a decode of ``chunk`` latent frames (or images) at once writes its convolutions' inputs to."""
        return add_needs(
            [
                self.decoder.conv1.needs(chunk, image=image),
                *(stage.needs(chunk, image=image) for stage in self.stages()),
                self.decoder.output[1].needs(chunk, image=image),
            ]
        )

    def pages(
        self,
        rows: int,
        columns: int,
        *,
        chunk: int,
        videos: int,
        keeps: bool,
        dtype: torch.dtype,
        device: torch.device,
        lists: SlotLists | None = None,
    ) -> dict[PageKey, Pages]:
        """Pages for videos of ``rows`` x ``columns`` latents that take turns; ``lists`` of earlier ones save time."""
        needs = self.page_needs(chunk, image=not keeps)
        return make_pages(needs, rows, columns, videos=videos, keeps=keeps, dtype=dtype, device=device, lists=lists)

    def stream(self, latents: torch.Tensor, state: StreamState, chunk: int) -> Iterator[torch.Tensor]:
        """Decodes one video, or images, step by step.

        The first latent frame goes alone, the others ``chunk`` at a time; and no stage takes more than ``chunk``
        frames at once, however many the stages before it have made of them. As all that passes from one step to
        the next lies in past frames, the result does not depend on ``chunk``. Images know nothing of one another, so
        that any number of them goes through as one frame does.

        Args:
            latents: ``[T, h, w, z]``, contiguous, in the weights' dtype and on their device; of images T are many.
            state: a fresh one, with pages for this ``chunk``.
            chunk: latent frames, or images, at once, >= 1.

        Yields:
            ``[t, rows, columns, colours * patch**2]`` with t <= ``chunk``, roughly in [-1, 1], not clamped.
        """
        stages = self.stages()
        # What waits in front of each stage. The finest stage that has work goes first: little waits anywhere, and
        # the video's first frame has left before the second latent frame enters.
        together = latents.split(chunk) if state.image else (latents[:1], *latents[1:].split(chunk))
        entering = deque(part for part in together if len(part))
        queues: list[deque[Waiting]] = [deque() for _ in stages]
        while entering or any(queues):
            finest = max((i for i, queue in enumerate(queues) if queue), default=0)
            stage = stages[finest]
            x = stage.enter(queues[finest].popleft(), state) if finest else self._enter(entering.popleft(), state)
            left = stage.run(x, state)
            del x
            if isinstance(left, Waiting):
                queues[finest + 1].extend(left.split(chunk))
                del left
                continue
            norm, conv = self.decoder.output
            frames = norm_silu_frames(left, norm, conv, state)
            del left
            yield conv(frames, state)
            state.first = state.image

    def _enter(self, latents: torch.Tensor, state: StreamState) -> torch.Tensor:
        conv = self.decoder.conv1
        frames = conv.take(len(latents), state)
        self.conv2(latents, into=frames)
        return conv(frames, state)
