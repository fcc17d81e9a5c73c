"""A line on the node that has worked: how many frames, how large, in what time, and where."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch
from comfy_execution.utils import get_executing_context

from ..wan_vae_parallel import Architecture


def tell_decoded(frames: torch.Tensor, since: float, devices: Sequence[torch.device]) -> None:
    """Tells of ``frames`` ``[..., H, W, C]`` that were decoded since ``time.monotonic()`` was ``since``."""
    height, width = frames.shape[-3:-1]
    tell_work(math.prod(frames.shape[:-3]), (height, width), since, devices)


def tell_encoded(
    latents: torch.Tensor, architecture: Architecture, since: float, devices: Sequence[torch.device]
) -> None:
    """The same of the frames that ``latents`` ``[B, z, T, h, w]`` were encoded from."""
    batch, _, latent_frames, rows, columns = latents.shape
    size = (rows * architecture.encode_ratio, columns * architecture.encode_ratio)
    tell_work(batch * architecture.frame_count(latent_frames), size, since, devices)


def tell_work(frames: int, size: tuple[int, int], since: float, devices: Sequence[torch.device]) -> None:
    """Tells of so many ``frames`` of ``size`` (height, width); about as much as fits into one line of a node."""
    names = [str(device) for device in devices]
    kind = "GPUs" if all(name.startswith("cuda") for name in names) else "processes"
    where = names[0] if len(names) == 1 else f"{len(names)} {kind}"
    seconds = time.monotonic() - since
    count = "1 frame" if frames == 1 else f"{frames} frames"
    _show(f"{count} of {size[1]}x{size[0]}, {seconds:.{1 if seconds >= 10 else 2}f} s on {where}")


def _show(text: str) -> None:
    """Puts ``text`` on the node that ComfyUI executes; nothing where there is none, or no server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if server is None or context is None:
        return
    # Of a node in a subgraph, "3:2", the one that stands for the subgraph gets it too.
    for node in dict.fromkeys((context.node_id, str(context.node_id).partition(":")[0])):
        server.send_progress_text(text, node)
