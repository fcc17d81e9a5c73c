"""Decode times and memory beside diffusers', in one run on one GPU.

    python -m tests.bench.decode [--family wan2.1] [--size 1280x720] [--latent-frames 21] [--no-diffusers]

Random weights at the published widths, bf16. Prints rows for BENCHMARKS.md: seconds with the frames left on the
device, seconds to the host's float32 tensor, peak memory allocated.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from wan_vae_parallel import Architecture, vae_from_state_dict
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.memory import decode_memory, largest_chunk

CONFIGURATIONS = {
    "wan2.1": {},
    "wan2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


def oracle(family: str) -> Any:  # an AutoencoderKLWan, whose base class has no types
    """Diffusers' model with seeded random weights whose activations neither grow nor vanish."""
    torch.manual_seed(0)
    model: Any = AutoencoderKLWan(**CONFIGURATIONS[family])
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter[0].numel() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def measured(run, repeats: int) -> tuple[float, float]:
    """Median seconds and peak GiB of ``run``, after one warm-up."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(CONFIGURATIONS), default="wan2.1")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--latent-frames", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-diffusers", action="store_true")
    options = parser.parse_args()

    architecture = Architecture.published(options.family)
    width, height = map(int, options.size.split("x"))
    rows, columns = height // architecture.spatial_ratio, width // architecture.spatial_ratio
    shape = (1, options.latent_frames, rows, columns)
    latents = torch.randn(1, architecture.z_dim, *shape[1:], device="cuda", dtype=torch.bfloat16)
    theirs = oracle(options.family).to("cuda", torch.bfloat16)
    checkpoint = checkpoint_from_state_dict(theirs.state_dict(), source="diffusers")
    weights = {key: tensor.cpu() for key, tensor in checkpoint.decoder.items()}
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"# {options.family} {options.size}, {architecture.frame_count(options.latent_frames)} frames, bf16")

    if not options.no_diffusers:
        with torch.inference_mode():
            seconds, peak = measured(functools.partial(theirs.decode, latents, return_dict=False), options.repeats)
        print(f"| diffusers | {seconds:.3f} s on the device | {peak:.2f} GiB |", flush=True)
    del theirs, checkpoint
    torch.cuda.empty_cache()

    given = {"dtype": torch.bfloat16, "kernels": True}
    default = largest_chunk(architecture, shape, free=torch.cuda.mem_get_info()[0], **given)
    for chunk in dict.fromkeys((default, 1, 2)):
        with vae_from_state_dict(weights, devices="cuda:0", dtype="bfloat16", chunk=chunk) as vae:
            vae.decode(latents[:, :, :2])
            stream = vae._engine.decoder().stream

            def on_device(stream=stream, chunk=chunk):
                for _ in stream(latents, chunk):
                    pass

            seconds, peak = measured(on_device, options.repeats)
            host, _ = measured(lambda vae=vae: vae.decode(latents), options.repeats)
        planned = decode_memory(architecture, shape, chunk=chunk, **given)
        print(
            f"| ours, chunk {chunk}{' (default)' if chunk == default else ''} | {seconds:.3f} s on the device, "
            f"{host:.3f} s to the host | {peak:.2f} GiB, planned {planned.total / 2**30:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
