"""What a decode or an encode will hold in memory, by arithmetic, and how much there is.

h latent rows, w latent columns
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .architecture import Architecture
from .errors import OutOfMemoryError, is_out_of_memory
from .model.blocks import Needs, kernels_take
from .model.decoder import WanDecoder
from .model.encoder import WanEncoder
from .model.layers import CausalConv3d, UpsampleConv
from .ops.dispatch import KERNEL_DTYPES
from .ops.layer_kinds import LayerKind
from .ops.limits import WEIGHTS_AT_ONCE
from .ops.norm_silu import BLOCK_ELEMENTS
from .ops.pixels import tap_channels

# Pixels of a step beyond which larger chunks stop paying: four frames of 720p. There a step keeps an H200 busy,
# and more frames would only cost memory.
_ENOUGH_PIXELS = 4 * 720 * 1280
# Half as many where an encoder takes the frames, which is slower than the devices: five steps' frames wait for it on
# the host, and it can begin the sooner. Of the whole frame, however many devices share it.
_HANDED_ON_PIXELS = 2 * 720 * 1280
# Of an encode, whose finest stage takes as many frames as its coarsest: so many of its positions at once. Of Wan 2.2,
# where a position is four pixels, no more than twice as many pixels: eight frames of 704x1280 take 2.5 GiB more than
# four; to the host they took no less time, measured once, beside other programs.
_ENOUGH_ENCODED_POSITIONS = 2 * 720 * 1280
_ENOUGH_ENCODED_PIXELS = 2 * _ENOUGH_ENCODED_POSITIONS
# The same for CPUs, in pixels of a decoder of the published width 96; a pixel's work grows with the width's square.
# Two cores take 1.7 s of their time for 10,000 such pixels in fp32. 64x64: 27 s for 33 frames with chunk 1, 18 s with 2
# and 17 s with 4 or 8, in steps of 1.2, 1.6, 2.7 and 5.3 s. 128x128: 35, 34 and 34 s for 17 frames with 1, 2 and 4.
_CPU_PIXELS, _CPU_WIDTH = 128 * 128, 96
# Steps of an encode that one device gets before the first of them is waited for. Two chunks of pixels make one of the
# next stage, so that much work follows on little: a device never waits for the host where several are on their way.
ENCODE_AHEAD = 4
# The norm's fp32 intermediates, at most: two blocks.
_NORM_BYTES = 2 * BLOCK_ELEMENTS * 4
# Share of the free memory that is planned with; the rest is for fragmentation and the libraries' own buffers.
_USABLE = 0.9
# Values a channel of the head's weights once they are spread (kernels/head_conv.py): 64 columns, 162 taps at most.
_SPREAD_HEAD = 64 * 162
# Frames at once of a small video whose length is not known.
_MOST_FRAMES = 64
# What a system that does not tell its free memory is taken to have.
UNLIMITED = 2**62


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on a device.

    Attributes:
        weights: the parameters, and what its kernels want made of them.
        caches: the feature caches, of a decode for all videos of the batch; none for a single latent frame.
        step: activations of one step, at their largest.
    """

    weights: int
    caches: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.step


@functools.lru_cache(maxsize=256)
def decode_memory(
    architecture: Architecture,
    shape: tuple[int, int, int, int],
    *,
    chunk: int,
    dtype: torch.dtype,
    kernels: bool,
) -> DeviceMemory:
    """What decoding latents of ``shape`` ``(B, T, h, w)`` takes with ``chunk`` latent frames at once.

    Args:
        architecture: of the decoder.
        shape: of the latents.
        chunk: latent frames at once.
        dtype: to compute in.
        kernels: our own do all of it (`LocalDecoder.kernels`). If not it is an upper bound, whichever layers they are
            that PyTorch's do.
    """
    batch, latent_frames, rows, columns = shape
    chunk = min(chunk, most_at_once(batch, latent_frames))
    keeps = latent_frames > 1
    needs = _decoder_skeleton(architecture).page_needs(chunk, image=not keeps)
    videos = batch if keeps else 1
    kept, others = _page_elements(needs, rows, columns, videos=videos, keeps=keeps, gather=not kernels)
    live = _live_elements(architecture, videos, rows, columns, chunk)
    finest = architecture.stages[-1].scale ** 2 * architecture.width
    # Images leave together.
    pictures = batch * chunk if keeps else batch
    frames = pictures * architecture.output_channels * architecture.spatial_ratio**2 * rows * columns
    return DeviceMemory(
        weights=(
            parameter_count(architecture)
            + (_folded_elements(architecture) if dtype in KERNEL_DTYPES else 0)
            + (0 if keeps else _present_elements(_decoder_skeleton(architecture)))
        )
        * dtype.itemsize,
        caches=kept * dtype.itemsize,
        step=(others + live) * dtype.itemsize
        + (0 if kernels else min(_NORM_BYTES, 2 * 4 * chunk * rows * columns * finest))
        # Frames: the step's own, one step's in flight to the host, both at least fp32; and what they are made of.
        + 2 * frames * max(4, dtype.itemsize)
        + frames * dtype.itemsize
        # Latents as they came and as they are read.
        + 2 * batch * latent_frames * architecture.z_dim * rows * columns * dtype.itemsize,
    )


@functools.lru_cache(maxsize=256)
def encode_memory(
    architecture: Architecture,
    size: tuple[int, int],
    *,
    chunk: int,
    image: bool,
    dtype: torch.dtype,
    kernels: bool,
) -> DeviceMemory:
    """What encoding a video to latents of ``size`` ``(h, w)`` takes with ``chunk`` frames at once.

    Args:
        architecture: of the encoder.
        size: of the latents.
        chunk: frames at once.
        image: there is one frame only.
        dtype: to compute in.
        kernels: as in `decode_memory`.
    """
    rows, columns = size
    needs = _encoder_skeleton(architecture).page_needs(chunk, image=image)
    kept, others = _page_elements(needs, rows, columns, videos=1, keeps=not image, gather=not kernels)
    frame = architecture.input_channels * architecture.encode_ratio**2 * rows * columns
    seen = 1 if image else architecture.kernel_frames
    return DeviceMemory(
        weights=(
            encoder_parameter_count(architecture) + (_present_elements(_encoder_skeleton(architecture)) if image else 0)
        )
        * dtype.itemsize,
        caches=kept * dtype.itemsize,
        step=(others + _live_encoder_elements(architecture, rows, columns, chunk, seen, gather=not kernels))
        * dtype.itemsize
        + (0 if kernels else min(_NORM_BYTES, 8 * chunk * rows * columns * 64 * (architecture.encoder_width or 0)))
        # Pixels, at least fp32: those of steps that are begun, the last frame's copy, and past frames.
        + ((2 + ENCODE_AHEAD) * chunk + seen - 1) * frame * max(4, dtype.itemsize),
    )


@functools.cache
def parameter_count(architecture: Architecture) -> int:
    """Parameters of the decoder."""
    return sum(parameter.numel() for parameter in _decoder_skeleton(architecture).parameters())


@functools.cache
def encoder_parameter_count(architecture: Architecture) -> int:
    """Parameters of the encoder."""
    return sum(parameter.numel() for parameter in _encoder_skeleton(architecture).parameters())


def largest_encode_chunk(
    architecture: Architecture,
    size: tuple[int, int],
    *,
    frames: int | None,
    dtype: torch.dtype,
    free: int,
    kernels: bool,
    device_type: str = "cuda",
    image: bool | None = None,
) -> int:
    """`largest_chunk` for an encode of ``frames`` (None if that is not known) to latents of ``size`` ``(h, w)``.

    They are pictures that know nothing of one another if ``image``; by default one frame alone is.
    """
    image = frames == 1 if image is None else image
    rows, columns = size
    positions = rows * columns * architecture.down_stages[0].scale ** 2
    pixels = rows * columns * architecture.encode_ratio**2
    enough = min(_ENOUGH_ENCODED_POSITIONS / positions, _ENOUGH_ENCODED_PIXELS / pixels)
    if device_type == "cpu":
        enough = min(enough, _CPU_PIXELS / positions * (_CPU_WIDTH / (architecture.encoder_width or 1)) ** 2)
    most = _MOST_FRAMES if frames is None else most_encoded_at_once(frames, image=image)

    def fits(chunk: int) -> bool:
        needed = encode_memory(architecture, size, chunk=chunk, image=image, dtype=dtype, kernels=kernels)
        return needed.total <= _USABLE * free

    return _largest(max(1, min(round(enough), most)), fits)


def most_encoded_at_once(frames: int, *, image: bool) -> int:
    """The largest chunk of an encode that makes a difference: all frames but a video's first, or all pictures."""
    return frames if image else max(1, frames - 1)


def images_that_pay(architecture: Architecture, rows: int, columns: int) -> int:
    """How many images of ``rows`` x ``columns`` latents are worth decoding together: enough to keep a device busy."""
    height, width = architecture.frame_size(rows, columns)
    return max(1, round(_ENOUGH_PIXELS * architecture.upscale**2 / (height * width)))


def most_at_once(batch: int, latent_frames: int) -> int:
    """The largest chunk that makes a difference: all latent frames but a video's first, or a batch's images."""
    return latent_frames - 1 if latent_frames > 1 else batch


def _largest(chunk: int, fits: Callable[[int], bool]) -> int:
    """The largest chunk up to ``chunk`` that fits, at least 1."""
    while chunk > 1 and not fits(chunk):
        chunk -= 1
    return chunk


def largest_chunk(
    architecture: Architecture,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    free: int,
    kernels: bool,
    device_type: str = "cuda",
) -> int:
    """The chunk that ``chunk="auto"`` takes: enough to keep the device busy, fewer if ``free`` bytes are short.

    On CPUs it is no more than some seconds' work, since progress and cancelling come with each step.
    """
    batch, latent_frames, rows, columns = shape
    height, width = architecture.frame_size(rows, columns)
    # Frames of twice the size are as much work as ordinary ones.
    enough = _ENOUGH_PIXELS * architecture.upscale**2 / (height * width)
    if device_type == "cpu":
        # Of Wan 2.2, whose pixels are folded into channels, the positions that its last layers compute.
        positions = rows * columns * architecture.stages[-1].scale ** 2
        enough = min(enough, _CPU_PIXELS / positions * (_CPU_WIDTH / architecture.width) ** 2)

    def chunk_fits(chunk: int) -> bool:
        return fits(architecture, shape, chunk=chunk, dtype=dtype, free=free, kernels=kernels)

    return _largest(max(1, min(round(enough), most_at_once(batch, latent_frames))), chunk_fits)


def chunk_to_hand_on(chunk: int, frames: Sequence[int]) -> int:
    """``chunk``, or a smaller one that keeps little in memory on the way to an encoder.

    Args:
        chunk: what `largest_chunk` takes.
        frames: the shape of all, ``[B, T, H, W, C]``.
    """
    batch, count, height, width = frames[:4]
    together = 1 if count == 1 else batch  # a batch's images make chunks, and its videos go side by side
    return min(chunk, max(1, round(_HANDED_ON_PIXELS / (together * height * width))))


def fits(
    architecture: Architecture,
    shape: tuple[int, int, int, int],
    *,
    chunk: int,
    dtype: torch.dtype,
    free: int,
    kernels: bool,
) -> bool:
    """Whether a decode with ``chunk`` fits into ``free`` bytes, weights included."""
    needed = decode_memory(architecture, shape, chunk=chunk, dtype=dtype, kernels=kernels)
    return needed.total <= _USABLE * free


def largest_frame(
    architecture: Architecture,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    free: int,
    kernels: bool,
) -> str:
    """The largest frame of the same proportions that would fit into ``free`` bytes, as ``"832x480"``."""
    batch, latent_frames, rows, columns = shape
    for share in range(99, 0, -1):
        smaller = (max(1, rows * share // 100), max(1, columns * share // 100))
        size = (batch, latent_frames, *smaller)
        if fits(architecture, size, chunk=1, dtype=dtype, free=free, kernels=kernels):
            height, width = architecture.frame_size(*smaller)
            return f"{width}x{height}"
    return "no frame"


def check_host_room(shape: Sequence[int], dtype: torch.dtype, *, videos: int, in_python: str = "") -> None:
    """Raises `OutOfMemoryError` if the host has no room for so many videos of frames ``[B, T, H, W, C]``.

    Args:
        shape: of one video.
        dtype: of the frames.
        videos: how many of them.
        in_python: a way out for who calls from Python, see `WanVAEError`.
    """
    needed, free = videos * math.prod(shape) * dtype.itemsize, free_memory(torch.device("cpu"))
    if needed > free:
        raise _no_host_room(shape, needed, f"{gibibytes(free)} are free", videos, in_python)


@contextlib.contextmanager
def host_room(
    shape: Sequence[int], dtype: torch.dtype, *, in_python: str = "", doing: str = "decode"
) -> Iterator[None]:
    """Within it memory of the host is taken for frames ``[B, T, H, W, C]``; raises `OutOfMemoryError` if it has none.

    It may be short of what it said that it had, as where a limit holds for this process alone.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = math.prod(shape) * dtype.itemsize
        raise _no_host_room(shape, needed, "this process gets no more", 1, in_python, doing) from error


def _no_host_room(
    shape: Sequence[int], needed: int, why: str, videos: int, in_python: str, doing: str = "decode"
) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{videos * shape[0] * shape[1]} frames of {shape[3]}x{shape[2]} take {gibibytes(needed)} of the computer's "
        f"own memory (RAM), where {why}; free some of it, or {doing} fewer or smaller frames at once",
        in_python,
    )


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


def give_back_host_memory() -> None:
    """Gives the system back what the C library's allocator holds of tensors that are gone.

    Decodes of other sizes each time leave holes between what stays, such as oneDNN's compiled convolutions. After 100
    decodes of up to 128x128 with a decoder of width 16 a process of 381 MiB had 104 MiB of holes.
    """
    trim = _malloc_trim()
    if trim:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The GNU C library's; others have none, or need none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function:
        function.argtypes = (ctypes.c_size_t,)
    return function


def gibibytes(count: float) -> str:
    """Bytes for people: ``"4.1 GiB"``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


@functools.cache
def _decoder_skeleton(architecture: Architecture) -> WanDecoder:
    """The decoder without weights, to count its parts."""
    with torch.device("meta"):
        return WanDecoder(architecture)


@functools.cache
def _encoder_skeleton(architecture: Architecture) -> WanEncoder:
    """Likewise the encoder."""
    with torch.device("meta"):
        return WanEncoder(architecture)


def decoder_kinds(architecture: Architecture) -> list[LayerKind]:
    """Of the decoder's convolutions."""
    return [layer.kind for layer in _decoder_skeleton(architecture).convolutions()]


def kernels_take_decoder(architecture: Architecture) -> bool:
    """Whether our kernels take all of its widths."""
    return kernels_take(_decoder_skeleton(architecture))


def kernels_take_encoder(architecture: Architecture) -> bool:
    """The same of the encoder."""
    return kernels_take(_encoder_skeleton(architecture))


def encoder_kinds(architecture: Architecture) -> list[LayerKind]:
    """Of the encoder's convolutions."""
    return [layer.kind for layer in _encoder_skeleton(architecture).convolutions()]


def _folded_elements(architecture: Architecture) -> int:
    """Elements of weights as the kernels take them: upsamplings' 16 taps, not 9, and the head's, spread thrice."""
    convs = (module for module in _decoder_skeleton(architecture).modules() if isinstance(module, UpsampleConv))
    return sum(conv.weight.numel() // 9 * 16 for conv in convs) + 3 * _SPREAD_HEAD * architecture.width


def _present_elements(model: WanDecoder | WanEncoder) -> int:
    """Elements of the weights that images' convolutions have of their own: those of the present frame."""
    convs = (module for module in model.modules() if isinstance(module, CausalConv3d))
    return sum(conv.weight[:, :, -1].numel() for conv in convs if conv.weight.shape[2] > 1)


def _page_elements(needs: Needs, rows: int, columns: int, *, videos: int, keeps: bool, gather: bool) -> tuple[int, int]:
    """Elements of all pages: those that keep past frames, and the others, with what is made of them to ``gather``."""
    kept, others, gathered = 0, 0, 0
    for key, need in needs.items():
        frame = (rows * key.scale + 2 * key.border) * (columns * key.scale + 2 * key.border) * key.channels
        slots, past = need.slots(videos, keeps=keeps), videos * need.kept if keeps else 0
        kept += past * frame
        others += (slots - past) * frame
        # Without a kernel of our own a convolution's frames are gathered, and doubled one by one before it.
        gathered = max(gathered, (need.passing + 2) * frame, 12 * frame)
    return kept, others + gathered if gather else others


def _live_elements(architecture: Architecture, batch: int, rows: int, columns: int, chunk: int) -> int:
    """The largest sum of activations outside the pages: a block's input and result, and what shortcuts wait for."""
    positions = chunk * rows * columns
    first = architecture.first_channels
    # Attention: its input, norm, queries, keys and values, keys and values of all rows, two results.
    live = [9 * first * positions + _attention_weights(rows * columns, chunk)]
    sources = 0
    for stage in architecture.stages:
        at_scale = positions * stage.scale**2
        kept = at_scale * stage.in_channels if architecture.residual and stage.upsample else 0
        live.append(sources + kept + at_scale * (max(stage.in_channels, stage.channels) + stage.channels))
        sources += batch * kept
    return max(live)


def _attention_weights(positions: int, chunk: int) -> int:
    """Elements of attention's weights, at most: of wide layers, and on GPUs with little shared memory of all."""
    return min(WEIGHTS_AT_ONCE, chunk * (-(-positions // 128) * 128) ** 2)


def _live_encoder_elements(
    architecture: Architecture, rows: int, columns: int, chunk: int, seen: int, *, gather: bool
) -> int:
    """The same of an encoder whose first convolution sees so many frames, with what waits before coarser stages."""
    stages = architecture.down_stages
    last = stages[-1].channels
    # Attention: as the decoder's.
    live = [9 * last * chunk * rows * columns + _attention_weights(rows * columns, chunk)]
    # The first convolution: neighbourhoods of pixels, which PyTorch's kernels copy, and its result.
    taps = tap_channels(architecture.input_channels * architecture.encoder_patch**2) * (1 + gather)
    finest = rows * columns * stages[0].scale ** 2
    live.append(finest * (taps * (chunk + seen - 1) + chunk * stages[0].in_channels))
    for stage in stages:
        at_scale = chunk * rows * columns * stage.scale**2
        # A block's input and result, and what a shortcut waits with: for its other half, too.
        kept = 2 * stage.in_channels if architecture.residual else 0
        live.append(at_scale * (stage.in_channels + stage.channels + kept))
    # One frame less than two chunks, and the last one's copy.
    waiting = sum(2 * chunk * rows * columns * stage.scale**2 * stage.in_channels for stage in stages[1:])
    return max(live) + waiting
