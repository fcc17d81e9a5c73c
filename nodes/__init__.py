"""What ComfyUI sees of Wan VAE Parallel."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .schemas import (
    WanVAEParallelApply,
    WanVAEParallelDecode,
    WanVAEParallelDecodeRGBA,
    WanVAEParallelEncode,
    WanVAEParallelLoader,
)
from .video import WanVAEParallelDecodeToVideo, WanVAEParallelLoadVideoToLatent


class WanVAEParallelExtension(ComfyExtension):
    """Lists the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            WanVAEParallelLoader,
            WanVAEParallelApply,
            WanVAEParallelDecode,
            WanVAEParallelDecodeRGBA,
            WanVAEParallelEncode,
            WanVAEParallelDecodeToVideo,
            WanVAEParallelLoadVideoToLatent,
        ]


async def comfy_entrypoint() -> WanVAEParallelExtension:
    """ComfyUI's way in."""
    return WanVAEParallelExtension()
