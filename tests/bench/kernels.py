"""Each operation by itself on one GPU: TFLOP/s or TB/s, its share of the ceilings measured in the same run.

    python -m tests.bench.kernels [--dtype bfloat16] [--only conv]

``--only settings`` measures what a first decode does: all candidates for each kind of layer, and cuDNN. ``sustained``
measures what is left after the burst, when the GPU's power limit has lowered its clock: two seconds of each.

Random data. Prints rows for BENCHMARKS.md: ours, then PyTorch's own kernels on the same tensors.
"""

import argparse
import functools
import time

import torch
import triton
from triton.testing import do_bench

from wan_vae_parallel.architecture import Architecture
from wan_vae_parallel.model.decoder import WanDecoder
from wan_vae_parallel.ops.attention import frame_attention
from wan_vae_parallel.ops.conv import (
    conv,
    down_conv,
    fold_upsample_weight,
    head_conv,
    pointwise_conv,
    prepare_head,
    upsample_conv,
)
from wan_vae_parallel.ops.dispatch import torch_kernels_only
from wan_vae_parallel.ops.frames import to_frames
from wan_vae_parallel.ops.kernels.measure import measure
from wan_vae_parallel.ops.kernels.tiles import candidates
from wan_vae_parallel.ops.norm_silu import norm_silu
from wan_vae_parallel.ops.pixels import Margins, gather_taps, spread_pixel_weight, tap_channels
from wan_vae_parallel.ops.shortcut import add_averaged, add_duplicated

CUDA = torch.device("cuda", 0)
# C, O, kernel, H, W, T: where a decode of 720p spends its time, on one device and on one of four, and 480p on four.
CONVOLUTIONS = [
    (96, 96, (3, 3, 3), 720, 1280, 4),
    (96, 96, (3, 3, 3), 180, 1280, 4),
    (192, 192, (3, 3, 3), 360, 640, 4),
    (192, 192, (3, 3, 3), 90, 640, 4),
    (192, 192, (3, 3, 3), 60, 416, 16),
    (192, 384, (3, 3, 3), 180, 320, 4),
    (384, 384, (3, 3, 3), 180, 320, 4),
    (384, 384, (3, 3, 3), 46, 320, 4),
    (384, 384, (3, 3, 3), 90, 160, 4),
    (384, 384, (3, 3, 3), 90, 160, 1),
    (384, 384, (3, 3, 3), 23, 160, 4),
    (384, 384, (3, 3, 3), 15, 104, 4),
    (16, 384, (3, 3, 3), 90, 160, 4),
    (384, 768, (3, 1, 1), 90, 160, 4),
    (384, 1152, (1, 1, 1), 90, 160, 4),
    (1024, 1024, (3, 3, 3), 44, 80, 4),
    (512, 512, (3, 3, 3), 176, 320, 4),
    (256, 256, (3, 3, 3), 352, 640, 4),
]
SUSTAINED = [(1024, 88, 160, 4), (512, 176, 320, 4), (256, 352, 640, 4)]
SUSTAINED += [(384, 180, 320, 8), (192, 360, 640, 8), (96, 720, 1280, 4)]
UPSAMPLINGS = [(384, 192, 180, 320, 4), (192, 96, 360, 640, 4), (384, 192, 90, 160, 8), (1024, 1024, 44, 80, 4)]
# C, output's H and W, T: where an encode halves rows and columns, or frames.
DOWNS = [(96, 360, 640, 4), (192, 180, 320, 4), (384, 90, 160, 4), (160, 176, 320, 4), (320, 88, 160, 4)]
DOWNS += [(640, 44, 80, 4)]
STRIDED = [(192, 180, 320, 2), (384, 90, 160, 1), (320, 88, 160, 2), (640, 44, 80, 1)]
# Colours, patch, O of the first convolution, positions' H and W, T.
PIXELS = [(3, 1, 96, 720, 1280, 4), (3, 2, 160, 352, 640, 4)]
# C, O, frames that become one, output's H and W, its T.
AVERAGES = [(160, 160, 1, 176, 320, 4), (160, 320, 2, 88, 160, 2), (320, 640, 2, 44, 80, 1)]
HEADS = [(96, 3, 720, 1280, 4), (96, 3, 720, 1280, 1), (96, 3, 180, 1280, 4), (256, 12, 352, 640, 4)]
NORMS = [(96, 720, 1280, 4), (192, 360, 640, 4), (384, 180, 320, 4), (384, 90, 160, 4), (256, 352, 640, 4)]
ATTENTIONS = [(384, 14400, 14400, 4), (384, 14400, 14400, 1), (384, 3600, 14400, 4), (384, 6240, 6240, 4)]
ATTENTIONS += [(1024, 3520, 3520, 4)]


class Bench:
    """Measures and prints, next to the ceilings."""

    def __init__(self, dtype):
        self.dtype = dtype
        a, b = self.random(8192, 8192), self.random(8192, 8192)
        self.flops = 2 * 8192**3 / self.seconds(lambda: a @ b)
        x = torch.empty(2**31, dtype=torch.uint8, device=CUDA)
        y = torch.empty_like(x)
        self.bytes = 2 * x.numel() / self.seconds(lambda: y.copy_(x))
        name = torch.cuda.get_device_name()
        print(f"# {name}, torch {torch.__version__}, Triton {triton.__version__}, {dtype}")
        print(f"# ceilings: matmul {self.flops / 1e12:.0f} TFLOP/s, copy {self.bytes / 1e12:.2f} TB/s", flush=True)

    def random(self, *shape, scale=1.0):
        return torch.randn(shape, dtype=self.dtype, device=CUDA) * scale

    def seconds(self, call):
        return do_bench(call, warmup=20, rep=80, return_mode="median") / 1e3

    def row(self, what, call, *, flops=0.0, moved=0.0, torch_too=True):
        ours = self.seconds(call)
        theirs = None
        if torch_too:
            with torch_kernels_only():
                theirs = self.seconds(call)

        def rate(seconds):
            amount, unit, ceiling = (flops, "TFLOP/s", self.flops) if flops else (moved, "TB/s", self.bytes)
            speed, digits = amount / seconds, 0 if flops else 2
            return f"{seconds * 1e3:.3f} ms | {speed / 1e12:.{digits}f} {unit} | {speed / ceiling:.0%}"

        print(f"| {what} | {rate(ours)} |" + (f" {theirs / ours:.2f}x PyTorch |" if theirs else ""), flush=True)

    def arena(self, frames, height, width, channels, border):
        arena = torch.zeros((frames, height + 2 * border, width + 2 * border, channels), dtype=self.dtype, device=CUDA)
        inside = arena[:, border : border + height, border : border + width]
        inside.copy_(self.random(*inside.shape))
        return arena, torch.arange(frames, dtype=torch.int32, device=CUDA)

    def conv_problem(self, channels, out_channels, kernel, height, width, frames):
        """What `conv` takes, and its FLOP."""
        arena, slots = self.arena(frames + kernel[0] - 1, height, width, channels, kernel[1] // 2)
        taps = kernel[0] * kernel[1] * kernel[2]
        weight = self.random(out_channels, channels, *kernel, scale=(taps * channels) ** -0.5)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        flops = 2 * frames * height * width * out_channels * channels * taps
        return (arena, slots, weight, self.random(out_channels)), flops

    def conv(self):
        for channels, out_channels, kernel, height, width, frames in CONVOLUTIONS:
            problem = self.conv_problem(channels, out_channels, kernel, height, width, frames)
            (arena, slots, weight, bias), flops = problem
            name = f"{'x'.join(map(str, kernel))} {channels} to {out_channels}, {height}x{width}, T {frames}"
            if kernel == (1, 1, 1):
                self.row(name, lambda: pointwise_conv(arena, weight, bias), flops=flops)  # noqa: B023 (called at once)
                continue
            self.row(name, lambda: conv(arena, slots, weight, bias), flops=flops)  # noqa: B023 (called at once)
            if channels == out_channels:
                residual = self.random(frames, height, width, out_channels)
                self.row(
                    f"{name}, residual",
                    lambda: conv(arena, slots, weight, bias, residual=residual),  # noqa: B023 (called at once)
                    flops=flops,
                    torch_too=False,
                )

    def upsample(self):
        for channels, out_channels, height, width, frames in UPSAMPLINGS:
            arena, slots = self.arena(frames, height, width, channels, 1)
            weight = self.random(out_channels, channels, 3, 3, scale=(9 * channels) ** -0.5)
            folded, bias = fold_upsample_weight(weight), self.random(out_channels)
            flops = 2 * 4 * frames * height * width * out_channels * channels * 4
            self.row(
                f"upsampling {channels} to {out_channels}, from {height}x{width}, T {frames}",
                lambda: upsample_conv(arena, slots, weight, bias, folded=folded),  # noqa: B023 (called at once)
                flops=flops,
            )

    def encode(self):
        for channels, height, width, frames in DOWNS:
            arena, slots = self.arena(frames, 2 * height, 2 * width, channels, 1)
            weight = self.random(channels, channels, 3, 3, scale=(9 * channels) ** -0.5)
            weight, bias = weight.contiguous(memory_format=torch.channels_last), self.random(channels)
            self.row(
                f"every other row and column, {channels} channels, to {height}x{width}, T {frames}",
                lambda: down_conv(arena, slots, weight, bias),  # noqa: B023 (called at once)
                flops=2 * frames * height * width * channels**2 * 9,
            )
        for channels, height, width, frames in STRIDED:
            problem, _ = self.conv_problem(channels, channels, (3, 1, 1), height, width, 2 * frames - 1)
            self.row(
                f"3x1x1 of every other frame, {channels} channels, {height}x{width}, T {frames}",
                lambda: conv(*problem, time_stride=2),  # noqa: B023 (called at once)
                flops=2 * frames * height * width * channels**2 * 3,
            )
        for colours, patch, out_channels, height, width, frames in PIXELS:
            channels = colours * patch**2
            pixels = torch.rand((frames, height * patch, width * patch, colours), device=CUDA)
            arena, slots = self.arena(frames + 2, height, width, tap_channels(channels), 0)
            own = slots[2:].clone()  # the two before are past frames
            for transposed in (False, True):
                turned = arena.view(frames + 2, width, height, -1) if transposed else arena
                self.row(
                    f"pixels, patch {patch}, {height}x{width}, T {frames}{', transposed' if transposed else ''}",
                    functools.partial(
                        gather_taps,
                        pixels,
                        patch=patch,
                        margins=Margins(),
                        transposed=transposed,
                        arena=turned,
                        slots=own,
                    ),
                    moved=pixels.nbytes + arena[2:].nbytes,
                )
            weight = self.random(out_channels, channels, 3, 3, 3, scale=(27 * channels) ** -0.5)
            weight = spread_pixel_weight(weight, patch)
            bias = self.random(out_channels)
            self.row(
                f"first convolution, {channels} to {out_channels}, {height}x{width}, T {frames}",
                lambda: conv(arena, slots, weight, bias),  # noqa: B023 (called at once)
                moved=arena.nbytes + frames * height * width * out_channels * arena.element_size(),
            )
        for channels, out_channels, factor, height, width, frames in AVERAGES:
            x = self.random(frames * factor, 2 * height, 2 * width, channels)
            out = self.random(frames, height, width, out_channels)
            self.row(
                f"averaging shortcut, {channels} to {out_channels}, to {height}x{width}, T {frames}",
                lambda: add_averaged(x, time_factor=factor, out=out),  # noqa: B023 (called at once)
                moved=x.nbytes + 2 * out.nbytes,
            )

    def head(self):
        for channels, out_channels, height, width, frames in HEADS:
            arena, slots = self.arena(frames + 2, height, width, channels, 1)
            weight = self.random(out_channels, channels, 3, 3, 3, scale=(27 * channels) ** -0.5)
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
            bias = self.random(out_channels)
            prepared = prepare_head(weight, frames, transposed=False)
            moved = (arena.numel() + frames * height * width * out_channels) * arena.element_size()
            self.row(
                f"3x3x3 {channels} to {out_channels}, {height}x{width}, T {frames}",
                lambda: head_conv(arena, slots, weight, bias, prepared=prepared),  # noqa: B023 (called at once)
                moved=moved,
                torch_too=False,
            )

    def norm(self):
        for channels, height, width, frames in NORMS:
            arena, slots = self.arena(frames, height, width, channels, 1)
            x, gamma = self.random(frames, height, width, channels), self.random(channels)
            self.row(
                f"norm and SiLU, {channels} channels, {height}x{width}, T {frames}",
                lambda: norm_silu(x, gamma, arena=arena, slots=slots),  # noqa: B023 (called at once)
                moved=2 * x.nbytes,
            )

    def attention(self):
        for channels, queries, keys, frames in ATTENTIONS:
            query, key, value = (self.random(frames, n, channels) for n in (queries, keys, keys))
            self.row(
                f"attention, width {channels}, {queries} of {keys}, T {frames}",
                lambda: frame_attention(query, key, value),  # noqa: B023 (called at once)
                flops=4 * frames * queries * keys * channels,
            )

    def rest(self):
        x = self.random(8, 720, 1280, 3)
        for transposed in (False, True):
            self.row(
                f"frames, 720x1280, T 8{', transposed' if transposed else ''}",
                lambda: to_frames(x, 1, transposed=transposed),  # noqa: B023 (called at once)
                moved=x.numel() * (x.element_size() + 4),
            )
        x, out = self.random(2, 88, 160, 1024), self.random(4, 176, 320, 512)
        self.row(
            "shortcut, 1024 to 512, from 88x160, T 2",
            lambda: add_duplicated(x, time_factor=2, phases=(0, 2), out=out),
            moved=x.nbytes + 2 * out.nbytes,
        )

    def settings(self):
        for family in ("wan2.1", "wan2.2"):
            with torch.device("meta"):
                model = WanDecoder(Architecture.published(family))
            began = time.monotonic()
            found = measure([*dict.fromkeys(conv.kind for conv in model.convolutions())], self.dtype, CUDA)
            print(f"# {family}: {len(found)} kinds of layers in {time.monotonic() - began:.1f} s")
            for kind, one in found.items():
                best = candidates(kind, CUDA)[one.tiles.index(one.ours)]
                speeds = ", ".join(f"{speed:.0f}" for speed in one.tiles)
                print(f"| {kind} | {speeds} TFLOP/s | best {best} | cuDNN {one.cudnn:.0f} |", flush=True)

    def sustained(self):
        a, b = self.random(8192, 8192), self.random(8192, 8192)
        ceiling = self.lasting("matmul 8192^3", lambda: a @ b, 2 * 8192**3)
        for channels, height, width, frames in SUSTAINED:
            problem, flops = self.conv_problem(channels, channels, (3, 3, 3), height, width, frames)
            name = f"3x3x3 {channels} to {channels}, {height}x{width}, T {frames}"
            self.lasting(name, lambda: conv(*problem), flops, ceiling)  # noqa: B023 (called at once)

    def lasting(self, what, call, flops, ceiling=0.0):
        """FLOP/s over two seconds; prints the first eight calls', which meet a cool GPU, beside them."""
        call()
        torch.cuda.synchronize()
        time.sleep(1)
        events = [self.event()]
        began = time.monotonic()
        while time.monotonic() < began + 2:
            for _ in range(8):
                call()
            events.append(self.event())
            events[max(0, len(events) - 3)].synchronize()  # a few calls ahead, and no more
        events[-1].synchronize()
        first = flops * 8 / events[0].elapsed_time(events[1]) * 1e3
        mean = flops * 8 * (len(events) - 1) / events[0].elapsed_time(events[-1]) * 1e3
        share = f" {mean / ceiling:.0%} |" if ceiling else ""
        print(f"| {what} | {first / 1e12:.0f} TFLOP/s | {mean / 1e12:.0f} TFLOP/s |{share}", flush=True)
        return mean

    def event(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    names = ["conv", "upsample", "encode", "head", "norm", "attention", "rest", "settings", "sustained"]
    parser.add_argument("--only", choices=names)
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(getattr(torch, options.dtype))
    for name in names:
        if options.only in (None, name):
            getattr(bench, name)()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
