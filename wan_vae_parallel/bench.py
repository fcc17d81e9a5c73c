"""Decode times on this machine: one device, several, PyTorch's own kernels, diffusers, in one run.

B videos, T latent frames, h x w latent rows and columns
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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
from .errors import WanVAEError, is_out_of_memory
from .files.checkpoint import read_checkpoint
from .files.whole import replacing
from .model.decoder import WanDecoder
from .ops.dispatch import torch_kernels_only
from .vae import vae_from_state_dict

Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        size: of the frames, ``"1280x720"``.
        frames: how many.
        what: ``"ours"``, ``"PyTorch's kernels"`` (our engine without its own) or ``"diffusers"``.
        devices: which.
        seconds: until the float32 frames are on the host, median of ``times``; None if that failed.
        times: of each decode after the first.
        first: the same of the first decode, which starts workers, loads weights and compiles kernels.
        peak_gib: most memory that tensors took on the device; known for one device of this process only.
        failed: why there are no figures.
    """

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
    """Seeded random weights of a decoder, by Wan's original keys, that keep a signal's size."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in WanDecoder(architecture).state_dict().items()}
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
) -> Iterator[Row]:
    """Measures each size with one, two, four... and all of ``devices``, then what it is compared with.

    Args:
        architecture: what ``weights`` are of.
        weights: a decoder's.
        sizes: width and height of the frames.
        latent_frames: T.
        devices: the first ones are used where fewer take part.
        dtype: to compute in.
        repeats: decodes after the first one.
        chunk: ours, latent frames at once; see `load_vae`.

    Yields:
        A row as soon as it is measured.
    """
    counts = sorted({count for count in (1, 2, 4, 8, 16) if count < len(devices)} | {len(devices)})
    one = devices[:1]
    for width, height in sizes:
        ratio = architecture.spatial_ratio
        shape = (1, architecture.z_dim, latent_frames, height // ratio, width // ratio)
        latents = functools.partial(_latents, shape)

        def row(what: str, used: Sequence[torch.device], make: Callable[[], Decode], *, foreign: bool = False) -> Row:
            times, peak, failed = _timed(make, latents, used, repeats, foreign=foreign)  # noqa: B023 (called at once)
            return Row(
                size=f"{width}x{height}",  # noqa: B023 (likewise)
                frames=architecture.frame_count(latent_frames),
                what=what,
                devices=tuple(map(str, used)),
                seconds=statistics.median(times[1:]) if times else None,
                times=tuple(times[1:]),
                first=times[0] if times else None,
                peak_gib=peak,
                failed=failed,
            )

        for count in counts:
            with vae_from_state_dict(weights, devices=list(devices[:count]), dtype=dtype, chunk=chunk) as vae:
                yield row("ours", devices[:count], lambda: vae.decode)
        if devices[0].type == "cuda":
            with (
                torch_kernels_only(),
                vae_from_state_dict(weights, devices=list(one), dtype=dtype, chunk=chunk) as vae,
            ):
                yield row("PyTorch's kernels", one, lambda: vae.decode)
        if _diffusers_decodes(architecture):
            make = functools.partial(_diffusers, architecture, devices[0], dtype)
            yield row("diffusers", one, make, foreign=True)
        if devices[0].type == "cuda":
            torch.cuda.empty_cache()


def _latents(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _timed(
    make: Callable[[], Decode],
    latents: Callable[[], torch.Tensor],
    devices: Sequence[torch.device],
    repeats: int,
    *,
    foreign: bool = False,
) -> tuple[list[float], float | None, str]:
    """Seconds of each decode, the first included, and the peak in GiB; or why there are none.

    Errors that are nobody's fault but the code's are raised, unless the code is not ours (``foreign``).
    """
    here = len(devices) == 1 and devices[0].type == "cuda"
    times: list[float] = []
    try:
        decode, given = make(), latents()
        for _ in range(repeats + 1):
            if here:
                torch.cuda.reset_peak_memory_stats(devices[0])
            started = time.perf_counter()
            decode(given)
            times.append(time.perf_counter() - started)
    except Exception as error:
        if is_out_of_memory(error):
            return [], None, "does not fit"
        if foreign or isinstance(error, WanVAEError):
            return [], None, str(error).strip().partition("\n")[0] or type(error).__name__
        raise
    return times, torch.cuda.max_memory_allocated(devices[0]) / 2**30 if here else None, ""


def _diffusers_decodes(architecture: Architecture) -> bool:
    """Whether diffusers is installed, whatever its version, and knows such an architecture."""
    with contextlib.suppress(ValueError):  # a module without a spec, which stands in for it
        found = importlib.util.find_spec("diffusers")
        # A folder that only has the name has no origin.
        return found is not None and found.origin is not None and architecture.output_channels == 3
    return False


def _diffusers(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Decode:
    """A decode of diffusers' to the host with random weights."""
    from diffusers import AutoencoderKLWan

    options: dict[str, Any] = {"base_dim": architecture.width, "z_dim": architecture.z_dim}
    if architecture.residual:
        options.update(base_dim=8, decoder_base_dim=architecture.width, is_residual=True, patch_size=2)
        options.update(in_channels=12, out_channels=12, scale_factor_spatial=16)
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**options)
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

    return decode


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
    lines = ["| size | frames | what | devices | seconds | frames/s | against one device | first | peak memory |"]
    lines.append("| --- " * 9 + "|")
    for row in rows:
        base = _base(rows, row.size)
        if row.seconds is None:
            figures = [row.failed, "", "", "", ""]
        else:
            ratio = f"{base / row.seconds:.2f}x" if base else ""
            peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f} GiB"
            figures = [f"{row.seconds:.3f}", f"{row.frames / row.seconds:.1f}", ratio, f"{row.first:.1f} s", peak]
        lines.append("| " + " | ".join([row.size, str(row.frames), row.what, ", ".join(row.devices), *figures]) + " |")
    return "\n".join(lines)


def _base(rows: Sequence[Row], size: str) -> float | None:
    ours = [row for row in rows if row.what == "ours" and row.size == size and len(row.devices) == 1]
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
    for size in dict.fromkeys(row.size for row in rows):
        ours = [row for row in rows if row.what == "ours" and row.size == size and row.seconds]
        base = _base(rows, size)
        if ours:
            counts = [len(row.devices) for row in ours]
            times = [row.seconds or 0.0 for row in ours]
            most = max(most, *counts)
            (line,) = seconds.plot(counts, times, marker="o", label=size)
            if base:
                speedup.plot(counts, [base / t for t in times], marker="o", color=line.get_color(), label=size)
            for row in rows:
                if row.what != "ours" and row.size == size and row.seconds:
                    marker = "x" if row.what == "diffusers" else "+"
                    seconds.plot([1], [row.seconds], marker, color=line.get_color(), label=f"{size}, {row.what}")
    speedup.plot([1, most], [1, most], color="0.8", zorder=0)
    seconds.set(xlabel="devices", ylabel="seconds to the host tensor", ylim=(0, None))
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
    """The decoder in a checkpoint's file."""
    checkpoint = read_checkpoint(path)
    return checkpoint.architecture, dict(checkpoint.decoder)
