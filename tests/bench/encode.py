"""Encode times and memory over one GPU or several, beside diffusers', in one run.

    python -m tests.bench.encode [--family wan2.1] [--sizes 1280x720,832x480] [--devices 1,2,4] [--frames 81]

Random weights at the published widths, bf16. Prints rows for BENCHMARKS.md: seconds with pixels and latents on the
devices (and the share of the matrix products' ceiling, measured in the same run), seconds from the host's float32
pixels to latents on the host, the same of one picture and equal frames behind it, and peak memory by chunk.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from tests.bench.decode import CONFIGURATIONS, measured, oracle
from wan_vae_parallel import Architecture, load_vae
from wan_vae_parallel.files.checkpoint import read_checkpoint
from wan_vae_parallel.memory import encode_memory, largest_encode_chunk
from wan_vae_parallel.model.encoder import WanEncoder
from wan_vae_parallel.parallel.coordination import Coordinator
from wan_vae_parallel.parallel.peer_memory import open_peer_memory
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.runtime.pieces import blocks, pieces
from wan_vae_parallel.runtime.shard import ShardEncoder

_PAUSE_SECONDS = 0.3
BF16 = torch.bfloat16


def pixels(frames, height, width, device="cpu"):
    return torch.rand((frames, height, width, 3), generator=torch.Generator(device).manual_seed(1), device=device)


def work(architecture: Architecture, frames: int, height: int, width: int) -> float:
    """TFLOP of an encode, by running its layers on the meta device."""
    flops = 0
    with torch.device("meta"):
        encoder = WanEncoder(architecture)
    latent_frames = 1 + (frames - 1) // architecture.temporal_ratio
    positions = height * width / architecture.spatial_ratio**2
    stages = architecture.down_stages
    scales = {}
    for name, module in encoder.named_modules():
        if hasattr(module, "kind"):
            scales[name] = module
    for name, module in scales.items():
        kind = module.kind
        scale = module.key.scale // (2 if kind.op == "down_conv" else 1)
        of_stage = (
            next(stage for stage in stages if stage.scale == module.key.scale) if "time_conv" not in name else None
        )
        count = frames if of_stage is None or of_stage.time_scale == architecture.temporal_ratio else latent_frames
        if of_stage is not None and 1 < of_stage.time_scale < architecture.temporal_ratio:
            count = 1 + (frames - 1) // 2
        if kind.time_stride == 2:
            count = 1 + (frames - 1) // 2 if module.key.scale == 2 else latent_frames
        flops += kind.flops * positions * scale**2 * count
    last = stages[-1].channels
    attention = 4 * positions**2 * last + 8 * positions * last**2
    return (flops + attention * latent_frames) / 1e12


def ceiling() -> float:
    """TFLOP/s of a matrix product of 8192 in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    seconds, _ = measured(lambda: [a @ b for _ in range(20)], 3)
    return 20 * 2 * 8192**3 / seconds / 1e12


def on_device_rank(rank, world, store, weights, family, shape, repeats, results):
    """One rank's part of encodes whose pixels and latents stay where they are."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    torch.set_num_threads(4)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world, device_id=device)
    architecture = Architecture.published(family)
    frames, height, width = shape
    plan = plan_shards(height // architecture.spatial_ratio, width // architecture.spatial_ratio, world)
    encoder = ShardEncoder(architecture, read_checkpoint(weights).encoder, device, BF16)
    group = dist.group.WORLD
    coordinator = Coordinator(group)
    encoder.tune(coordinator)
    peer_memory = open_peer_memory(group, device, coordinator) if world > 1 else None
    chunk = min(coordinator.exchange(encoder.room(plan, rank, frames, 0)))
    video = pixels(frames, height, width, device)

    def encode():
        counted = pieces(blocks(video, chunk), ahead=True)  # as `encode` does with a tensor
        for _ in encoder.steps(counted, plan, group, chunk, peer_memory, image=frames == 1):
            pass
        torch.cuda.synchronize()

    encode()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        time.sleep(_PAUSE_SECONDS)
        dist.barrier()
        started = time.perf_counter()
        encode()
        seconds.append(time.perf_counter() - started)
    results.put((statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30, chunk))
    dist.destroy_process_group()


def on_devices(world, *arguments):
    """Seconds of the slowest rank, the largest peak in GiB, and the chunk."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_device_rank, (world, f"{folder}/store", *arguments, results), nprocs=world)
    ranks = [results.get() for _ in range(world)]
    return max(r[0] for r in ranks), max(r[1] for r in ranks), ranks[0][2]


def from_host(vae, video, repeats):
    """Seconds of the first encode, and the median of those behind it."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        vae.encode(video)
        seconds.append(time.perf_counter() - started)
        time.sleep(_PAUSE_SECONDS)
    return seconds[0], statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(CONFIGURATIONS), default="wan2.1")
    parser.add_argument("--sizes", default="1280x720,832x480")
    parser.add_argument("--devices", default="1,2,4")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-diffusers", action="store_true")
    options = parser.parse_args()

    architecture = Architecture.published(options.family)
    most = ceiling()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, matrix products {most:.0f} TFLOP/s")
    theirs = oracle(options.family)
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/vae.safetensors"
        save_file(theirs.state_dict(), weights)
        for size in options.sizes.split(","):
            width, height = map(int, size.split("x"))
            shape = options.frames, height, width
            flop = work(architecture, *shape)
            print(f"# {options.family} {size}, {options.frames} frames, bf16: {flop:.0f} TFLOP")
            video = pixels(*shape)
            picture = torch.full_like(video, 0.5)
            picture[0] = video[0]
            if not options.no_diffusers:
                on_gpu = theirs.to("cuda", BF16)
                given = (video * 2 - 1).permute(3, 0, 1, 2)[None].to("cuda", BF16)
                with torch.inference_mode():
                    seconds, peak = measured(lambda: on_gpu.encode(given), options.repeats)  # noqa: B023 (called at once)
                print(f"| {size} | diffusers | {seconds:.3f} s on the device | {peak:.2f} GiB |", flush=True)
                del given, on_gpu
                theirs.to("cpu")
                torch.cuda.empty_cache()
            first = None
            for world in map(int, options.devices.split(",")):
                seconds, peak, chunk = on_devices(world, weights, options.family, shape, options.repeats)
                first = first or seconds
                names = ",".join(f"cuda:{i}" for i in range(world))
                with load_vae(weights, devices=names, dtype="bfloat16") as vae:
                    cold, host = from_host(vae, video, options.repeats)
                    _, still = from_host(vae, picture, options.repeats)
                share = flop / seconds / most / world
                print(
                    f"| {size} | {world} | {seconds:.3f} s ({first / seconds:.2f}x, {share:.0%} of the ceiling) | "
                    f"{host:.3f} s from and to the host ({host / seconds:.2f} of on-device) | "
                    f"{still:.3f} s a picture and equal frames | {cold:.1f} s cold | {peak:.2f} GiB | chunk {chunk} |",
                    flush=True,
                )
            given = {"dtype": BF16, "kernels": True}
            latent = height // architecture.spatial_ratio, width // architecture.spatial_ratio
            default = largest_encode_chunk(
                architecture, latent, frames=options.frames, free=torch.cuda.mem_get_info()[0], **given
            )
            for chunk in dict.fromkeys((default, 1, 4, 8)):
                with load_vae(weights, devices="cuda:0", dtype="bfloat16", chunk=chunk) as vae:
                    vae.encode(video[:5])
                    seconds, peak = measured(lambda: vae.encode(video), options.repeats)  # noqa: B023 (called at once)
                planned = encode_memory(architecture, latent, chunk=chunk, image=False, **given).total
                print(
                    f"| {size} | chunk {chunk}{' (default)' if chunk == default else ''} | {seconds:.3f} s from and to "
                    f"the host | {peak:.2f} GiB, planned {planned / 2**30:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
