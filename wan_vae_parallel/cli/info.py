"""``info``: what a checkpoint is, and what decoding and encoding with it take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..devices import parse_devices, parse_dtype
from ..files.checkpoint import describe_checkpoint
from ..memory import (
    DeviceMemory,
    decode_memory,
    encode_memory,
    encoder_parameter_count,
    free_memory,
    gibibytes,
    largest_chunk,
    largest_encode_chunk,
)
from ..parallel.plan import ShardPlan, describe_plan, plan_shards
from ..runtime.tuning import decode_kernels_planned, encode_kernels_planned
from .shared import add_engine_options, dtype_name, frame_size, latent_size, positive


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    info = commands.add_parser("info", help="tell what a checkpoint is and what decoding and encoding with it take")
    info.add_argument("vae", type=Path, metavar="FILE", help="the Wan VAE's safetensors file")
    info.add_argument("--size", type=frame_size, default=(1280, 720), help="of the frames; default: 1280x720")
    info.add_argument("--frames", type=positive, default=81, help="default: %(default)s")
    add_engine_options(info)
    info.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    checkpoint = describe_checkpoint(options.vae)
    architecture = checkpoint.architecture
    devices = parse_devices(options.devices)
    dtype = parse_dtype(options.dtype, devices[0])
    if architecture.images_only:
        options.frames = 1
    rows, columns = latent_size(architecture, options.size)
    plan = plan_shards(rows, columns, len(devices))
    free = min(free_memory(device) for device in devices)
    of_size = f"{options.size[0]}x{options.size[1]}"
    frames = architecture.frame_count(architecture.latent_frames(options.frames))
    host = frames * options.size[0] * options.size[1] * architecture.output_channels * 4
    lines = {
        "file": options.vae,
        "architecture": f"{architecture.name}, width {architecture.width}, {architecture.z_dim} latent channels, "
        f"{architecture.output_channels} colours",
        "decoder": f"{checkpoint.parameters / 1e6:.1f} million parameters, {dtype_name(checkpoint.dtype)}, "
        f"{'with' if checkpoint.encoder else 'without'} encoder",
        "encoder": "none: it can only decode",
        "key layout": checkpoint.layout,
        "devices": f"{', '.join(map(str, devices))} in {dtype_name(dtype)}, {gibibytes(free)} free",
        "shards": describe_plan(plan, devices),
        f"decode {of_size}, {frames} frames": _decode_needs(architecture, plan, devices, dtype, free, options),
    }
    if checkpoint.encoder:
        parameters = encoder_parameter_count(architecture)
        lines["encoder"] = f"{parameters / 1e6:.1f} million parameters, width {architecture.encoder_width}"
        label = f"encode {of_size}, {architecture.encoded_frames(options.frames)} frames"
        encoded = plan_shards(*latent_size(architecture, options.size, encoded=True), len(devices))
        lines[label] = _encode_needs(architecture, encoded, devices, dtype, free, options)
    lines["frames on host"] = gibibytes(host)
    longest = max(len(label) for label in lines) + 1
    for label, text in lines.items():
        print(f"{label + ':':{longest}} {text}")


def _decode_needs(
    architecture: Architecture,
    plan: ShardPlan,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    free: int,
    options: argparse.Namespace,
) -> str:
    """What a decode takes on the device with the most rows."""
    # A shard holds its neighbours' rows too.
    tallest = plan.tallest if plan.shards == 1 else min(plan.tallest + 2, plan.rows)
    size = (1, architecture.latent_frames(options.frames), tallest, plan.columns)
    given: dict[str, Any] = {"dtype": dtype, "kernels": decode_kernels_planned(architecture, devices, dtype)}
    chunk = options.chunk
    if chunk == "auto":
        chunk = largest_chunk(architecture, size, free=free, device_type=devices[0].type, **given)
    return _needs(lambda chunk: decode_memory(architecture, size, chunk=chunk, **given), chunk)


def _encode_needs(
    architecture: Architecture,
    plan: ShardPlan,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    free: int,
    options: argparse.Namespace,
) -> str:
    """The same of an encode, as runtime/shard.py and runtime/encode_run.py plan it."""
    size = (plan.tallest + (plan.shards > 1), plan.columns)  # a row of the lower neighbour
    frames = architecture.encoded_frames(options.frames)
    given: dict[str, Any] = {"dtype": dtype, "kernels": encode_kernels_planned(architecture, devices, dtype)}
    chunk = options.chunk
    if chunk == "auto":
        chunk = largest_encode_chunk(architecture, size, frames=frames, free=free, device_type=devices[0].type, **given)
    chunk = min(chunk, max(1, frames - 1))
    return _needs(lambda chunk: encode_memory(architecture, size, chunk=chunk, image=frames == 1, **given), chunk)


def _needs(memory: Callable[[int], DeviceMemory], chunk: int) -> str:
    needed, least = memory(chunk), memory(1)
    return (
        f"{gibibytes(needed.total)} a device with chunk {chunk} (weights {gibibytes(needed.weights)}, feature caches "
        f"{gibibytes(needed.caches)}, step {gibibytes(needed.step)}); {gibibytes(least.total)} with chunk 1"
    )
