"""Where to work and in what: what a user wrote, what the machine has, what ComfyUI would take."""

from __future__ import annotations

import logging
import re

import comfy.model_management as model_management
import torch

from ..wan_vae_parallel.devices import (
    ALL_BUT_THE_FIRST,
    available_devices,
    device_names,
    parse_devices,
    parse_dtype,
)
from ..wan_vae_parallel.errors import DeviceError

logger = logging.getLogger(__name__)


def listed_devices() -> dict[str, str]:
    """What the nodes' list of devices offers, and the name of each GPU in it.

    The values are the same on every machine, so that workflows travel; names are only shown.
    """
    gpus = [device for device in available_devices() if device.type == "cuda"]
    few = [gpus[:count] for count in range(2, len(gpus))] + [gpus[-count:] for count in range(len(gpus) - 2, 1, -1)]
    some = [",".join(map(str, one)) for one in few]
    rest = [ALL_BUT_THE_FIRST] if len(gpus) > 1 else []
    return {"auto": "", **{str(gpu): _gpu_name(gpu) for gpu in gpus}, **dict.fromkeys([*some, *rest, "cpu"], "")}


def _gpu_name(device: torch.device) -> str:
    try:
        return torch.cuda.get_device_name(device)
    except RuntimeError as error:  # a GPU that is broken, or that another process has for itself
        logger.warning("Wan VAE Parallel: %s does not tell its name: %s", device, str(error).partition("\n")[0])
        return ""


def choose_devices(devices: str | None, put_on: torch.device | None) -> list[torch.device]:
    """Those of ``devices`` that are there; for ``"auto"`` the one that a node has put the VAE on, or ComfyUI's."""
    devices = devices or ""  # a headless prompt may say null
    names = [str(name) for name in device_names(devices)]
    if names == ["auto"] or not devices.strip(" ,"):
        return _comfyui_devices(put_on)
    there = [name for name in names if not _elsewhere(name)]
    places = parse_devices(there, forgiving=True) if there else _comfyui_devices(put_on)
    if len(there) < max(1, len(names)):
        logger.info("Wan VAE Parallel: devices %s were asked for; using %s", devices, ", ".join(map(str, places)))
    elif put_on is not None and places != [put_on]:
        logger.info(
            "Wan VAE Parallel: a node has put the VAE on %s, but devices says %s; using these. Set devices to auto to "
            "follow that node",
            put_on,
            devices,
        )
    return places


def _elsewhere(name: str) -> bool:
    """Whether ``name`` is a device of another machine, where the workflow was made; what is no device is an error."""
    try:
        parse_devices(name)
    except DeviceError:
        if re.fullmatch(r"(cuda|mps|xpu|npu|mlu)(:\d+)?", name):
            return True
        raise
    return False


def _comfyui_devices(put_on: torch.device | None) -> list[torch.device]:
    """The device that a node has put the VAE on, or else that of ComfyUI's own VAE; all GPUs if it is one of them."""
    device = put_on or torch.device(model_management.vae_device())
    if put_on in available_devices():
        logger.info("Wan VAE Parallel: using %s, where a node has put the VAE", put_on)
        return [device]
    if device.type == "cuda" and put_on is None:
        return parse_devices("auto")
    if device not in available_devices():
        logger.warning("Wan VAE Parallel: %s is not supported; using the CPU", device)
    return [torch.device("cpu")]


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``dtype`` as a user wrote it, on ``device``; ``"auto"`` is ComfyUI's own choice."""
    if dtype != "auto":
        return parse_dtype(dtype, device)
    return model_management.vae_dtype(device, [torch.bfloat16, torch.float16, torch.float32])
