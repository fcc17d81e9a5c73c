"""Weights that were stored in eight bits, as the numbers that they stand for.

Scaled fp8 keeps a scale beside each weight, for all of it or for each output channel, as ``<layer>.scale_weight`` (with
``scaled_fp8`` in the file) or ``<layer>.weight_scale`` (with ``<layer>.comfy_quant``): the weight is the product.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

_FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
_SCALES = (".scale_weight", ".weight_scale")
# What others keep beside weights that are packed in blocks, and who packs them so.
_PACKED = {
    ".weight_scale_2": "NVFP4, which TensorRT and ModelOpt make for their own kernels",
    ".absmax": "bitsandbytes' 4 or 8 bits",
    ".SCB": "bitsandbytes' 8 bits",
    ".qweight": "GPTQ's or AWQ's 4 bits",
}
# What such files keep besides, for products in eight bits: a layer's input, and which kind its weights are of.
_BESIDES = (".scale_input", ".input_scale", ".comfy_quant", ".scaled_fp8")


def dequantised(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """``tensors`` without scales, and with the weights that these belong to in fp32; plain fp8 in bf16, exactly.

    Args:
        tensors: by their keys; on the meta device too, which tells everything but the values.
        source: what messages call them.

    Raises:
        CheckpointError: scales of another kind, such as NVFP4's or int8's, or packed weights.
    """
    scales: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for ending, what in _PACKED.items():
        if any(key.endswith(ending) for key in tensors):
            raise CheckpointError(f"{source} has weights in {what}; take the VAE in bf16, fp16 or fp32")
    for key, tensor in tensors.items():
        if key.endswith(_SCALES):
            scales[key.rpartition(".")[0] + ".weight"] = tensor
        elif not key.endswith(_BESIDES) and key != "scaled_fp8":
            plain[key] = tensor
    count = 0
    for key, tensor in plain.items():
        scale = scales.pop(key, None)
        if scale is not None:
            plain[key] = _product(key, tensor, scale, source)
        elif tensor.dtype in _FP8:
            plain[key] = tensor.to(torch.bfloat16)  # which has all numbers of fp8
        else:
            continue
        count += 1
    if scales:
        raise CheckpointError(f"{source} has scales of weights that it lacks: {', '.join(list(scales)[:5])}")
    if count:
        _say_once(f"{source}: {count} weights in fp8 are taken as the numbers that they stand for")
    return plain


@functools.cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def _product(key: str, weight: torch.Tensor, scale: torch.Tensor, source: str) -> torch.Tensor:
    channels = weight.shape[0] if weight.dim() else 1
    each = scale.numel() == channels and scale.shape[:1] == (channels,)
    if weight.dtype not in _FP8 or not (scale.numel() == 1 or each) or scale.dtype in _FP8:
        raise CheckpointError(
            f"{source} has {key} in {weight.dtype} with scales {tuple(scale.shape)} in {scale.dtype}; only fp8 "
            f"with one scale, or one for each of {channels} channels, is known: take the VAE in bf16, fp16 or fp32"
        )
    shape = (-1,) + (1,) * (weight.dim() - 1) if scale.numel() > 1 else (1,) * weight.dim()
    return weight.to(torch.float32) * scale.to(torch.float32).reshape(shape)
