"""Which tile a convolution's kernel takes: the one that a GPU's multiprocessors finish first.

Settings change no bit of the result, so every size and shard may take its own. How fast each is was measured where it
runs (`use`), or else on an H200.
"""

from __future__ import annotations

import dataclasses

import torch

from ..gpu import gpu
from ..layer_kinds import LayerKind, Measured
from .triton_version import DESCRIPTORS

# The accumulators of more channels don't fit one program's registers.
_MAX_CHANNELS = 384


@dataclasses.dataclass(frozen=True)
class Tile:
    """Positions of a tile, O in two accumulators (the second may be 0), channels a step, warps, pipeline stages.

    Swapped, the weights are the product's left side: 192 channels are then three times 64 rows that each read a tile
    of the input 256 columns wide, which asks less of shared memory. Without descriptors tiles are read through
    pointers, also by GPUs that could do otherwise.
    """

    positions: int
    first: int
    second: int
    step: int
    warps: int
    stages: int
    swapped: bool = False
    descriptors: bool = True


# Per device, dtype and kind of layer; and how often that changed.
_measured: dict[tuple[torch.device, torch.dtype, LayerKind], list[tuple[Tile, float]]] = {}
_changes = 0


def wide_products(device: torch.device) -> bool:
    """Whether products take both sides from shared memory, which leaves registers for wide tiles' accumulators.

    Without descriptors, addresses would take those.
    """
    return gpu(device).reads_products_from_shared and DESCRIPTORS


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _split(channels: int) -> tuple[int, int]:
    """Two accumulators' columns that together hold the channels, or a part of more than 384, with little padding."""
    if channels > _MAX_CHANNELS:
        return min(((256, 128), (256, 64), (256, 0)), key=lambda pair: -(-channels // sum(pair)) * sum(pair))
    power = max(16, _power_of_2(channels))
    if power <= 32 or (power // 4 * 3 < channels and power <= 256):
        return power, 0
    if power // 4 * 3 < channels:
        return 256, 128
    return power // 2, max(16, _power_of_2(channels - power // 2))


def _step(channels: int) -> int:
    """Channels a step, by how fast a Hopper card is in such steps and what a tail wastes."""
    speeds = {64: 1.0, 32: 0.85, 16: 0.55}
    return min(speeds, key=lambda step: -(-channels // step) * step / speeds[step])


def _settings(channels: int, out_channels: int) -> list[tuple[Tile, float]]:
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
        if deep and (first, second) == (256, 64):
            # Two programs that halve the channels find room at once.
            return [(Tile(128, 128, 32, step, 4, 5), 607), (Tile(128, first, second, step, 8, stages), 530), small]
        return [
            (Tile(128, first, second, step, 8, stages), 705),
            (Tile(64, first, second, step, 4, stages), 650),
            small,
        ]
    return [(Tile(128, first, 0, step, 8, 6 if deep else 4), 705), (Tile(64, first, 0, step, 4, 4), 625), small]


# For GPUs whose products take their operands from registers, by how fast they were where a Hopper card posed as one
# (BENCHMARKS.md). In one accumulator each of 4 warps has a square of 64 x 64 and reads a quarter of a tile's rows and
# columns. In two, Triton 3.6 gives every warp rows of its own and all columns: of 256 x (64 + 32) 64 x 96.
_NARROW = (
    Tile(256, 64, 0, 64, 4, 3),
    Tile(128, 128, 0, 64, 4, 3),
    Tile(256, 64, 32, 32, 4, 4),
    Tile(128, 128, 0, 32, 4, 4),  # of which two find room in 100 KB
    Tile(256, 128, 0, 32, 8, 4),
    Tile(256, 64, 0, 32, 4, 4),
    Tile(128, 64, 32, 32, 4, 4),
    Tile(256, 64, 32, 32, 8, 4),
    Tile(64, 64, 32, 32, 4, 4),
    Tile(128, 128, 32, 64, 8, 3),
    Tile(64, 128, 32, 32, 4, 3),
    Tile(128, 64, 0, 32, 4, 4),
)
# Of them as many as are compiled and measured for a kind of layer.
_MOST_NARROW = 5
# Channels that a program computes for nothing may be so many of those that are wanted.
_MOST_WASTE = 0.08


def _assembles(tile: Tile, kind: LayerKind, device: torch.device) -> bool:
    """Whether the assembler finds registers for a tile's accumulators.

    Those of more than 64 x 64 a warp spill over 300 bytes where steps are so few that they are unrolled, and for
    sm_120, as the largest tile does there.
    """
    accumulators = tile.positions * (tile.first + tile.second)
    if gpu(device).capability[0] == 12:
        return accumulators <= min(4, tile.warps) * 64 * 64
    return kind.channels > 32 or accumulators <= tile.warps * 64 * 64


def _narrow(kind: LayerKind, device: torch.device) -> list[Tile]:
    """Settings for GPUs whose products take their operands from registers, those that promise most first."""
    own, step = kind.out_channels // kind.halves, _step(kind.channels)
    if sum(_split(own)) <= 64:
        first, second = _split(own)
        shapes = [
            Tile(256, first, second, 32, 8, 4),
            Tile(128, first, second, 32, 4, 4),
            Tile(64, first, second, 32, 4, 4),
        ]
    else:
        # Where one accumulator leaves no columns over two have always lost, and for sm_80 found no registers once.
        one = own % 64 == 0
        possible = [tile for tile in _NARROW if _assembles(tile, kind, device) and not (one and tile.second)]
        padded = {tile: -(-own // width) * width for tile in possible if (width := tile.first + tile.second)}
        most = max(min(padded.values()), (1 + _MOST_WASTE) * own)
        shapes = [tile for tile, columns in padded.items() if columns <= most][:_MOST_NARROW]
    return list(dict.fromkeys(dataclasses.replace(tile, step=min(step, tile.step)) for tile in shapes))


def _reads_tiles_through_tma(kind: LayerKind, device: torch.device) -> bool:
    """As `products.use_descriptors` finds it of the kind's arenas: addresses of each copy take registers."""
    return gpu(device).has_tma and DESCRIPTORS and kind.channels % 8 == 0


def _wide(kind: LayerKind, device: torch.device) -> bool:
    return wide_products(device) and _reads_tiles_through_tma(kind, device)


def _unmeasured(kind: LayerKind, device: torch.device) -> list[tuple[Tile, float]]:
    """Settings for a GPU that nothing is known of; narrow ones are taken for alike."""
    if _wide(kind, device):
        return _settings(kind.channels, kind.out_channels // kind.halves)
    return [(tile, 1.0) for tile in _narrow(kind, device)]


def candidates(kind: LayerKind, device: torch.device) -> list[Tile]:
    """Settings to measure for ``kind``: few, as each has to be compiled, and all with the same bits."""
    channels, own = kind.channels, kind.out_channels // kind.halves
    if kind.op == "head_conv":
        return [head_tile(64, 512, channels, device=device)]
    if not _wide(kind, device):
        found = _narrow(kind, device)
        if _reads_tiles_through_tma(kind, device):
            # There addresses take fewer registers, and waiting more instructions.
            found = [tile for one in found[:3] for tile in (one, dataclasses.replace(one, descriptors=False))]
        return list(dict.fromkeys(fit(tile, device) for tile in found))
    shipped = [tile for tile, _ in _settings(channels, own)]
    first, second = _split(own)
    step = _step(channels)
    if first + second <= 96:
        others = [Tile(256, first, second, min(32, step), 8, 4)]
    elif first + second <= 192:
        others = [Tile(128, first, second, step, 8, 3), Tile(128, first, second, step, 4, 3)]
    else:
        others = [Tile(128, 128, 64, step, 8, 4)]
    return list(dict.fromkeys(fit(tile, device) for tile in (*shipped, *others)))


def use(measured: dict[LayerKind, Measured], device: torch.device, dtype: torch.dtype) -> None:
    """Has `choose_tile` go by what was measured on ``device``'s model, of as many candidates as there are."""
    global _changes
    for kind, one in measured.items():
        settings = [(tile, speed) for tile, speed in zip(candidates(kind, device), one.tiles, strict=True) if speed]
        if settings and kind.op != "head_conv" and settings != _measured.get((device, dtype, kind)):
            _measured[device, dtype, kind] = settings
            _changes += 1


def changes() -> int:
    """Another number whenever `choose_tile` may choose otherwise than before."""
    return _changes


def choose_tile(
    kind: LayerKind, frame_positions: int, frames: int, *, dtype: torch.dtype, device: torch.device
) -> Tile:
    """Picks a setting; the convolution's bits are the same for all.

    Args:
        kind: of layer.
        frame_positions: positions of a frame, borders between rows included.
        frames: output frames, times the phases of each.
        dtype: what it multiplies.
        device: where it runs.
    """
    processors = gpu(device).processors
    own = kind.out_channels // kind.halves

    def cost(setting: tuple[Tile, float]) -> float:
        tile, speed = setting
        parts = -(-own // (tile.first + tile.second))
        programs = -(-frame_positions // tile.positions) * frames * parts
        return -(-programs // processors) * tile.positions / (parts * speed)

    # Images' layers are as videos', with a third of the products for each position.
    alike = kind._replace(kernel=(3, *kind.kernel[1:])) if kind.op == "conv" and kind.kernel[0] == 1 else kind
    measured = _measured.get((device, dtype, kind)) or _measured.get((device, dtype, alike))
    settings = measured or _unmeasured(kind, device)
    return fit(min(settings, key=cost)[0], device)


def head_tile(columns: int, width: int, channels: int, *, device: torch.device) -> Tile:
    """The setting for a head of ``columns`` matrix columns over rows of ``width``."""
    positions, step = 256 if width > 128 else 128, min(32, _step(channels))
    if wide_products(device):
        return fit(Tile(positions, columns, 0, step, 4, 5), device)
    # With 4 warps 224 registers a thread; so two programs of twice the warps share a multiprocessor.
    return fit(Tile(positions, columns, 0, step, positions // 32, 3), device)


def fit(tile: Tile, device: torch.device) -> Tile:
    """Shortens the pipeline, then the tile, for GPUs with less shared memory than Hopper's 227 KiB."""
    # Products from registers free a stage before the next one is asked for.
    spare, room = (0, 4096) if gpu(device).reads_products_from_shared else (1, 1024)
    while (tile.positions + tile.first + tile.second) * tile.step * 2 * (tile.stages - spare) > (
        gpu(device).shared - room
    ):
        if tile.stages > 2 + spare:
            tile = dataclasses.replace(tile, stages=tile.stages - 1)
        elif tile.step > 16:
            tile = dataclasses.replace(tile, step=tile.step // 2)
        elif tile.positions > 32:
            tile = dataclasses.replace(tile, positions=tile.positions // 2)
        else:
            break
    return tile
