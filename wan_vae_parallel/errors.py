"""Every error that a user can cause; each message names the value, the limit and the way out."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch

# How PyTorch's CPU allocator, CUDA and NCCL, cuBLAS and cuDNN, and oneDNN (of the code that it makes) say it.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED", "could not create a primitive")

# How what torch appends begins.
_FOR_DEVELOPERS = re.compile(r"Exception raised from|Search for `cuda|CUDA kernel errors might be")

# Where errors say that they are from. ComfyUI shows it before their name, and calls a pack's modules by its folder.
_PACKAGE = "wan_vae_parallel"


class WanVAEError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        text: what is wrong, and what to do.
        in_python: what else to do, for who calls from Python.

    Attributes:
        text: the message without that.
    """

    __module__ = _PACKAGE

    def __init_subclass__(cls) -> None:
        cls.__module__ = _PACKAGE

    def __init__(self, text: str = "", in_python: str = "") -> None:
        super().__init__(f"{text}, or {in_python}" if in_python else text)
        self.text = text


class ArgumentError(WanVAEError, ValueError):
    """An argument that is out of its range."""


class CheckpointError(WanVAEError, ValueError):
    """The file or state dict is not a Wan VAE that can be used, or has no encoder to encode with."""


class LatentError(WanVAEError, ValueError):
    """The latents can't be decoded with this VAE."""


class FrameError(WanVAEError, ValueError):
    """The frames can't be read from their file, or not be encoded with this VAE."""


class DeviceError(WanVAEError, ValueError):
    """A device or dtype that is not there, or can't be used: also float16 where the activations overflow it."""


class OutOfMemoryError(WanVAEError, MemoryError):
    """A decode or an encode does not fit, not even one frame at a time."""


class BusyError(WanVAEError, RuntimeError):
    """The VAE's workers are at a decode or an encode of this very thread, which would wait for itself."""


class ClosedError(WanVAEError, RuntimeError):
    """The VAE was closed, before it was asked for something or while it did it."""


class WorkerError(WanVAEError, RuntimeError):
    """A worker process died, failed or does not answer; the next call starts new ones.

    Attributes:
        killed: it was ended from outside, as by a signal.
    """

    killed = False


class OutputError(WanVAEError, OSError):
    """The frames can't be written where they were asked to go."""


def about_file(path: str | Path, text: str, error: object = None) -> str:
    """``text`` as it is said of a file: its name before it, and where it lies behind it.

    Args:
        path: of the file, or of a folder.
        text: what is wrong, and what to do.
        error: what the system says of it, which comes last.
    """
    path = Path(path)
    name = path.name or str(path)
    told = "" if error is None else str(error).rstrip(".")
    # Once is enough, and a name alone says no more than that.
    places = [] if str(path) == name or str(path) in told else [str(path)]
    behind = "; ".join(filter(None, [told, *places]))
    return f"{name} {text} ({behind})" if behind else f"{name} {text}"


def summary(error: BaseException) -> str:
    """What an error says, on one line; of torch's and CUDA's without the C++ stack and the advice to developers."""
    return " ".join(_FOR_DEVELOPERS.split(str(error))[0].split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )
