"""One rank's part of a decode: its rows of the video, on its device.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, rows, W, C]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from .._version import __version__
from ..files.checkpoint import Checkpoint
from ..memory import decode_memory, free_memory, largest_chunk
from ..parallel.coordination import Coordinator, fingerprint
from ..parallel.edges import ShardEdges
from ..parallel.peer_memory import PeerMemory
from ..parallel.plan import ShardPlan
from .local import LocalDecoder

# How every rank lays out activations, and so the bytes that neighbours exchange.
_LAYOUT = "[T, H, W, C] contiguous"


class ShardDecoder:
    """A decoder that takes any rank's rows of any video.

    Args:
        checkpoint: the weights.
        device: where to decode.
        dtype: in what.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.architecture = checkpoint.architecture
        self.device = device
        self.dtype = dtype
        self._fingerprint = fingerprint(checkpoint.decoder)
        self._decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=device, dtype=dtype)

    def facts(self) -> dict[str, str]:
        """What all ranks of a decode must have in common, for `parallel.coordination.check_agreement`."""
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
        return self._decoder.tuned

    def tune(self, coordinator: Coordinator) -> None:
        """Agrees with all ranks on what convolves; see `runtime.tuning`."""
        self._decoder.tune(coordinator)

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
        kernels = self._decoder.kernels
        chunk = asked or largest_chunk(
            self.architecture, size, dtype=self.dtype, free=free, kernels=kernels, device_type=self.device.type
        )
        if self.device.type != "cuda":
            return chunk
        while chunk:
            needed = decode_memory(self.architecture, size, chunk=chunk, dtype=self.dtype, kernels=kernels)
            try:
                # Taken now, while no other rank waits for this one; torch keeps it for the steps.
                torch.empty(needed.caches + needed.step, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:
                chunk //= 2
                continue
            return chunk
        return 0

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
        return self._decoder.stream(rows, chunk, ShardEdges(plan, group, peer_memory), transposed=plan.transposed)
