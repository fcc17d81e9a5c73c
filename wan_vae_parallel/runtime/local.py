"""A model's weights on one device, and the steps of decodes and encodes with them.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, H, W, C]
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..architecture import Architecture
from ..cancel import check_cancelled
from ..memory import most_at_once
from ..model.blocks import kernels_take
from ..model.decoder import WanDecoder
from ..model.encoder import WanEncoder
from ..model.lines import Piece
from ..model.state import Edges, PageKey, Pages, SlotLists, StreamState, WholePicture
from ..ops.dispatch import KERNEL_DTYPES, kernels_failed, kernels_multiply
from ..ops.frames import to_frames
from ..parallel.coordination import Coordinator
from ..parallel.window import PixelWindow
from . import tuning
from .arithmetic import exact_arithmetic
from .host_to_device import to_device
from .steps import Latents

# Numbers of frames that kernels are compiled for ahead, besides a whole chunk.
_MOST_COUNTS = 6


class _LocalModel:
    """A model's weights on ``device`` in ``dtype``.

    Args:
        model: on the meta device.
        architecture: what the weights are of.
        weights: the model's tensors by Wan's original keys.
        device: where to.
        dtype: in what.
    """

    def __init__(
        self,
        model: WanDecoder | WanEncoder,
        architecture: Architecture,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.dtype = dtype
        self._layers = model
        # Copied even where nothing changes: a file that is mapped into memory may change under us.
        own = {}
        for key, tensor in weights.items():
            check_cancelled()
            own[key] = tensor.detach().to(device, dtype, copy=True)
        model.load_state_dict(own, strict=True, assign=True)
        model.requires_grad_(False).eval()
        self._compiled: set[tuple[Any, ...]] = set()
        self._lists = SlotLists(device)
        # Whether `tune` was called.
        self.tuned = False

    def tune(self, coordinator: Coordinator | None = None) -> None:
        """Measures, or looks up, what convolves fastest here; with a ``coordinator`` its ranks call and agree."""
        convolutions = self._layers.convolutions()
        with exact_arithmetic(self.device, self.dtype):
            given = tuning.tune([conv.kind for conv in convolutions], self.device, self.dtype, coordinator)
        for conv in convolutions:
            conv.cudnn = conv.kind in given
        self.tuned = True

    @property
    def kernels(self) -> bool:
        """Whether our own kernels do all of the work."""
        ours = kernels_multiply(self.device, self.dtype) and kernels_take(self._layers)
        given_away = kernels_failed(self.device) or any(conv.cudnn for conv in self._layers.convolutions())
        return ours and not given_away

    def _compile(self, key: tuple[Any, ...], run: Callable[[], None]) -> None:
        """Compiles the kernels that ``run()`` launches, all at once; what was compiled for ``key`` before is there."""
        if self.dtype not in KERNEL_DTYPES or key in self._compiled:
            return
        with exact_arithmetic(self.device, self.dtype), torch.inference_mode():
            if not kernels_multiply(self.device, self.dtype):
                return
            from ..ops.kernels.launch import compile_all

            compile_all(run, self.device)
        self._compiled.add(key)


class LocalDecoder(_LocalModel):
    """A decoder's weights on ``device`` in ``dtype``, and the steps of decodes with them.

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
        with torch.device("meta"):
            self.model = WanDecoder(architecture)
        super().__init__(self.model, architecture, weights, device=device, dtype=dtype)

    @torch.inference_mode()
    def stream(
        self, latents: torch.Tensor, chunk: int, edges: Edges | None = None, *, transposed: bool = False
    ) -> Iterator[torch.Tensor]:
        """Decodes ``latents`` ``[B, z, T, h, w]``, de-normalised. Several images go through together.

        Args:
            latents: of any strides, dtype and device; a shard's own rows, if ``edges`` are a shard's.
            chunk: latent frames at once, or images.
            edges: what lies around the rows; by default nothing.
            transposed: rows and columns of ``latents`` have changed places.

        Yields:
            ``[B, t, H, W, C]`` in [0, 1] on the device, contiguous and never transposed, t frames that follow those
            before.
        """
        count, _, steps = latents.shape[:3]
        chunk = min(chunk, most_at_once(count, steps))
        edges = edges or WholePicture()
        pages = self._prepare(latents.shape, chunk, edges, transposed)
        if steps == 1:
            yield self._images(latents, pages, chunk, edges, transposed)
            return
        videos = [
            self.model.stream(
                # Whatever strides the caller's latents have, inside it is [T, h, w, z].
                video.to(self.device, self.dtype).permute(1, 2, 3, 0).contiguous(),
                StreamState(pages, edges=edges, transposed=transposed),
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

    def rehearse(self, shape: torch.Size, chunk: int, edges: Edges, *, transposed: bool) -> None:
        """Compiles what `stream` needs for latents of ``shape``; nothing is decoded, nor sent to other ranks."""
        with torch.inference_mode():
            self._prepare(shape, min(chunk, most_at_once(shape[0], shape[2])), edges, transposed)

    def _prepare(self, shape: torch.Size, chunk: int, edges: Edges, transposed: bool) -> Mapping[PageKey, Pages]:
        """Memory for a decode of latents of ``shape``, and its kernels."""
        count, _, steps, rows, columns = shape
        pages = self.model.pages(
            rows,
            columns,
            chunk=chunk,
            videos=count if steps > 1 else 1,
            keeps=steps > 1,
            dtype=self.dtype,
            device=self.device,
            lists=self._lists,
        )
        self._compile_for(shape, pages, chunk, edges, transposed)
        return pages

    def _images(
        self, latents: torch.Tensor, pages: Mapping[PageKey, Pages], chunk: int, edges: Edges, transposed: bool
    ) -> torch.Tensor:
        """``[B, 1, H, W, C]`` of latents ``[B, z, 1, h, w]``."""
        state = StreamState(pages, edges=edges, transposed=transposed, keeps=False)
        positions = latents[:, :, 0].to(self.device, self.dtype).permute(0, 2, 3, 1).contiguous()
        images: torch.Tensor | None = None
        done = 0
        with exact_arithmetic(self.device, self.dtype):
            for raw in self.model.stream(positions, state, chunk):
                some = to_frames(raw, self.architecture.patch, transposed=transposed)
                del raw
                if len(some) == len(positions):
                    return some[:, None]
                if images is None:
                    images = some.new_empty((len(positions), *some.shape[1:]))
                images[done : done + len(some)] = some
                done += len(some)
                check_cancelled()
        assert images is not None, "a batch has images"
        return images[:, None]

    def _compile_for(
        self, shape: torch.Size, pages: Mapping[PageKey, Pages], chunk: int, edges: Edges, transposed: bool
    ) -> None:
        """Compiles the kernels for latents of ``shape``."""
        batch, channels, steps, rows, columns = shape
        # The first frame, a whole chunk, and what is left: other numbers of frames may take other kernels.
        counts: dict[int, None]
        if steps > 1:
            counts = dict.fromkeys(1 + n for n in (chunk, (steps - 1) % chunk) if n)
        else:
            counts = dict.fromkeys(n for n in (chunk, batch % chunk) if n)

        def run() -> None:
            for count in counts:
                state = StreamState(pages, edges=edges.silent(), transposed=transposed, keeps=steps > 1)
                latents = torch.empty((count, rows, columns, channels), dtype=self.dtype, device=self.device)
                for raw in self.model.stream(latents, state, chunk):
                    to_frames(raw, self.architecture.patch, transposed=transposed)
                for one in pages.values():
                    one.reset()

        self._compile((rows, columns, tuple(counts), chunk, transposed, steps > 1), run)


class LocalEncoder(_LocalModel):
    """An encoder's weights on ``device`` in ``dtype``, and the steps of encodes with them.

    Encodes share nothing but the weights, so several may run at once.

    Args:
        architecture: what the weights are of.
        weights: the encoder's tensors by Wan's original keys.
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
        with torch.device("meta"):
            self.model = WanEncoder(architecture)
        super().__init__(self.model, architecture, weights, device=device, dtype=dtype)

    def stream(
        self,
        pieces: Iterable[Piece],
        window: PixelWindow,
        chunk: int,
        edges: Edges | None = None,
        *,
        image: bool = False,
        pixels: torch.dtype = torch.float32,
    ) -> Iterator[Latents]:
        """Encodes one video.

        Args:
            pieces: of its frames ``[n, H', W', C]`` in [0, 1], with their counts; only the window's pixels, of any
                float dtype, on the host or the device.
            window: which part of the picture they are.
            chunk: frames at once.
            edges: what lies around the rows; by default nothing.
            image: the frames are pictures that know nothing of one another, such as a single one.
            pixels: the frames' dtype.

        Yields:
            Latents that follow those before: once for each piece, and once more at the end.
        """
        transposed = window.transposed
        with torch.inference_mode():
            pages = self.model.pages(
                window.rows, window.columns, chunk=chunk, keeps=not image, dtype=self.dtype, device=self.device,
                lists=self._lists,
            )  # fmt: skip
        edges = edges or WholePicture()
        self._compile_for(window, pages, chunk, edges, image, pixels)
        state = StreamState(pages, edges=edges, transposed=transposed, keeps=not image)
        encoding = self.model.begin(state, chunk, window.margins)
        arrived = to_device(pieces, self.device)
        while True:
            piece = next(arrived, None)  # a caller's own work, outside of the mode and the settings for ours
            steps = encoding.end() if piece is None else encoding.push(piece)
            with self._computing():
                pixel_range = None
                if piece is not None and piece.frames is not None:
                    pixel_range = torch.stack(piece.frames.aminmax())  # NaN, if any pixel is
                ended = piece is None
                del piece
                means = list(steps)
                latents = self._for_host(torch.cat(means), transposed) if means else None
                del means
            yield Latents(latents, pixel_range)
            if ended:
                return

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), exact_arithmetic(self.device, self.dtype):
            yield

    def _for_host(self, means: torch.Tensor, transposed: bool) -> torch.Tensor:
        wide = means.to(torch.promote_types(self.dtype, torch.float32))
        # [t, h, w, z], or of a transposed plan [t, w, h, z]
        return wide.permute((3, 0, 2, 1) if transposed else (3, 0, 1, 2)).contiguous()

    def _compile_for(
        self,
        window: PixelWindow,
        pages: Mapping[PageKey, Pages],
        chunk: int,
        edges: Edges,
        image: bool,
        pixels: torch.dtype,
    ) -> None:
        """Compiles the kernels for a window's pixels."""
        # What a chunk is at a video's end, or where frames repeat: other numbers of frames may take other kernels.
        counts = sorted({*range(1, min(chunk, _MOST_COUNTS) + 1), chunk})

        def run() -> None:
            for count in counts:
                state = StreamState(pages, edges=edges.silent(), transposed=window.transposed, keeps=not image)
                frames = count if image else 1 + 2 * count
                shape = (frames, *window.shape, self.architecture.input_channels)
                blank = torch.empty(shape, dtype=pixels, device=self.device)
                encoding = self.model.begin(state, count, window.margins)
                for _ in itertools.chain(encoding.push(Piece(blank, (0,) * frames)), encoding.end()):
                    pass
                for one in pages.values():
                    one.reset()

        self._compile((window, chunk, image, pixels), run)
