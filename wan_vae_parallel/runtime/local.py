"""A decoder's weights on one device, and the steps of decodes with them.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, H, W, C]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..architecture import Architecture
from ..cancel import check_cancelled
from ..model.decoder import WanDecoder
from ..model.state import Edges, PageKey, Pages, SlotLists, StreamState, WholePicture
from ..ops.dispatch import KERNEL_DTYPES, kernels_multiply
from ..ops.frames import to_frames
from ..parallel.coordination import Coordinator
from . import tuning
from .arithmetic import exact_arithmetic


class LocalDecoder:
    """Weights on ``device`` in ``dtype``, and the steps of decodes with them.

    Decodes share nothing but the weights, so several may run at once.

    Args:
        architecture: what the weights are of.
        weights: the decoder's tensors by Wan's original keys.
        device: where to.
        dtype: in what.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.dtype = dtype
        with torch.device("meta"):
            self.model = WanDecoder(architecture)
        # Copied even where nothing changes: a file that is mapped into memory may change under us.
        own = {}
        for key, tensor in weights.items():
            check_cancelled()
            own[key] = tensor.detach().to(device, dtype, copy=True)
        self.model.load_state_dict(own, strict=True, assign=True)
        self.model.requires_grad_(False).eval()
        self._compiled: set[tuple[Any, ...]] = set()
        self._lists = SlotLists(device)
        # Whether `tune` was called.
        self.tuned = False

    def tune(self, coordinator: Coordinator | None = None) -> None:
        """Measures, or looks up, what convolves fastest here; with a ``coordinator`` its ranks call and agree."""
        convolutions = self.model.convolutions()
        with exact_arithmetic(self.device, self.dtype):
            given = tuning.tune([conv.kind for conv in convolutions], self.device, self.dtype, coordinator)
        for conv in convolutions:
            conv.cudnn = conv.kind in given
        self.tuned = True

    @property
    def kernels(self) -> bool:
        """Whether our own kernels do all of a decode."""
        ours = kernels_multiply(self.device, self.dtype)
        return ours and not any(conv.cudnn for conv in self.model.convolutions())

    @torch.inference_mode()
    def stream(
        self, latents: torch.Tensor, chunk: int, edges: Edges | None = None, *, transposed: bool = False
    ) -> Iterator[torch.Tensor]:
        """Decodes ``latents`` ``[B, z, T, h, w]``, de-normalised.

        Args:
            latents: of any strides, dtype and device; a shard's own rows, if ``edges`` are a shard's.
            chunk: latent frames at once.
            edges: what lies around the rows; by default nothing.
            transposed: rows and columns of ``latents`` have changed places.

        Yields:
            ``[B, t, H, W, C]`` in [0, 1] on the device, contiguous and never transposed, t frames that follow those
            before.
        """
        count, _, steps, rows, columns = latents.shape
        chunk = max(1, min(chunk, steps - 1))
        pages = self.model.pages(
            rows,
            columns,
            chunk=chunk,
            videos=count,
            keeps=steps > 1,
            dtype=self.dtype,
            device=self.device,
            lists=self._lists,
        )
        edges = edges or WholePicture()
        self._compile(latents.shape, pages, chunk, edges, transposed)
        videos = [
            self.model.stream(
                # Whatever strides the caller's latents have, inside it is [T, h, w, z].
                video.to(self.device, self.dtype).permute(1, 2, 3, 0).contiguous(),
                StreamState(pages, edges=edges, transposed=transposed, keeps=steps > 1),
                chunk,
            )
            for video in latents
        ]
        patch = self.architecture.patch
        while True:
            with exact_arithmetic(self.device, self.dtype):
                raw = [frames for frames in (next(video, None) for video in videos) if frames is not None]
                frames = [to_frames(one, patch, transposed=transposed) for one in raw]
                del raw
                if not frames:
                    return
                batch = frames[0][None] if len(frames) == 1 else torch.stack(frames)
            del frames
            yield batch

    def _compile(
        self, shape: torch.Size, pages: Mapping[PageKey, Pages], chunk: int, edges: Edges, transposed: bool
    ) -> None:
        """Compiles the kernels for latents of ``shape``, all at once instead of one after the other."""
        _, channels, steps, rows, columns = shape
        # The first frame, a whole chunk, and what is left: other numbers of frames may take other kernels.
        counts = dict.fromkeys(1 + n for n in (chunk, (steps - 1) % chunk) if n and steps > 1) or {1: None}
        key = rows, columns, tuple(counts), chunk, transposed
        if self.dtype not in KERNEL_DTYPES or key in self._compiled:
            return
        with exact_arithmetic(self.device, self.dtype), torch.inference_mode():
            if not kernels_multiply(self.device, self.dtype):
                return
            from ..ops.kernels.launch import compile_all

            def run() -> None:
                for count in counts:
                    state = StreamState(pages, edges=edges.silent(), transposed=transposed, keeps=steps > 1)
                    latents = torch.empty((count, rows, columns, channels), dtype=self.dtype, device=self.device)
                    for raw in self.model.stream(latents, state, chunk):
                        to_frames(raw, self.architecture.patch, transposed=transposed)
                    for one in pages.values():
                        one.reset()

            compile_all(run, self.device)
        self._compiled.add(key)
