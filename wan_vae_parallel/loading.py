"""Loading VAEs, from files and from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import CheckpointError
from .files.checkpoint import Checkpoint, checkpoint_from_state_dict
from .files.kinds import user_path
from .files.locate import ANOTHER
from .files.weights import FileWeights
from .session import IDLE_SECONDS, Chunk, Devices
from .vae import VAE


def load_vae(
    path: str | Path,
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
    idle_seconds: float = IDLE_SECONDS,
    group: dist.ProcessGroup | None = None,
    predecessor: VAE | None = None,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Loads a Wan VAE.

    The file is checked now, and its weights are read when a decode wants them. It must be the same file then: one that
    was replaced or written to meanwhile is an error.

    Args:
        path: a safetensors file in Wan's original or diffusers' key layout, one of its shards or their index, or a
            folder in diffusers' format, the VAE's or the whole pipeline's. ``~`` is the home folder.
        devices: ``"auto"`` (all CUDA devices, else the CPU), ``"cpu"``, ``"cuda:0"``, or several with commas between
            them, ``"cuda:0,cuda:1"``: one video is then decoded by all of them, each with a worker process.
        dtype: ``"auto"`` (bf16 on GPUs that have it, fp32 on the CPU), ``"float32"``, ``"bfloat16"``,
            ``"float16"`` or ``"float64"``.
        chunk: frames that a layer works on at once, or ``"auto"``: latent frames of a decode, pictures of an encode. It
            trades memory for speed, and changes neither pixels nor latents.
        idle_seconds: workers that had no decode for so long since their last one end; the next decode starts new ones.
        group: decode in this process group instead, with its ranks as workers, which may be on several machines.
            Each rank makes the same calls; ``devices`` is its own one. The frames come to the group's first rank:
            on the others `VAE.decode` returns none and `VAE.decode_stream` yields nothing.
        predecessor: a VAE on the same devices that is not needed any more; its worker processes become this one's.
        encode_dtype: like ``dtype``, for encodes alone; ``"auto"`` is the same as ``dtype``.

    Raises:
        CheckpointError: the file is not a Wan VAE that can be decoded with.
        DeviceError: a device or dtype that is not there.
    """
    path = user_path(path, CheckpointError, another=ANOTHER).absolute()
    return VAE(
        FileWeights(path), devices=devices, dtype=dtype, chunk=chunk, idle_seconds=idle_seconds, group=group,
        predecessor=predecessor, encode_dtype=encode_dtype,
    )  # fmt: skip


def vae_from_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    devices: Devices = "auto",
    dtype: str | torch.dtype = "auto",
    chunk: Chunk = "auto",
    *,
    name: str = "the state dict",
    idle_seconds: float = IDLE_SECONDS,
    encode_dtype: str | torch.dtype = "auto",
) -> VAE:
    """Like `load_vae`, from tensors that are loaded already; ``name`` is what errors call them.

    The tensors are not copied before they go to a device: leave them as they are while the VAE is in use.
    """
    checkpoint = checkpoint_from_state_dict(state_dict, source=name)

    def weights() -> Checkpoint:
        return checkpoint

    return VAE(weights, devices=devices, dtype=dtype, chunk=chunk, idle_seconds=idle_seconds, encode_dtype=encode_dtype)
