"""Which devices and dtypes a decode can use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import DeviceError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def available_devices() -> list[torch.device]:
    """The CPU, and every CUDA device there is."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def parse_devices(devices: str | torch.device | Sequence[str | torch.device]) -> list[torch.device]:
    """Turns what a user wrote into devices, checked to be there.

    Args:
        devices: ``"auto"`` (the first CUDA device, else the CPU), one device, names with commas between them, or
            a list.

    Raises:
        DeviceError: a name that is no device, a device that is not there, or one that is named twice.
    """
    if isinstance(devices, str):
        names: list[str | torch.device] = [name.strip() for name in devices.split(",") if name.strip()]
    else:
        names = [devices] if isinstance(devices, torch.device) else list(devices)
    there = available_devices()
    if [str(name) for name in names] == ["auto"]:
        return [there[1] if len(there) > 1 else there[0]]
    if not names:
        raise DeviceError("no device is named; write 'auto', 'cpu', 'cuda:0' or several with commas between them")
    parsed = [_parse_device(name, there) for name in names]
    twice = sorted({str(device) for device in parsed if parsed.count(device) > 1})
    if twice:
        raise DeviceError(f"{', '.join(twice)} is named twice in {devices!r}; name each device once")
    return parsed


def _parse_device(name: str | torch.device, there: list[torch.device]) -> torch.device:
    known = ", ".join(str(device) for device in there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is no device; there are {known}, or write 'auto'") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
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
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else _SHORT.get(dtype, dtype)
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name not in DTYPES:
        raise DeviceError(f"dtype is {dtype!r}; it must be 'auto', {', '.join(repr(known) for known in DTYPES)}")
    return DTYPES[name]
