"""One rank's part of a decode or an encode: its rows of the video, on its device.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, rows, W, C]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from .._version import __version__
from ..architecture import Architecture
from ..memory import (
    DeviceMemory,
    decode_memory,
    encode_memory,
    free_memory,
    largest_chunk,
    largest_encode_chunk,
    most_encoded_at_once,
)
from ..model.lines import Piece
from ..parallel.coordination import Coordinator, fingerprint
from ..parallel.edges import ShardEdges
from ..parallel.peer_memory import PeerMemory
from ..parallel.plan import ShardPlan
from ..parallel.window import PixelWindow
from .local import LocalDecoder, LocalEncoder
from .steps import Latents

# How every rank lays out activations, and so the bytes that neighbours exchange.
_LAYOUT = "[T, H, W, C] contiguous"


Weights = Mapping[str, torch.Tensor]
Model = TypeVar("Model", LocalDecoder, LocalEncoder)


class _ShardModel(Generic[Model]):
    """A model that takes any rank's rows of any video."""

    def __init__(self, local: Model, weights: Weights) -> None:
        self.architecture = local.architecture
        self.device = local.device
        self.dtype = local.dtype
        self._fingerprint = fingerprint(weights)
        self._local: Model = local

    def facts(self) -> dict[str, str]:
        """What all ranks must have in common, for `parallel.coordination.check_agreement`."""
        return {
            "version": __version__,
            "memory format": _LAYOUT,
            "dtype": str(self.dtype),
            "architecture": str(self.architecture),
            "weights": self._fingerprint,
        }

    @property
    def tuned(self) -> bool:
        """Whether `tune` was called."""
        return self._local.tuned

    def tune(self, coordinator: Coordinator) -> None:
        """Agrees with all ranks on what convolves; see `runtime.tuning`."""
        self._local.tune(coordinator)

    def _room(self, chunk: int, needed: Callable[[int], DeviceMemory]) -> int:
        """The largest chunk of at most ``chunk`` that there is memory for, by what each needs; 0 for none."""
        if self.device.type != "cuda":
            return chunk
        while chunk:
            memory = needed(chunk)
            try:
                # Taken now, while no other rank waits for this one; torch keeps it for the steps.
                torch.empty(memory.caches + memory.step, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:
                chunk //= 2
                continue
            return chunk
        return 0


class ShardDecoder(_ShardModel[LocalDecoder]):
    """A decoder that takes any rank's rows of any video.

    Args:
        architecture: of the VAE.
        weights: the decoder's.
        device: where to decode.
        dtype: in what.
    """

    def __init__(self, architecture: Architecture, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(LocalDecoder(architecture, weights, device=device, dtype=dtype), weights)

    def room(self, plan: ShardPlan, shard: int, shape: torch.Size, asked: int) -> int:
        """The largest chunk of at most ``asked`` that ``shard`` has the memory for; 0 for none.

        Args:
            plan: the split.
            shard: which rows.
            shape: of the whole video's latents, ``[B, z, T, h, w]``.
            asked: latent frames at once; 0 for as many as pay.
        """
        size = (shape[0], shape[2], plan.height(shard) + 2, plan.columns)
        free = free_memory(self.device)
        kernels = self._local.kernels
        chunk = asked or largest_chunk(
            self.architecture, size, dtype=self.dtype, free=free, kernels=kernels, device_type=self.device.type
        )

        def needed(chunk: int) -> DeviceMemory:
            return decode_memory(self.architecture, size, chunk=chunk, dtype=self.dtype, kernels=kernels)

        return self._room(chunk, needed)

    def own_rows(self, latents: torch.Tensor, plan: ShardPlan, shard: int) -> torch.Tensor:
        """The part of the whole video's latents ``[B, z, T, h, w]`` that ``shard`` decodes, on the device.

        Of a transposed plan rows and columns have changed places.
        """
        if plan.transposed:
            latents = latents.transpose(-1, -2)
        rows = latents[:, :, :, plan.bounds[shard] : plan.bounds[shard + 1]]
        return rows.to(self.device, self.dtype)

    def steps(
        self,
        rows: torch.Tensor,
        plan: ShardPlan,
        group: dist.ProcessGroup,
        chunk: int,
        peer_memory: PeerMemory | None = None,
    ) -> Iterator[torch.Tensor]:
        """Decodes this rank's rows.

        Args:
            rows: of the latents, see `own_rows`.
            plan: the split; rank r of ``group`` has shard r.
            group: at least as many ranks as shards; those with one must take the same steps.
            chunk: latent frames at once, the same on all.
            peer_memory: the group's, if it has one.

        Yields:
            ``[B, t, rows, W, C]`` on the device, of a transposed plan ``[B, t, H, columns, C]``.
        """
        return self._local.stream(rows, chunk, ShardEdges(plan, group, peer_memory), transposed=plan.transposed)

    def rehearse(
        self,
        plan: ShardPlan,
        group: dist.ProcessGroup,
        shape: torch.Size,
        chunk: int,
        peer_memory: PeerMemory | None = None,
    ) -> None:
        """Compiles what `steps` needs for this rank's rows of latents of ``shape`` ``[B, z, T, h, w]``."""
        own = torch.Size((*shape[:3], plan.height(dist.get_rank(group)), plan.columns))
        self._local.rehearse(own, chunk, ShardEdges(plan, group, peer_memory), transposed=plan.transposed)


class ShardEncoder(_ShardModel[LocalEncoder]):
    """An encoder that takes any rank's rows of any video.

    Args:
        architecture: of the VAE.
        weights: the encoder's.
        device: where to encode.
        dtype: in what.
    """

    def __init__(self, architecture: Architecture, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(LocalEncoder(architecture, weights, device=device, dtype=dtype), weights)

    def room(self, plan: ShardPlan, shard: int, frames: int | None, asked: int, *, image: bool | None = None) -> int:
        """The largest chunk of at most ``asked`` that ``shard`` has the memory for; 0 for none.

        Args:
            plan: the split.
            shard: which rows.
            frames: of the video, if it is known; or of a batch of pictures.
            asked: frames at once; 0 for as many as pay.
            image: they are pictures; by default one frame alone is.
        """
        size = (plan.height(shard) + 1, plan.columns)
        kernels, image = self._local.kernels, frames == 1 if image is None else image
        chunk = asked or largest_encode_chunk(
            self.architecture,
            size,
            frames=frames,
            dtype=self.dtype,
            free=free_memory(self.device),
            kernels=kernels,
            device_type=self.device.type,
            image=image,
        )
        if frames is not None:
            chunk = min(chunk, most_encoded_at_once(frames, image=image))

        def needed(chunk: int) -> DeviceMemory:
            return encode_memory(self.architecture, size, chunk=chunk, image=image, dtype=self.dtype, kernels=kernels)

        return self._room(chunk, needed)

    def window(self, plan: ShardPlan, shard: int) -> PixelWindow:
        """The pixels that ``shard`` reads."""
        ratio, patch = self.architecture.encode_ratio, self.architecture.encoder_patch
        return PixelWindow.of(plan, shard, ratio=ratio, patch=patch)

    def steps(
        self,
        pieces: Iterable[Piece],
        plan: ShardPlan,
        group: dist.ProcessGroup,
        chunk: int,
        peer_memory: PeerMemory | None = None,
        *,
        image: bool,
        pixels: torch.dtype = torch.float32,
    ) -> Iterator[Latents]:
        """Encodes this rank's rows.

        Args:
            pieces: of the whole video, the same on all ranks.
            plan: the split; rank r of ``group`` has shard r.
            group: at least as many ranks as shards; those with one must take the same steps.
            chunk: frames at once, the same on all.
            peer_memory: the group's, if it has some.
            image: there is one frame only.
            pixels: the frames' dtype.

        Yields:
            What `LocalEncoder.stream` does, of this rank's rows or columns.
        """
        edges = ShardEdges(plan, group, peer_memory)
        window = self.window(plan, edges.shard)

        def own() -> Iterator[Piece]:
            for piece in pieces:
                frames = piece.frames
                if frames is not None:
                    frames = frames[:, window.top : window.bottom, window.left : window.right]
                yield Piece(frames, piece.counts)

        return self._local.stream(own(), window, chunk, edges, image=image, pixels=pixels)
