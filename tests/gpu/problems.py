"""Calls of all kernels, of shapes that matter to the compiler alone; what their tensors hold is never read.

T frames, H rows, W columns, C channels in, O channels out
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from wan_vae_parallel.architecture import Architecture
from wan_vae_parallel.memory import _decoder_skeleton, _encoder_skeleton
from wan_vae_parallel.ops.conv import fold_upsample_weight
from wan_vae_parallel.ops.kernels import (
    attention,
    conv,
    down_conv,
    frames,
    halo_exchange,
    head_conv,
    norm,
    pixels,
    shortcut,
)
from wan_vae_parallel.ops.kernels.tiles import Tile
from wan_vae_parallel.ops.layer_kinds import LayerKind
from wan_vae_parallel.ops.pixels import Margins, tap_channels

Run = Callable[[], None]

# Rows and columns that no tile divides.
ROWS, COLUMNS = 66, 130


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _slots(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def kinds() -> list[LayerKind]:
    """Of all layers of the published models, decoders and encoders."""
    found = []
    for family in ("wan2.1", "wan2.2"):
        architecture = Architecture.published(family)
        for model in (_decoder_skeleton(architecture), _encoder_skeleton(architecture)):
            found += [layer.kind for layer in model.convolutions()]
    return list(dict.fromkeys(found))


def convolution(
    kind: LayerKind,
    tile: Tile | None = None,
    *,
    descriptors: bool | None = None,
    residual: bool = False,
    paged: bool = False,
    transposed: bool = False,
    rows: int = ROWS,
    dtype: torch.dtype = torch.bfloat16,
) -> Run:
    """A launch for a kind of layer, with a setting or the one that would be chosen."""
    channels, out_channels, (kt, kh, kw), halves = kind.channels, kind.out_channels, kind.kernel, kind.halves
    options = {"transposed": transposed, "tile": tile, "descriptors": descriptors}
    bias = _empty(out_channels, dtype=dtype)
    if kind.op == "head_conv":
        arena = _empty(6, rows + 2, 720 + 2, channels, dtype=dtype)
        together, at_once = head_conv.tiling(4, out_channels)
        spread = head_conv.spread_weight(_empty(out_channels, channels, 3, 3, 3, dtype=dtype), together, at_once,
                                         transposed=transposed)  # fmt: skip
        out = _empty(4, rows, 720, out_channels, dtype=dtype)
        return lambda: head_conv.head_conv(
            arena, _slots(6), spread, bias, frames=together, rows=at_once, out=out, **options
        )
    if kind.op == "upsample_conv":
        arena = _empty(4, rows + 2, COLUMNS + 2, channels, dtype=dtype)
        folded = fold_upsample_weight(_empty(out_channels, channels, 3, 3, dtype=dtype))
        out = _empty(4, 2 * rows, 2 * COLUMNS, out_channels, dtype=dtype)
        return lambda: conv.upsample_conv(arena, _slots(4), folded, bias, out=out, **options)
    border = 2 if paged else 0
    out_slots = _slots(4 * halves) if paged else None
    out = _empty(4 * halves, rows + border, COLUMNS + border, out_channels // halves, dtype=dtype)
    if kind.op == "down_conv":
        arena = _empty(4, 2 * rows + 2, 2 * COLUMNS + 2, channels, dtype=dtype)
        weight = _empty(out_channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return lambda: down_conv.down_conv(arena, _slots(4), weight, bias, out=out, out_slots=out_slots, **options)
    seen = 3 * kind.time_stride + kt
    arena = _empty(seen, rows + kh - 1, COLUMNS + kw - 1, channels, dtype=dtype)
    weight = _empty(out_channels, channels, kt, kh, kw, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    added = _empty(4 * halves, rows, COLUMNS, out_channels // halves, dtype=dtype) if residual else None
    return lambda: conv.conv(
        arena, _slots(seen), weight, bias, residual=added, out=out, out_slots=out_slots, halves=halves,
        time_stride=kind.time_stride, **options,
    )  # fmt: skip


def attend(channels: int, dtype: torch.dtype = torch.bfloat16, *, positions: int = 3600) -> Run:
    """Attention over slices of one projection."""
    query, key, value = _empty(1, positions, 3 * channels, dtype=dtype).chunk(3, dim=2)
    return lambda: attention.frame_attention(query, key, value)


def others(dtype: torch.dtype = torch.bfloat16) -> dict[str, Run]:
    """The kernels that have one setting: what moves bytes."""
    found: dict[str, Run] = {}
    for channels in (96, 160, 384, 1024):
        x, gamma = _empty(2, 11, 45, channels, dtype=dtype), _empty(channels, dtype=dtype)
        arena = _empty(4, 13, 47, channels, dtype=dtype)
        found[f"norm {channels}"] = lambda x=x, gamma=gamma: norm.rms_norm(x, gamma)
        found[f"norm_silu {channels}"] = lambda x=x, gamma=gamma, arena=arena: norm.norm_silu(
            x, gamma, arena, _slots(2)
        )
    picture = _empty(2, 11, 45, 12, dtype=dtype)
    for transposed in (False, True):
        found[f"frames {transposed}"] = lambda transposed=transposed: frames.to_frames(
            picture, 2, transposed=transposed
        )
        shape = (45, 11) if transposed else (11, 45)
        taps = _empty(2, *shape, tap_channels(12), dtype=dtype)
        found[f"pixels {transposed}"] = lambda transposed=transposed, taps=taps: pixels.gather_taps(
            _empty(2, 22, 90, 3, dtype=torch.float32), patch=2, margins=Margins(), transposed=transposed, arena=taps,
            slots=_slots(2),
        )  # fmt: skip
    small, large = _empty(2, 11, 45, 1024, dtype=dtype), _empty(4, 22, 90, 512, dtype=dtype)
    found["duplicated"] = lambda: shortcut.add_duplicated(
        small, time_factor=2, phases=(0, 2), transposed=False, out=large
    )
    coarse = _empty(2, 11, 45, 640, dtype=dtype)
    fine = _empty(4, 22, 90, 320, dtype=dtype)
    found["averaged"] = lambda: shortcut.add_averaged(fine, time_factor=2, transposed=False, out=coarse)
    boxes, signals = _empty(2, 2, 2**20, dtype=dtype), torch.zeros(1024, dtype=torch.int32)
    found["halo"] = lambda: halo_exchange.exchange_halo(
        _empty(4, 13, 47, 96, dtype=dtype), _slots(2), boxes, signals, above=(boxes, signals), below=(boxes, signals),
        numbers=(1, 1),
    )  # fmt: skip
    return found
