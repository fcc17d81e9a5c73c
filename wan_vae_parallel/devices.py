"""Which devices and dtypes a decode can use."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .errors import DeviceError
from .ops.dispatch import say_once

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What else people call them: ComfyUI's device selectors, other programs.
_ALSO = {"default": "auto", "gpu": "cuda"}
# All GPUs but the one that most often has a display, or a model that samples, on it.
ALL_BUT_THE_FIRST = "all but the first"
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def available_devices() -> list[torch.device]:
    """The CPU, and every CUDA device there is; AMD's, which torch calls by the same name, are none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() and torch.version.hip is None else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def parse_devices(
    devices: str | torch.device | Sequence[str | torch.device], *, forgiving: bool = False
) -> list[torch.device]:
    """Turns what a user wrote into devices, checked to be there.

    Args:
        devices: ``"auto"`` (all CUDA devices, else the CPU), one device, names with commas between them, or a list.
            The CPU may be named several times, for as many processes. ``"all but the first"`` are all CUDA devices
            but that. Upper case, ``"gpu"`` for ``"cuda"`` and ``"default"`` for ``"auto"`` are understood.
        forgiving: where this system can't use several devices together, take the first, as for ``"auto"``, and say so.

    Raises:
        DeviceError: a name that is no device, a device that is not there, a GPU that is named twice, GPUs mixed with
            the CPU, or several devices where this system can't use them together.
    """
    names = device_names(devices)
    there = available_devices()
    if names == ["auto"]:
        gpus = there[1:] or there
        return _together(gpus)
    if not names and _asks_for_the_rest(devices):
        raise DeviceError(f"no GPU is left of {devices!r}, for there are {len(there) - 1}; write 'auto'")
    if not names:
        raise DeviceError("no device is named; write 'auto', 'cpu', 'cuda:0' or several with commas between them")
    if "auto" in names:
        raise DeviceError(f"'auto' stands beside others in {devices!r}; write it alone, for all GPUs, or name devices")
    parsed = [_parse_device(name, there) for name in names]
    twice = sorted({str(device) for device in parsed if device.type == "cuda" and parsed.count(device) > 1})
    if twice:
        raise DeviceError(f"{', '.join(twice)} is named twice in {devices!r}; name each device once")
    if len({device.type for device in parsed}) > 1:
        raise DeviceError(f"GPUs would only wait for the CPU beside them, in {devices!r}; name one kind")
    if not forgiving and len(parsed) > 1 and (reason := _why_alone(parsed)):
        raise DeviceError(f"there are {len(parsed)} devices in {devices!r}, but {reason}; name one")
    return _together(parsed)


def device_names(devices: str | torch.device | Sequence[str | torch.device]) -> list[str | torch.device]:
    """The devices that a user wrote, one by one, each by the name that torch knows.

    Raises:
        DeviceError: it is neither text nor a device nor a list of such.
    """
    if isinstance(devices, str):
        names: list[str | torch.device] = [name for name in devices.split(",") if name.strip()]
    elif isinstance(devices, (list, tuple, torch.device)):
        names = [devices] if isinstance(devices, torch.device) else list(devices)
    else:
        raise DeviceError(f"devices are {devices!r}; write 'auto', 'cpu', 'cuda:0', several with commas, or a list")
    known = (_known_names(name) if isinstance(name, str) else [name] for name in names)
    return [name for each in known for name in each]


def _known_names(name: str) -> list[str | torch.device]:
    if _asks_for_the_rest(name):
        return [str(device) for device in available_devices()[2:]]
    kind, colon, number = name.strip().lower().partition(":")
    return [_ALSO.get(kind, kind) + colon + number]


def _asks_for_the_rest(name: object) -> bool:
    return isinstance(name, str) and " ".join(name.lower().split()) == ALL_BUT_THE_FIRST


def parse_rank_device(
    devices: str | torch.device | Sequence[str | torch.device], group: dist.ProcessGroup
) -> torch.device:
    """The one device of this rank of ``group``.

    Args:
        devices: ``"auto"`` (the current CUDA device if the group joins GPUs, else the CPU) or one device.
        group: joins GPUs with NCCL, or CPUs with gloo.

    Raises:
        DeviceError: several devices, one that is not there, or one that the group can't join.
    """
    gpus = "nccl" in str(dist.get_backend(group))
    if device_names(devices) == ["auto"]:
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    parsed = parse_devices(devices)
    if len(parsed) > 1:
        raise DeviceError(
            f"there are {len(parsed)} devices in {devices!r}, but each rank of a group has one; write 'auto'"
        )
    if (parsed[0].type == "cuda") != gpus:
        kind = "GPUs (nccl)" if gpus else "CPUs (gloo)"
        raise DeviceError(f"the group joins {kind}, and {str(parsed[0])!r} is none; write 'auto'")
    return parsed[0]


def _together(devices: list[torch.device]) -> list[torch.device]:
    """``devices``, or the first of them where this system can't use several at once, which is said."""
    if len(devices) > 1 and (reason := _why_alone(devices)):
        say_once(f"decoding on {devices[0]} alone, though there are {len(devices)} devices: {reason}")
        return devices[:1]
    return devices


def _why_alone(devices: list[torch.device]) -> str:
    """Why this system can't decode on several of ``devices`` at once; empty if it can."""
    if not hasattr(os, "memfd_create"):
        return "workers need Linux's shared memory"
    backend = "nccl" if devices[0].type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        return f"this torch has no {backend}"
    return ""


def _parse_device(name: str | torch.device, there: list[torch.device]) -> torch.device:
    known = ", ".join(str(device) for device in there)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeviceError(
            f"there is no device {name!r}, but {known}: write some, with commas between, or 'auto'"
        ) from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cpu":
        device = torch.device("cpu")  # "cpu:0" is the same
    if device not in there:
        raise DeviceError(f"device {str(device)!r} is not there; there are {known}, or write 'auto'")
    return device


def parse_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    Args:
        dtype: ``"auto"`` (bf16 where the GPU has it, else fp16 on a GPU, fp32 on the CPU), a name or a torch dtype.
        device: where it will be computed.

    Raises:
        DeviceError: a dtype that is none of fp32, bf16, fp16 and fp64.
    """
    name = str(dtype).strip().lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name not in DTYPES:
        raise DeviceError(f"dtype is {dtype!r}; it must be 'auto', {', '.join(repr(known) for known in DTYPES)}")
    return DTYPES[name]
