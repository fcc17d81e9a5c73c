"""81 frames with as little memory as cards at home have: ``python -m tests.bench.cards``.

One GPU that has more poses as each of them (`card_of`): 1.5 GiB less than its size are free, the rest is taken, and the
process gets no more. Weights are random, of the published shapes, in bf16; what PyTorch's kernels would do where ours
can't run is measured, too. Times are this GPU's own, to the host, the second of two.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator

import torch

import wan_vae_parallel as wvp
from tests.bench.decode import oracle
from tests.gpu.device import CUDA, GIB, card_of, clear, most_reserved
from wan_vae_parallel.memory import decode_memory, encode_memory
from wan_vae_parallel.ops.dispatch import torch_kernels_only

SIZES = {"wan2.1": ("1280x720", "832x480"), "wan2.2": ("1280x704", "832x480")}
LATENT_FRAMES = 21


class _Shortages(logging.Handler):
    """Counts what was said of memory that ran out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "out of memory" in record.getMessage()


@contextlib.contextmanager
def shortages() -> Iterator[_Shortages]:
    handler = _Shortages()
    logger = logging.getLogger("wan_vae_parallel")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def row(vae: wvp.VAE, work: Callable[[], object], gib: float, kernels: bool) -> str:
    """What is free on one card, what was taken, and how long it took."""
    seconds = 0.0
    with card_of(gib) as room, shortages() as short, contextlib.nullcontext() if kernels else torch_kernels_only():
        try:
            for _ in range(2):
                started = time.perf_counter()
                work()
                seconds = time.perf_counter() - started
            taken, ended = most_reserved(room), f"{seconds:.2f} s"
        except wvp.OutOfMemoryError as error:
            taken, ended = most_reserved(room), f"does not fit: {error}"
        vae.release()
    run = "" if not short.count else f", ran out of memory {short.count} times before"
    return f"{room / GIB:.1f} GiB | {taken / GIB:.2f} GiB | {ended}{run}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="8,12,16,24", help="GiB, of which 1.5 are taken")
    parser.add_argument("--families", default="wan2.1,wan2.2")
    parser.add_argument("--directions", default="decode,encode")
    parser.add_argument("--ways", default="ours,PyTorch's")
    options = parser.parse_args()

    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {4 * LATENT_FRAMES - 3} frames, bf16")
    print("| VAE | size | | kernels | needs with chunk 1 | card | free | taken | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for family in options.families.split(","):
        model = oracle(family)
        with wvp.vae_from_state_dict(model.state_dict(), devices=str(CUDA), dtype="bfloat16") as vae:
            del model
            for size, direction in itertools.product(SIZES[family], options.directions.split(",")):
                width, height = map(int, size.split("x"))
                rows, columns = vae.architecture.latent_size(height, width)
                decodes = direction == "decode"
                tensor = (
                    torch.randn(1, vae.architecture.z_dim, LATENT_FRAMES, rows, columns)
                    if decodes
                    else torch.rand(1, 4 * LATENT_FRAMES - 3, height, width, 3)
                )
                for way in options.ways.split(","):
                    given = {"chunk": 1, "dtype": torch.bfloat16, "kernels": way == "ours"}
                    needs = (
                        decode_memory(vae.architecture, (1, LATENT_FRAMES, rows, columns), **given)
                        if decodes
                        else encode_memory(vae.architecture, (rows, columns), image=False, **given)
                    )
                    start = f"| {family} | {size} | {direction} | {way} | {needs.total / GIB:.2f} GiB"
                    for gib in map(float, options.cards.split(",")):
                        work = functools.partial(vae.decode if decodes else vae.encode, tensor)
                        print(f"{start} | {gib:.0f} GB | {row(vae, work, gib, way == 'ours')} |", flush=True)
        clear()


if __name__ == "__main__":
    main()
