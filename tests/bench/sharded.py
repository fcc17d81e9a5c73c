"""Decode times over several GPUs, in one run: frames left on the devices, frames on the host, cold start, memory.

    python -m tests.bench.sharded [--sizes 1280x720,832x480] [--devices 1,2,4] [--latent-frames 21] [--profile]

Random weights of Wan 2.1 at the published width, bf16. Prints rows for BENCHMARKS.md.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from tests.bench.decode import oracle
from wan_vae_parallel import Architecture, load_vae
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict, read_checkpoint
from wan_vae_parallel.memory import largest_chunk
from wan_vae_parallel.parallel.coordination import Coordinator
from wan_vae_parallel.parallel.edges import ShardEdges
from wan_vae_parallel.parallel.peer_memory import open_peer_memory
from wan_vae_parallel.parallel.plan import plan_shards
from wan_vae_parallel.runtime.local import LocalDecoder

_PAUSE_SECONDS = 0.3
ARCHITECTURE = Architecture.published("wan2.1")


def on_device_rank(rank, world, store, weights, shape, repeats, profile, results):
    """One rank's part of decodes whose frames stay where they are."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    torch.set_num_threads(4)
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world, device_id=device)
    _, frames, rows, columns = shape
    plan = plan_shards(rows, columns, world)
    torch.manual_seed(0)
    latents = torch.randn(1, ARCHITECTURE.z_dim, frames, rows, columns)
    if plan.transposed:
        latents = latents.transpose(-1, -2)
    latents = latents[:, :, :, plan.bounds[rank] : plan.bounds[rank + 1]].to(device)
    decoder = LocalDecoder(ARCHITECTURE, read_checkpoint(weights).decoder, device=device, dtype=torch.bfloat16)
    group = dist.group.WORLD
    coordinator = Coordinator(group)
    decoder.tune(coordinator)
    height = plan.tallest if world == 1 else min(plan.tallest + 2, plan.rows)
    chunk = largest_chunk(
        ARCHITECTURE,
        (1, frames, height, plan.columns),
        dtype=torch.bfloat16,
        free=torch.cuda.mem_get_info()[0],
        kernels=decoder.kernels,
    )
    edges = ShardEdges(plan, group, open_peer_memory(group, device, coordinator)) if world > 1 else None

    def decode():
        for _ in decoder.stream(latents, chunk, edges, transposed=plan.transposed):
            pass
        torch.cuda.synchronize()

    decode()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        time.sleep(_PAUSE_SECONDS)  # as between decodes to the host: a GPU that rested is faster
        dist.barrier()
        started = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - started)
    if profile:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            decode()
        if rank == 0:
            averages = profiled.key_averages()
            print(averages.table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70))
            print(averages.table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=70))
    peak = torch.cuda.max_memory_allocated() / 2**30
    results.put((statistics.median(seconds), peak, chunk))
    dist.destroy_process_group()


def on_devices(world, weights, shape, repeats, profile):
    """Seconds of the slowest rank, the largest peak in GiB, and the chunk."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", weights, shape, repeats, profile, results)
        multiprocessing.spawn(on_device_rank, arguments, nprocs=world)
    ranks = [results.get() for _ in range(world)]
    return max(r[0] for r in ranks), max(r[1] for r in ranks), ranks[0][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1280x720,832x480")
    parser.add_argument("--devices", default="1,2,4")
    parser.add_argument("--latent-frames", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}")
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/vae.safetensors"
        save_file(dict(checkpoint_from_state_dict(oracle("wan2.1").state_dict(), source="diffusers").decoder), weights)
        for size in options.sizes.split(","):
            width, height = map(int, size.split("x"))
            shape = (1, options.latent_frames, height // 8, width // 8)
            first = None
            for world in map(int, options.devices.split(",")):
                device_seconds, peak, chunk = on_devices(world, weights, shape, options.repeats, options.profile)
                torch.manual_seed(0)
                latents = torch.randn(1, 16, *shape[1:])
                names = ",".join(f"cuda:{i}" for i in range(world))
                with load_vae(weights, devices=names, dtype="bfloat16") as vae:
                    started = time.perf_counter()
                    vae.decode(latents)
                    cold = time.perf_counter() - started
                    while vae.worked_on != vae.devices:  # the workers still start
                        vae.decode(latents)
                    seconds = []
                    for _ in range(options.repeats):
                        started = time.perf_counter()
                        frames = vae.decode(latents)
                        seconds.append(time.perf_counter() - started)
                        # As long as anyone may look at frames. The workers then take back the memory of those before.
                        del frames
                        time.sleep(_PAUSE_SECONDS)
                host = statistics.median(seconds)
                first = first or (device_seconds, host)
                print(
                    f"| {size} | {world} | {device_seconds:.3f} s ({first[0] / device_seconds:.2f}x) | {host:.3f} s "
                    f"({first[1] / host:.2f}x, {host / device_seconds:.2f} of on-device) | {cold:.1f} s cold | "
                    f"{peak:.2f} GiB | chunk {chunk} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
