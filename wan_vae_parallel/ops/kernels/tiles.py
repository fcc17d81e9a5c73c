"""Which tile a convolution's kernel takes: the one that a GPU's multiprocessors finish first.

Settings change no bit of the result, so every size and shard may take its own.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton

# The accumulators of more channels don't fit one program's registers.
_MAX_CHANNELS = 384


@dataclasses.dataclass(frozen=True)
class Tile:
    """Positions of a tile, O in two accumulators (the second may be 0), channels a step, warps, pipeline stages.

    Swapped, the weights are the product's left side: 192 channels are then three times 64 rows that each read a tile
    of the input 256 columns wide, which asks less of shared memory.
    """

    positions: int
    first: int
    second: int
    step: int
    warps: int
    stages: int
    swapped: bool = False


def _split(channels: int) -> tuple[int, int]:
    """Two accumulators' columns that together hold the channels, or a part of more than 384, with little padding."""
    if channels > _MAX_CHANNELS:
        return min(((256, 128), (256, 64), (256, 0)), key=lambda pair: -(-channels // sum(pair)) * sum(pair))
    power = max(16, triton.next_power_of_2(channels))
    if power <= 32 or (power // 4 * 3 < channels and power <= 256):
        return power, 0
    if power // 4 * 3 < channels:
        return 256, 128
    return power // 2, max(16, triton.next_power_of_2(channels - power // 2))


def _step(channels: int) -> int:
    """Channels a step: as many as waste the least on a tail."""
    return min((64, 32, 16), key=lambda step: (-(-channels // step) * step, -step))


def _settings(channels: int, out_channels: int) -> list[tuple[Tile, int]]:
    """Settings for one program's channels, the best for large pictures first, with TFLOP/s measured on an H200."""
    first, second = _split(out_channels)
    step = _step(channels)
    if first + second <= 96:
        step = min(32, step)
        return [(Tile(256, first, second, step, 4, 4), 560), (Tile(128, first, second, step, 4, 5), 480)]
    deep = step < 64  # short steps need more of them in flight
    if (first, second) == (128, 64):
        return [
            (Tile(256, 128, 64, step, 8, 6 if deep else 3, swapped=True), 690),
            (Tile(128, 128, 64, step, 4, 5 if deep else 3, swapped=True), 630),
        ]
    if first + second <= 192:
        return [(Tile(128, first, second, step, 4, 5 if deep else 3), 620)]
    small = (Tile(128, 128, 0, step, 4, 6 if deep else 4), 629)
    if second:
        stages = 6 if deep else 3
        return [
            (Tile(128, first, second, step, 8, stages), 705),
            (Tile(64, first, second, step, 4, stages), 650),
            small,
        ]
    return [(Tile(128, first, 0, step, 8, 6 if deep else 4), 705), (Tile(64, first, 0, step, 4, 4), 625), small]


def choose_tile(channels: int, out_channels: int, frame_positions: int, frames: int, *, device: torch.device) -> Tile:
    """Picks a setting; the convolution's bits are the same for all.

    Args:
        channels: C.
        out_channels: O of one output frame.
        frame_positions: positions of a frame, borders between rows included.
        frames: output frames, times the phases of each.
        device: where it runs.
    """
    processors, shared = gpu(device)

    def cost(setting: tuple[Tile, int]) -> float:
        tile, speed = setting
        columns = tile.first + tile.second
        programs = -(-frame_positions // tile.positions) * frames * -(-out_channels // columns)
        return -(-programs // processors) * tile.positions * columns / speed

    return fit(min(_settings(channels, out_channels), key=cost)[0], shared)


def head_tile(columns: int, width: int, channels: int, *, device: torch.device) -> Tile:
    """The setting for a head of ``columns`` matrix columns over rows of ``width``."""
    return fit(Tile(256 if width > 128 else 128, columns, 0, min(32, _step(channels)), 4, 5), gpu(device)[1])


def fit(tile: Tile, shared: int) -> Tile:
    """Shortens the pipeline, then the tile, for GPUs with less shared memory than Hopper's 227 KiB."""
    while (tile.positions + tile.first + tile.second) * tile.step * 2 * tile.stages > shared - 4096:
        if tile.stages > 2:
            tile = dataclasses.replace(tile, stages=tile.stages - 1)
        elif tile.step > 16:
            tile = dataclasses.replace(tile, step=tile.step // 2)
        elif tile.positions > 32:
            tile = dataclasses.replace(tile, positions=tile.positions // 2)
        else:
            break
    return tile


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have; an H200's in the interpreter."""
    if device.type != "cuda":
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 232448)
