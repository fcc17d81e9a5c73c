"""Decode and encode times on this machine: one device, several, PyTorch's own kernels, diffusers, in one run.

B videos, T latent frames, h x w latent rows and columns, z latent channels; H x W pixels of C colours
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ._version import __version__
from .architecture import Architecture
from .errors import WanVAEError, WorkerError, is_out_of_memory
from .files.checkpoint import read_checkpoint
from .files.whole import replacing
from .loading import vae_from_state_dict
from .model.decoder import WanDecoder
from .model.encoder import WanEncoder
from .ops.dispatch import torch_kernels_only
from .vae import VAE

Direction = Literal["decode", "encode"]
DIRECTIONS: tuple[Direction, ...] = ("decode", "encode")
# Until workers take part, at most.
_START_SECONDS = 300.0
# Latents to frames, or frames to latents.
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        direction: ``"decode"`` or ``"encode"``.
        size: of the frames, ``"1280x720"``.
        frames: how many.
        what: ``"ours"``, ``"PyTorch's kernels"`` (our engine without its own) or ``"diffusers"``.
        devices: which.
        seconds: until the float32 frames or latents are on the host, median of ``times``; None if that failed.
        times: of each call after the first.
        first: the same of the first call, which starts workers, loads weights and compiles kernels.
        peak_gib: most memory that tensors took on the device; known for one device of this process only.
        failed: why there are no figures.
    """

    direction: Direction
    size: str
    frames: int
    what: str
    devices: tuple[str, ...]
    seconds: float | None
    times: tuple[float, ...]
    first: float | None
    peak_gib: float | None
    failed: str = ""


def random_weights(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded random weights by Wan's original keys that keep a signal's size; an encoder's too if there is one."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in WanDecoder(architecture).state_dict().items()}
        if architecture.encoder_width is not None:
            shapes |= {key: tensor.shape for key, tensor in WanEncoder(architecture).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("gamma"):
            weights[key] = 1 + 0.1 * noise
        elif key.endswith("bias"):
            weights[key] = 0.1 * noise
        else:
            weights[key] = noise / shape[1:].numel() ** 0.5
    return weights


def measure(
    *,
    architecture: Architecture,
    weights: dict[str, torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    latent_frames: int,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    repeats: int,
    chunk: int | Literal["auto"] = "auto",
    directions: Sequence[Direction] = DIRECTIONS,
) -> Iterator[Row]:
    """Measures each size and direction with one, two, four... and all of ``devices``, then what it is compared with.

    Args:
        architecture: what ``weights`` are of.
        weights: a decoder's, and an encoder's if encodes are measured.
        sizes: width and height of the frames.
        latent_frames: T.
        devices: the first ones are used where fewer take part.
        dtype: to compute in.
        repeats: calls after the first one.
        chunk: ours, frames at once; see `load_vae`.
        directions: what is measured.

    Yields:
        A row as soon as it is measured.
    """
    counts = sorted({count for count in (1, 2, 4, 8, 16) if count < len(devices)} | {len(devices)})
    one = devices[:1]
    for (width, height), direction in itertools.product(sizes, directions):
        frames = architecture.frame_count(latent_frames)
        ratio = architecture.spatial_ratio
        if direction == "decode":
            latent_shape = (1, architecture.z_dim, latent_frames, height // ratio, width // ratio)
            given = functools.partial(_random, torch.randn, latent_shape)
        else:
            given = functools.partial(_random, torch.rand, (1, frames, height, width, architecture.input_channels))

        def row(
            what: str,
            used: Sequence[torch.device],
            make: Callable[[], Call],
            *,
            foreign: bool = False,
            ready: Callable[[], bool] = lambda: True,
        ) -> Row:
            times, peak, failed = _timed(make, given, used, repeats, ready, foreign=foreign)  # noqa: B023 (called at once)
            return Row(
                direction=direction,  # noqa: B023 (likewise)
                size=f"{width}x{height}",  # noqa: B023
                frames=frames,  # noqa: B023
                what=what,
                devices=tuple(map(str, used)),
                seconds=statistics.median(times[1:]) if times else None,
                times=tuple(times[1:]),
                first=times[0] if times else None,
                peak_gib=peak,
                failed=failed,
            )

        def ours(vae: VAE) -> Callable[[], Call]:
            return lambda: vae.decode if direction == "decode" else vae.encode  # noqa: B023

        for count in counts:
            with vae_from_state_dict(weights, devices=list(devices[:count]), dtype=dtype, chunk=chunk) as vae:
                yield row("ours", devices[:count], ours(vae), ready=lambda: vae.worked_on == vae.devices)
        if devices[0].type == "cuda":
            with (
                torch_kernels_only(),
                vae_from_state_dict(weights, devices=list(one), dtype=dtype, chunk=chunk) as vae,
            ):
                yield row("PyTorch's kernels", one, ours(vae))
        if _diffusers_knows(architecture):
            make = functools.partial(_diffusers, architecture, devices[0], dtype, direction)
            yield row("diffusers", one, make, foreign=True)
        if devices[0].type == "cuda":
            torch.cuda.empty_cache()


def _random(draw: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return draw(shape, generator=torch.Generator().manual_seed(1))


def _timed(
    make: Callable[[], Call],
    given: Callable[[], torch.Tensor],
    devices: Sequence[torch.device],
    repeats: int,
    ready: Callable[[], bool] = lambda: True,
    *,
    foreign: bool = False,
) -> tuple[list[float], float | None, str]:
    """Seconds of each call, the first included, and the peak in GiB; or why there are none.

    After the first one others follow that do not count, until one has found all devices ``ready``.
    Errors that are nobody's fault but the code's are raised, unless the code is not ours (``foreign``).
    """
    here = len(devices) == 1 and devices[0].type == "cuda"
    times: list[float] = []
    try:
        call, content = make(), given()
        for _ in range(repeats + 1):
            if here:
                torch.cuda.reset_peak_memory_stats(devices[0])
            started = time.perf_counter()
            call(content)
            times.append(time.perf_counter() - started)
            while len(times) == 1 and not ready():
                if time.perf_counter() - started > _START_SECONDS:
                    raise WorkerError(f"workers did not start within {_START_SECONDS:.0f} s; the log says why")
                call(content)
    except Exception as error:
        if is_out_of_memory(error):
            return [], None, "does not fit"
        if foreign or isinstance(error, WanVAEError):
            return [], None, str(error).strip().partition("\n")[0] or type(error).__name__
        raise
    return times, torch.cuda.max_memory_allocated(devices[0]) / 2**30 if here else None, ""


def _diffusers_knows(architecture: Architecture) -> bool:
    """Whether diffusers is installed, whatever its version, and knows such an architecture."""
    with contextlib.suppress(ValueError):  # a module without a spec, which stands in for it
        found = importlib.util.find_spec("diffusers")
        # A folder that only has the name has no origin.
        usual = architecture.output_channels == architecture.input_channels == 3 and not architecture.images_only
        return found is not None and found.origin is not None and usual and architecture.upscale == 1
    return False


def _diffusers(architecture: Architecture, device: torch.device, dtype: torch.dtype, direction: Direction) -> Call:
    """A decode or encode of diffusers' to the host with random weights."""
    from diffusers import AutoencoderKLWan

    options: dict[str, Any] = {"base_dim": architecture.width, "z_dim": architecture.z_dim}
    if architecture.residual:
        options.update(base_dim=architecture.encoder_width or 8, decoder_base_dim=architecture.width)
        options.update(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**options)
    # Without the half that is not measured.
    for name in ("encoder", "quant_conv") if direction == "decode" else ("decoder", "post_quant_conv"):
        setattr(vae, name, torch.nn.Identity())
    vae = vae.to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.normal_(1, 0.1)
        else:
            parameter.data.normal_(0, 0.1 if name.endswith("bias") else parameter[0].numel() ** -0.5)
    vae = vae.to(device)

    @torch.inference_mode()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        frames: torch.Tensor = vae.decode(latents.to(device, dtype), return_dict=False)[0]
        return ((frames + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).float().cpu()

    @torch.inference_mode()
    def encode(frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.to(device, dtype).permute(0, 4, 1, 2, 3) * 2 - 1
        latents: torch.Tensor = vae.encode(pixels, return_dict=False)[0].mode()
        return latents.float().cpu()

    return decode if direction == "decode" else encode


def environment(devices: Sequence[torch.device]) -> dict[str, str]:
    """What the figures depend on, beside the code."""
    facts = {
        "wan-vae-parallel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if devices[0].type == "cuda":
        facts["gpu"] = ", ".join(dict.fromkeys(torch.cuda.get_device_name(device) for device in devices))
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        try:
            import triton
        except ImportError:
            facts["triton"] = "missing"
        else:
            facts["triton"] = triton.__version__
    return facts


def table(rows: Sequence[Row]) -> str:
    """The rows for people, with speeds against our own on one device."""
    columns = ("direction", "size", "frames", "what", "devices")
    figures = ("seconds", "frames/s", "against one device", "first", "peak memory")
    lines = ["| " + " | ".join((*columns, *figures)) + " |", "| --- " * len((*columns, *figures)) + "|"]
    for row in rows:
        base = _base(rows, row)
        if row.seconds is None:
            measured = [row.failed, "", "", "", ""]
        else:
            ratio = f"{base / row.seconds:.2f}x" if base else ""
            peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f} GiB"
            measured = [f"{row.seconds:.3f}", f"{row.frames / row.seconds:.1f}", ratio, f"{row.first:.1f} s", peak]
        cells = [row.direction, row.size, str(row.frames), row.what, ", ".join(row.devices), *measured]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _same(rows: Sequence[Row], like: Row) -> list[Row]:
    """Those of the direction and size of ``like``."""
    return [row for row in rows if (row.direction, row.size) == (like.direction, like.size)]


def _base(rows: Sequence[Row], like: Row) -> float | None:
    """Seconds of ours on one device, of the same direction and size."""
    ours = [row for row in _same(rows, like) if row.what == "ours" and len(row.devices) == 1]
    return ours[0].seconds if ours else None


def save_json(path: Path, rows: Sequence[Row], facts: dict[str, str], settings: dict[str, Any]) -> None:
    """Writes everything that was measured."""
    content = {"environment": facts, "settings": settings, "rows": [asdict(row) for row in rows]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def why_no_plot() -> str:
    """Why `save_plot` can't draw, if so."""
    try:
        import matplotlib.figure  # noqa: F401 (whether it is there)
    except ImportError as error:
        return f"no plot without matplotlib ({error}); pip install 'wan-vae-parallel[bench]' brings it"
    return ""


def save_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draws seconds and speed-up over the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    seconds, speedup = figure.subplots(1, 2)
    most = 1
    for like in {(row.direction, row.size): row for row in rows}.values():
        measured = [row for row in _same(rows, like) if row.seconds]
        ours = [row for row in measured if row.what == "ours"]
        base = _base(rows, like)
        if ours:
            counts = [len(row.devices) for row in ours]
            times = [row.seconds or 0.0 for row in ours]
            most = max(most, *counts)
            label, style = f"{like.direction} {like.size}", "-" if like.direction == "decode" else "--"
            (line,) = seconds.plot(counts, times, marker="o", linestyle=style, label=label)
            shared = {"color": line.get_color()}
            if base:
                ratios = [base / t for t in times]
                speedup.plot(counts, ratios, marker="o", linestyle=style, label=label, **shared)
            for row in measured:
                if row.what != "ours":
                    marker = "x" if row.what == "diffusers" else "+"
                    seconds.plot([1], [row.seconds], marker, label=f"{label}, {row.what}", **shared)
    speedup.plot([1, most], [1, most], color="0.8", zorder=0)
    seconds.set(xlabel="devices", ylabel="seconds until it is on the host", ylim=(0, None))
    speedup.set(xlabel="devices", ylabel="speed-up", ylim=(0, None))
    for axes in (seconds, speedup):
        axes.set_xticks(sorted({len(row.devices) for row in rows}))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def weights_of(path: Path) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """What a checkpoint's file has: a decoder, and an encoder if there is one."""
    checkpoint = read_checkpoint(path)
    return checkpoint.architecture, {**checkpoint.decoder, **checkpoint.encoder}
