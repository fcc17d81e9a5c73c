"""The shell's way in: ``demo``, ``decode``, ``encode``, ``info`` and ``bench``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import bench
from .architecture import Architecture
from .demo import demo_latents, save_demo_checkpoint
from .devices import DTYPES, parse_devices, parse_dtype
from .errors import ArgumentError, CheckpointError, OutOfMemoryError, OutputError, WanVAEError
from .files.checkpoint import describe_checkpoint
from .files.frames_in import is_tensor, open_frames, read_frames, resized
from .files.latents import check_latent_output, check_latents, read_latents, save_latents
from .files.pictures import comparison_sheet, contact_sheet
from .files.video import check_output, open_output, output_files
from .files.whole import check_writable, replacing
from .memory import (
    DeviceMemory,
    decode_memory,
    encode_memory,
    encoder_parameter_count,
    free_memory,
    gibibytes,
    largest_chunk,
    largest_encode_chunk,
)
from .ops.dispatch import kernels_expected
from .parallel.plan import ShardPlan, describe_plan, plan_shards
from .torchrun import launched, torchrun_group
from .vae import VAE, load_vae

# What Wan's models were trained at.
_FPS = {"wan2.1": 16.0, "wan2.2": 24.0}
_BAR = 32
# The demo encodes no more of its frames, whatever their number: without a GPU it takes its time.
_ROUND_TRIP_FRAMES = 13

# A second signal within so many seconds is an impatient user's; it must not end the cleaning up that the first began.
_IMPATIENT_SECONDS = 5.0


class _Signals:
    """SIGTERM and Ctrl-C as a KeyboardInterrupt, which waits while files are being made, written or closed."""

    def __init__(self) -> None:
        self.stopped = False
        self._raised: float | None = None
        self._depth = 0

    def listen(self) -> None:
        """Takes the signals over, in the main thread; others never get them."""
        self.stopped, self._raised = False, None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)

    def end_if_stopped(self) -> None:
        """Raises what was held back, or what Python dropped: it ignores errors while it forks, as for ffmpeg."""
        if self.stopped:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it signals wait."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.end_if_stopped()

    def _stop(self, *_: object) -> None:
        self.stopped = True
        now = time.monotonic()
        if not self._depth and (self._raised is None or now > self._raised + _IMPATIENT_SECONDS):
            self._raised = now
            raise KeyboardInterrupt


_signals = _Signals()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    options = _parser().parse_args(arguments)
    # So that a polite kill unwinds too, and takes half-written files along.
    _signals.listen()
    try:
        if launched() and options.run not in (_decode, _encode):
            raise ArgumentError("torchrun's processes decode or encode together; run demo, info and bench without it")
        options.run(options)
    except WanVAEError as error:
        if _signals.stopped:  # ffmpeg may hear of a Ctrl-C first
            return _say_stopped()
        # Without what only helps in Python.
        print(f"error: {error.text if isinstance(error, OutOfMemoryError) else error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Nobody reads what is printed any more; files are whole by then. Python itself would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _say_stopped()
    return 0


def _say_stopped() -> int:
    print("stopped; nothing was left half-written", file=sys.stderr)
    return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae-parallel", description="Decode and encode Wan videos exactly: no tiles, no seams, any length."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make a small VAE and an animation's latents, decode, encode and show them")
    demo.add_argument("-o", "--output", type=Path, default=Path("wan-vae-parallel-demo"), help="folder to write to")
    demo.add_argument("--architecture", choices=sorted(_FPS), default="wan2.1", help="default: %(default)s")
    demo.add_argument("--width", type=int, default=16, help="base width of the VAE; default: %(default)s")
    demo.add_argument("--size", type=_size, default=(448, 256), help="of the frames, as 448x256")
    demo.add_argument("--latent-frames", type=_positive, default=9, help="N make 4 * (N - 1) + 1 frames")
    _add_engine_options(demo)
    demo.set_defaults(run=_demo)

    decode = commands.add_parser("decode", help="decode latents to a video, pictures or a tensor")
    decode.add_argument("latents", type=Path, help="ComfyUI's .latent, or a safetensors file with one 5-D tensor")
    decode.add_argument("--vae", type=Path, required=True, help="the Wan VAE's safetensors file")
    decode.add_argument("-o", "--output", type=Path, required=True, help="out.mp4, out.safetensors or frames/%%04d.png")
    decode.add_argument("--fps", type=_rate, help="of the video; default: 16 for Wan 2.1, 24 for Wan 2.2")
    decode.add_argument(
        "--normalized", action="store_true", help="the latents are as the diffusion model made them (WanVideoWrapper)"
    )
    _add_engine_options(decode)
    decode.set_defaults(run=_decode)

    encode = commands.add_parser("encode", help="encode a video, pictures or a tensor to latents")
    encode.add_argument(
        "frames",
        type=Path,
        metavar="VIDEO|PICTURES|SAFETENSORS",
        help="a video; frames/%%04d.png, a folder of pictures or one picture; or a tensor frames [B, T, H, W, C]",
    )
    encode.add_argument("--vae", type=Path, required=True, help="the Wan VAE's safetensors file, with its encoder")
    encode.add_argument("-o", "--output", type=Path, required=True, help="out.latent (ComfyUI's) or out.safetensors")
    encode.add_argument("--size", type=_size, help="stretch frames to it, bicubic, as 832x480; default: as they are")
    encode.add_argument("--frames", type=_positive, dest="most", help="the first so many; default: all")
    encode.add_argument(
        "--normalized", action="store_true", help="latents as the diffusion model wants them (WanVideoWrapper)"
    )
    _add_engine_options(encode, of="frames (of the video, at full resolution)")
    encode.set_defaults(run=_encode)

    measure = commands.add_parser("bench", help="measure decodes and encodes here: a table, a JSON file and a plot")
    measure.add_argument("--vae", type=Path, help="a Wan VAE's file; default: random weights")
    measure.add_argument(
        "--architecture", choices=sorted(_FPS), default="wan2.1", help="without --vae; default: %(default)s"
    )
    measure.add_argument(
        "--direction", choices=[*bench.DIRECTIONS, "both"], default="both", help="default: %(default)s"
    )
    measure.add_argument("--width", type=_positive, help="of random weights; default: the published one")
    measure.add_argument("--sizes", type=_sizes, default="1280x720,832x480", help="of the frames; default: %(default)s")
    measure.add_argument("--frames", type=_positive, default=81, help="default: %(default)s")
    measure.add_argument("--devices", default="auto", help="1, 2, 4... and all of them are measured; default: auto")
    measure.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: %(default)s")
    measure.add_argument(
        "--chunk", type=_chunk, default="auto", help="ours: (latent) frames at once; default: %(default)s"
    )
    measure.add_argument("--repeats", type=_positive, default=3, help="calls after a first one; default: %(default)s")
    measure.add_argument("-o", "--output", type=Path, default=Path("wan-vae-parallel-bench"), help="folder to write to")
    measure.set_defaults(run=_bench)

    info = commands.add_parser("info", help="tell what a checkpoint is and what decoding and encoding with it take")
    info.add_argument("vae", type=Path, metavar="FILE", help="the Wan VAE's safetensors file")
    info.add_argument("--size", type=_size, default=(1280, 720), help="of the frames; default: 1280x720")
    info.add_argument("--frames", type=_positive, default=81, help="default: %(default)s")
    _add_engine_options(info)
    info.set_defaults(run=_info)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser, of: str = "latent frames") -> None:
    parser.add_argument(
        "--devices", default="auto", help="auto, cpu, cuda:0 or cuda:0,cuda:1,...; default: %(default)s"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: %(default)s")
    parser.add_argument(
        "--chunk", type=_chunk, default="auto", help=f"{of} at once: memory against speed; default: auto"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        rate = 0.0
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a frame rate such as 16, 23.976 or 30000/1001")
    return rate


def _chunk(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size as 1280x720")
    return int(match[1]), int(match[2])


def _sizes(text: str) -> list[tuple[int, int]]:
    return [_size(part) for part in text.split(",")]


def _latent_size(architecture: Architecture, size: tuple[int, int], *, encoded: bool = False) -> tuple[int, int]:
    """Latent rows and columns of frames of ``size`` (width, height), which are decoded or ``encoded``."""
    ratio = architecture.encode_ratio if encoded else architecture.spatial_ratio
    if size[0] % ratio or size[1] % ratio:
        raise ArgumentError(
            f"frames of {architecture.name} have a multiple of {ratio} pixels a side, not {size[0]}x{size[1]}; "
            f"take {max(1, round(size[0] / ratio)) * ratio}x{max(1, round(size[1] / ratio)) * ratio}"
        )
    return size[1] // ratio, size[0] // ratio


def _demo(options: argparse.Namespace) -> None:
    folder: Path = options.output
    described = Architecture.published(options.architecture, width=options.width)
    rows, columns = _latent_size(described, options.size)
    # The latents are drawn at eight times their size, and decode to frames of the size asked for.
    pixels, frame_count = 3 * options.size[0] * options.size[1], described.frame_count(options.latent_frames)
    needed = 4 * (frame_count * (pixels + rows * columns) + min(frame_count, _ROUND_TRIP_FRAMES) * pixels)
    if needed > free_memory(torch.device("cpu")):
        raise OutOfMemoryError(
            f"the demo's frames would take {gibibytes(needed)}, more than is free; ask for fewer or smaller ones"
        )
    _make_folder(folder)
    checkpoint, latent_file = folder / "demo_vae.safetensors", folder / "demo.latent"
    with _signals.held():
        save_demo_checkpoint(checkpoint, options.architecture, options.width)
    latents = demo_latents(described, frames=options.latent_frames, rows=rows, columns=columns)
    with _signals.held():
        save_latents(latent_file, latents)
    with load_vae(checkpoint, devices=options.devices, dtype=options.dtype, chunk=options.chunk) as vae:
        frames = _with_bar(vae.decode, latents)
        beginning = frames[:, :_ROUND_TRIP_FRAMES]
        again = _with_bar(vae.decode, vae.encode(beginning))
    video, sheet, round_trip = folder / "demo.mp4", folder / "demo.png", folder / "demo_roundtrip.png"
    with _signals.held():
        with open_output(video, shape=frames.shape, fps=_FPS[options.architecture]) as write:
            write(frames)
        with replacing(sheet) as temporary:
            contact_sheet(frames[0]).save(temporary)
        with replacing(round_trip) as temporary:
            comparison_sheet(beginning[0], again[0]).save(temporary)
    print(f"video:         {video}")
    print(f"contact sheet: {sheet}")
    print(f"round trip:    {round_trip}: the first frames, and below them the same encoded and decoded again")
    print(f"VAE:           {checkpoint}")
    print(f"latents:       {latent_file}")


def _with_bar(decode: Callable[..., torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """What ``decode`` makes of latents, with a bar."""
    bar = _Progress()
    frames = decode(latents, on_chunk=lambda done, total, _: bar.show(done, total))
    bar.close()
    return frames


def _decode(options: argparse.Namespace) -> None:
    with torchrun_group(options.devices) if launched() else contextlib.nullcontext() as group:
        latents = read_latents(options.latents)
        first = group is None or dist.get_rank(group) == 0
        if not first:
            logging.getLogger().setLevel(logging.WARNING)
        with load_vae(
            options.vae, devices=options.devices, dtype=options.dtype, chunk=options.chunk, group=group
        ) as vae:
            if first:
                _decode_to_file(vae, latents, options)
            else:
                for _ in vae.decode_stream(latents, normalized=options.normalized):
                    pass


def _decode_to_file(vae: VAE, latents: torch.Tensor, options: argparse.Namespace) -> None:
    shape = vae.output_shape(check_latents(latents, vae.architecture).shape)
    check_output(options.output, shape)
    bar, done = _Progress(), 0
    fps = options.fps or _FPS.get(vae.architecture.family, _FPS["wan2.1"])
    with contextlib.ExitStack() as output:
        with _signals.held():
            write = output.enter_context(open_output(options.output, shape=shape, fps=fps))
        for frames in vae.decode_stream(latents, normalized=options.normalized, on_wait=_signals.end_if_stopped):
            with _signals.held():
                write(frames)
            done += frames.shape[1]
            bar.show(done, shape[1])
        with _signals.held():
            output.close()
    bar.close()
    files = output_files(options.output, shape)
    print(f"written: {files[0]}" + (f" to {files[-1]}" if len(files) > 1 else ""))


def _encode(options: argparse.Namespace) -> None:
    with torchrun_group(options.devices) if launched() else contextlib.nullcontext() as group:
        first = group is None or dist.get_rank(group) == 0
        if first:
            check_latent_output(options.output)
        else:
            logging.getLogger().setLevel(logging.WARNING)
        with load_vae(
            options.vae, devices=options.devices, dtype=options.dtype, chunk=options.chunk, group=group
        ) as vae:
            if options.size:
                _latent_size(vae.architecture, options.size, encoded=True)
            if is_tensor(options.frames):
                latents, taken = _encode_tensor(vae, options, shown=first)
            else:
                latents, taken = _encode_stream(vae, options, shown=first)
            if first:
                with _signals.held():
                    save_latents(options.output, latents)
                left = taken - vae.architecture.encoded_frames(taken)
                print(
                    f"written: {options.output}, {latents.shape[2]} latent frames of {taken} frames"
                    + (f", of which the last {left} make no whole latent frame" if left else "")
                )


def _encode_tensor(vae: VAE, options: argparse.Namespace, *, shown: bool) -> tuple[torch.Tensor, int]:
    """Latents of frames that are all in memory, and how many frames a video has."""
    frames = read_frames(options.frames, colours=vae.architecture.input_channels)
    frames = (frames if frames.dim() == 5 else frames[None])[:, : options.most]
    if options.size:
        frames = resized(frames, options.size)
    bar, count = _Progress(shown=shown), vae.architecture.frame_count

    def show(done: int, total: int, _: torch.Tensor) -> None:
        _signals.end_if_stopped()
        bar.show(count(done), count(total))

    latents = vae.encode(frames, normalized=options.normalized, on_chunk=show)
    bar.close()
    return latents, frames.shape[1]


def _encode_stream(vae: VAE, options: argparse.Namespace, *, shown: bool) -> tuple[torch.Tensor, int]:
    """The same of frames that are read one after the other, of which only a step's are ever in memory."""
    bar, taken, made = _Progress(shown=shown), 0, 0
    parts = []
    with contextlib.ExitStack() as stack:
        with _signals.held():
            source = stack.enter_context(
                open_frames(
                    options.frames,
                    colours=vae.architecture.input_channels,
                    most=options.most,
                    any_size=options.size is not None,
                )
            )

        def frames() -> Iterator[torch.Tensor]:
            nonlocal taken
            for frame in source:
                _signals.end_if_stopped()
                taken += 1
                yield resized(frame, options.size) if options.size else frame

        for latents in vae.encode_stream(frames(), normalized=options.normalized):
            parts.append(latents)
            made += latents.shape[2]
            bar.show(vae.architecture.frame_count(made), source.expected)
        with _signals.held():
            stack.close()
    bar.close()
    return torch.cat(parts, dim=2) if parts else torch.empty(0), taken


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"{folder} can't be written to ({error}); choose another folder with -o") from error


def _bench(options: argparse.Namespace) -> None:
    if options.vae:
        architecture, weights = bench.weights_of(options.vae)
    else:
        architecture = Architecture.published(options.architecture, width=options.width)
        weights = bench.random_weights(architecture)
    for size in options.sizes:
        _latent_size(architecture, size)
    directions = bench.DIRECTIONS if options.direction == "both" else (options.direction,)
    if architecture.encoder_width is None and "encode" in directions:
        if options.direction == "encode":
            raise CheckpointError(f"{options.vae} has no encoder; take the whole VAE's file, or measure decodes")
        directions = ("decode",)
        print(f"{options.vae} has no encoder; only decodes are measured", file=sys.stderr)
    devices = parse_devices(options.devices)
    dtype = parse_dtype(options.dtype, devices[0])
    folder: Path = options.output
    _make_folder(folder)
    figures, plot = folder / "bench.json", folder / "bench.png"
    for path in (figures, plot):
        check_writable(path)
    no_plot = bench.why_no_plot()
    if no_plot:
        print(no_plot, file=sys.stderr)
    facts = bench.environment(devices)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[bench.Row] = []
    settings = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "architecture": str(architecture),
        "dtype": _name(dtype),
        "repeats": options.repeats,
        "chunk": options.chunk,
        "directions": directions,
    }
    for row in bench.measure(
        architecture=architecture,
        weights=weights,
        sizes=options.sizes,
        latent_frames=1 if architecture.images_only else architecture.latent_frames(options.frames),
        devices=devices,
        dtype=dtype,
        repeats=options.repeats,
        chunk=options.chunk,
        directions=directions,
    ):
        if not rows:
            plot.unlink(missing_ok=True)  # an older run's would lie beside this one's figures
        rows.append(row)
        # After each, so that what comes to a bad end still has figures.
        with _signals.held():
            bench.save_json(figures, rows, facts, settings)
        result = row.failed if row.seconds is None else f"{row.seconds:.3f} s"
        print(f"{row.direction} {row.size}, {row.what} on {', '.join(row.devices)}: {result}", file=sys.stderr)
    print(bench.table(rows))
    print(f"figures: {figures}")
    if all(row.seconds is None for row in rows):
        raise WanVAEError(f"nothing could be measured; {figures} says why for each row")
    if not no_plot:
        title = f"{architecture.name}, {rows[0].frames} frames, {_name(dtype)}, {facts.get('gpu', 'CPU')}"
        with _signals.held():
            bench.save_plot(plot, rows, title)
        print(f"plot:    {plot}")


def _info(options: argparse.Namespace) -> None:
    checkpoint = describe_checkpoint(options.vae)
    architecture = checkpoint.architecture
    if architecture.images_only:
        options.frames = 1
    devices = parse_devices(options.devices)
    dtype = parse_dtype(options.dtype, devices[0])
    rows, columns = _latent_size(architecture, options.size)
    plan = plan_shards(rows, columns, len(devices))
    free = min(free_memory(device) for device in devices)
    of_size = f"{options.size[0]}x{options.size[1]}"
    frames = architecture.frame_count(architecture.latent_frames(options.frames))
    host = frames * options.size[0] * options.size[1] * architecture.output_channels * 4
    lines = {
        "file": options.vae,
        "architecture": f"{architecture.name}, width {architecture.width}, {architecture.z_dim} latent channels, "
        f"{architecture.output_channels} colours",
        "decoder": f"{checkpoint.parameters / 1e6:.1f} million parameters, {_name(checkpoint.dtype)}, "
        f"{'with' if checkpoint.encoder else 'without'} encoder",
        "encoder": "none: it can only decode",
        "key layout": checkpoint.layout,
        "devices": f"{', '.join(map(str, devices))} in {_name(dtype)}, {gibibytes(free)} free",
        "shards": describe_plan(plan, devices),
        f"decode {of_size}, {frames} frames": _decode_needs(architecture, plan, devices, dtype, free, options),
    }
    if checkpoint.encoder:
        parameters = encoder_parameter_count(architecture)
        lines["encoder"] = f"{parameters / 1e6:.1f} million parameters, width {architecture.encoder_width}"
        label = f"encode {of_size}, {architecture.encoded_frames(options.frames)} frames"
        encoded = plan_shards(*_latent_size(architecture, options.size, encoded=True), len(devices))
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
    given: dict[str, Any] = {"dtype": dtype, "kernels": kernels_expected(devices[0], dtype)}
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
    given: dict[str, Any] = {"dtype": dtype, "kernels": kernels_expected(devices[0], dtype)}
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Progress:
    """A bar on a terminal, nothing in a pipe."""

    def __init__(self, *, shown: bool = True) -> None:
        # There is none in a process whose parent closed it.
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int, total: int | None) -> None:
        """Frames that are done, of so many if that is known; a video's file may be a few off."""
        if not self._shown:
            return
        total = None if total is None else max(done, total)
        filled = _BAR * done // total if total else 0
        count = f"{done}/{total}" if total else str(done)
        print(f"\r[{'#' * filled}{' ' * (_BAR - filled)}] {count} frames", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print(file=sys.stderr)
