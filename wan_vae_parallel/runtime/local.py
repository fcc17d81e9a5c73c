"""A decoder on one device of this process.

B videos, T latent frames, h x w latent rows and columns, z channels; frames [B, t, H, W, C]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from ..architecture import Architecture
from ..model.decoder import WanDecoder
from ..model.state import DecodeState, WholePicture, Workspace
from ..ops.frames import to_frames


class LocalDecoder:
    """Weights on ``device`` in ``dtype``, and the steps of decodes with them.

    Decodes share nothing but the weights, so several may run at once.
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
        own = {key: tensor.detach().to(device, dtype, copy=True) for key, tensor in weights.items()}
        self.model.load_state_dict(own, strict=True, assign=True)
        self.model.requires_grad_(False).eval()

    @torch.inference_mode()
    def stream(self, latents: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        """Decodes ``latents`` ``[B, z, T, h, w]``, de-normalised.

        Yields:
            ``[B, t, H, W, C]`` in [0, 1] on the device, contiguous, t frames that follow those before.
        """
        videos = [
            self.model.stream(
                # Whatever strides the caller's latents have, inside it is [T, h, w, z].
                video.to(self.device, self.dtype).permute(1, 2, 3, 0).contiguous(),
                DecodeState(edges=WholePicture(), workspace=workspace),
                chunk,
            )
            for workspace in [Workspace(self.dtype, self.device)]
            for video in latents
        ]
        while True:
            with self._exact_arithmetic():
                raw = [frames for frames in (next(video, None) for video in videos) if frames is not None]
                frames = [to_frames(one, self.architecture.patch) for one in raw]
                del raw
                if not frames:
                    return
                batch = frames[0][None] if len(frames) == 1 else torch.stack(frames)
            del frames
            yield batch

    @contextlib.contextmanager
    def _exact_arithmetic(self) -> Iterator[None]:
        """fp32 means fp32 here: TF32, which a host program may have allowed, rounds to 10 bits."""
        if self.device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        allowed = matmul.allow_tf32
        with torch.cuda.device(self.device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            matmul.allow_tf32 = False
            try:
                yield
            finally:
                matmul.allow_tf32 = allowed
