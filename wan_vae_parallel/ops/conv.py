"""Convolutions over bordered buffers: what lies around the picture is already in the input.

T frames, H rows, W columns, C channels in, O channels out
Layout  input and output contiguous [T, H, W, C]; to torch they are channels_last_3d, as the weights are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv3d(buffer: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolves a buffer that holds past frames and borders already.

    Args:
        buffer: ``[T + kt - 1, H + kh - 1, W + kw - 1, C]``, contiguous: past frames first, then the new ones.
        weight: ``[O, C, kt, kh, kw]``. In channels_last_3d it is used as it lies; in another format torch
            converts it on every call, with the same result.
        bias: ``[O]``.

    Returns:
        ``[T, H, W, O]``, contiguous.

    Raises:
        ValueError: the buffer is not contiguous, so that its bytes would not be what its shape says.
    """
    if not buffer.is_contiguous():
        raise ValueError(f"causal_conv3d takes a contiguous buffer, not one with strides {buffer.stride()}")
    # The batch axis is put in front while the tensor is contiguous: added later its stride would be C, which
    # torch reads as "not channels_last" and answers with NCDHW kernels and copies around them.
    out = F.conv3d(buffer.unsqueeze(0).permute(0, 4, 1, 2, 3), weight, bias)
    # A copy only where torch has no channels-last kernel (fp64 on the CPU); on CUDA a test counts none.
    return out.permute(0, 2, 3, 4, 1).squeeze(0).contiguous()


def frame_conv2d(buffer: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolves each frame by itself.

    Args:
        buffer: ``[T, H + kh - 1, W + kw - 1, C]``, contiguous, with its borders.
        weight: ``[O, C, kh, kw]``, best in channels_last.
        bias: ``[O]``.

    Returns:
        ``[T, H, W, O]``, contiguous.

    Raises:
        ValueError: the buffer is not contiguous.
    """
    if not buffer.is_contiguous():
        raise ValueError(f"frame_conv2d takes a contiguous buffer, not one with strides {buffer.stride()}")
    return F.conv2d(buffer.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1).contiguous()


def pointwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A 1x1(x1) convolution, which is a matrix product over channels and leaves no layout to choose.

    Args:
        x: ``[..., C]``.
        weight: ``[O, C, 1, 1(, 1)]``.
        bias: ``[O]``.

    Returns:
        ``[..., O]``.
    """
    return F.linear(x, weight.flatten(1), bias)
