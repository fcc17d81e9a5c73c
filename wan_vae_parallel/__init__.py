"""Exact Wan video VAE decoding and encoding.

>>> import wan_vae_parallel as wvp
>>> with wvp.load_vae("wan_2.1_vae.safetensors") as vae:
...     frames = vae.decode(latents)  # [B, 16, T, h, w] -> [B, 4 * (T - 1) + 1, 8h, 8w, 3] in [0, 1]
...     latents = vae.encode(frames)  # and back
"""

from ._version import __version__
from .architecture import Architecture
from .demo import demo_latents, save_demo_checkpoint
from .errors import (
    ArgumentError,
    BusyError,
    CheckpointError,
    ClosedError,
    DeviceError,
    FrameError,
    LatentError,
    OutOfMemoryError,
    OutputError,
    WanVAEError,
    WorkerError,
)
from .loading import load_vae, vae_from_state_dict
from .vae import VAE

__all__ = [
    "VAE",
    "Architecture",
    "ArgumentError",
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "DeviceError",
    "FrameError",
    "LatentError",
    "OutOfMemoryError",
    "OutputError",
    "WanVAEError",
    "WorkerError",
    "__version__",
    "demo_latents",
    "load_vae",
    "save_demo_checkpoint",
    "vae_from_state_dict",
]
