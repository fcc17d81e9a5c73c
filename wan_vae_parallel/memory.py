"""What a decode will hold in memory, by arithmetic, and how much there is.

h latent rows, w latent columns
"""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from .architecture import Architecture
from .model.blocks import UPSAMPLED_ELEMENTS
from .ops.norm_silu import BLOCK_ELEMENTS

# Pixels of a step beyond which larger chunks stop paying: four frames of 720p. There a step keeps an H200 busy,
# and more frames would only cost memory.
_ENOUGH_PIXELS = 4 * 720 * 1280
# The norm's fp32 intermediates, at most: two blocks.
_NORM_BYTES = 2 * BLOCK_ELEMENTS * 4
# Share of the free memory that is planned with; the rest is for fragmentation and the libraries' own buffers.
_USABLE = 0.9
# What a system that does not tell its free memory is taken to have.
UNLIMITED = 2**62
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "Cuda failure 2 'out of memory'")


@dataclass(frozen=True, kw_only=True)
class DecodeMemory:
    """Bytes on the decoding device.

    Attributes:
        weights: the decoder's parameters.
        caches: the feature caches, for all videos of the batch; none for a single latent frame.
        step: activations of one step, at their largest.
    """

    weights: int
    caches: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.step


def decode_memory(
    architecture: Architecture, shape: tuple[int, int, int, int], *, chunk: int, dtype: torch.dtype
) -> DecodeMemory:
    """What decoding latents of ``shape`` ``(B, T, h, w)`` takes with ``chunk`` latent frames at once."""
    batch, latent_frames, rows, columns = shape
    chunk = max(1, min(chunk, latent_frames - 1))
    cached = _cached_elements(architecture, rows, columns) if latent_frames > 1 else 0
    frames = batch * architecture.output_channels * architecture.spatial_ratio**2 * rows * columns * chunk
    return DecodeMemory(
        weights=parameter_count(architecture) * dtype.itemsize,
        caches=batch * cached * dtype.itemsize,
        # Frames: the step's own, one step's in flight to the host, both at least fp32.
        step=_step_elements(architecture, batch, rows, columns, chunk) * dtype.itemsize
        + min(_NORM_BYTES, 2 * 4 * chunk * rows * columns * architecture.stages[-1].scale ** 2 * architecture.width)
        + 2 * frames * max(4, dtype.itemsize),
    )


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the decoder."""
    z, first, last = architecture.z_dim, architecture.first_channels, architecture.width

    def conv(in_channels: int, out_channels: int, taps: int) -> int:
        return (in_channels * taps + 1) * out_channels

    def residual_block(in_channels: int, channels: int) -> int:
        shortcut = conv(in_channels, channels, 1) if in_channels != channels else 0
        return in_channels + channels + conv(in_channels, channels, 27) + conv(channels, channels, 27) + shortcut

    count = conv(z, z, 1) + conv(z, first, 27) + 2 * residual_block(first, first)
    count += first + conv(first, 3 * first, 1) + conv(first, first, 1)
    for stage in architecture.stages:
        count += residual_block(stage.in_channels, stage.channels)
        count += (stage.blocks - 1) * residual_block(stage.channels, stage.channels)
        if stage.upsample:
            count += conv(stage.channels, stage.out_channels, 9)
        if stage.upsample == "3d":
            count += conv(stage.channels, 2 * stage.channels, 3)
    return count + last + conv(last, architecture.output_channels * architecture.patch**2, 27)


def largest_chunk(
    architecture: Architecture, shape: tuple[int, int, int, int], *, dtype: torch.dtype, free: int
) -> int:
    """The chunk that ``chunk="auto"`` takes: enough to keep the device busy, fewer if ``free`` bytes are short."""
    _, latent_frames, rows, columns = shape
    height, width = architecture.frame_size(rows, columns)
    chunk = max(1, min(round(_ENOUGH_PIXELS / (height * width)), latent_frames - 1))
    while chunk > 1 and decode_memory(architecture, shape, chunk=chunk, dtype=dtype).total > _USABLE * free:
        chunk -= 1
    return chunk


def largest_frame(
    architecture: Architecture, shape: tuple[int, int, int, int], *, dtype: torch.dtype, free: int
) -> str:
    """The largest frame of the same proportions that would fit into ``free`` bytes, as ``"832x480"``."""
    batch, latent_frames, rows, columns = shape
    for share in range(99, 0, -1):
        smaller = (max(1, rows * share // 100), max(1, columns * share // 100))
        needed = decode_memory(architecture, (batch, latent_frames, *smaller), chunk=1, dtype=dtype).total
        if needed <= _USABLE * free:
            height, width = architecture.frame_size(*smaller)
            return f"{width}x{height}"
    return "no frame"


def free_memory(device: torch.device) -> int:
    """Bytes that a decode on ``device`` can take now; a very large number where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return UNLIMITED
    available = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line) * 1024
    # A container's limit may be lower than what the machine has left.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return available


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator and NCCL have no error classes of their own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def gibibytes(count: float) -> str:
    """Bytes for people: ``"4.1 GiB"``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _padded(rows: int, columns: int) -> int:
    return (rows + 2) * (columns + 2)


def _cached_elements(architecture: Architecture, rows: int, columns: int) -> int:
    """Two past frames of every causal convolution's input."""
    count = _padded(rows, columns) * (architecture.z_dim + 4 * architecture.first_channels)
    for stage in architecture.stages:
        channels = stage.in_channels + (2 * stage.blocks - 1) * stage.channels
        height, width = rows * stage.scale, columns * stage.scale
        count += _padded(height, width) * channels
        if stage.upsample == "3d":
            count += height * width * stage.channels
    last = architecture.stages[-1]
    count += _padded(rows * last.scale, columns * last.scale) * architecture.width
    return 2 * count


def _step_elements(architecture: Architecture, batch: int, rows: int, columns: int, chunk: int) -> int:
    """The largest sum of live activations: what waits between stages, one module's own, the shared workspace."""
    waiting, live, workspace = [0], [], [_padded(rows, columns) * (chunk + 2) * architecture.first_channels]
    for stage in architecture.stages:
        height, width = rows * stage.scale, columns * stage.scale
        position = height * width * chunk
        widest = max(stage.in_channels, stage.channels)
        workspace.append(_padded(height, width) * (chunk + 2) * widest)
        # A residual block: its input, the first convolution's output, the second's.
        blocks = position * (widest + 2 * stage.channels)
        kept = position * stage.in_channels if architecture.residual else 0
        factor = 2 if stage.upsample == "3d" else 1
        leaving = 4 * factor * position * stage.out_channels if stage.upsample else position * stage.out_channels
        # An upsampling: its input, the time convolution's output, the result.
        upsampling = position * stage.channels * (1 + (2 if factor == 2 else 0)) + leaving if stage.upsample else 0
        if stage.upsample:
            workspace.append(
                min(UPSAMPLED_ELEMENTS, 4 * factor * position * stage.channels) + 4 * height * width * stage.channels
            )
        live.append(kept + max(blocks, upsampling))
        waiting.append(leaving)
    before = itertools.accumulate(waiting[:-1])
    # Videos take turns within a step, but what waits between stages waits for each of them.
    return max(own + batch * queued for own, queued in zip(live, before, strict=True)) + max(workspace)
