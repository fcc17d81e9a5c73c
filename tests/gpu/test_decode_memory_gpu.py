"""Memory of decodes on one CUDA device.

Bounds are for 720p of the published Wan 2.1 decoder in bf16; they hold on any GPU that has that much.
"""

from __future__ import annotations

import gc
import logging

import pytest
import torch

import wan_vae_parallel as wvp
from tests.gpu.device import CUDA, GIB, card_of, clear, most_reserved
from tests.oracle import load, oracle_vae, random_latents
from wan_vae_parallel.memory import decode_memory
from wan_vae_parallel.ops.dispatch import torch_kernels_only

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
    pytest.mark.usefixtures("clean_device"),
]

HD = (1, 16, 21, 90, 160)


def decode_and_measure(vae, latents):
    """Frames, and the most bytes that tensors took on the device meanwhile, weights included."""
    clear()
    assert torch.cuda.memory_allocated(CUDA) < 2**20, "something else lies on the device: the peak would be its too"
    torch.cuda.reset_peak_memory_stats(CUDA)
    frames = vae.decode(latents)
    return frames, torch.cuda.max_memory_allocated(CUDA)


def test_720p_stays_within_its_memory_and_its_estimate(wan21):
    latents = random_latents("wan2.1", frames=HD[2], rows=HD[3], columns=HD[4])
    assert tuple(latents.shape) == HD
    decoded = {}
    for chunk, limit in (("auto", 9.1 * GIB), (1, 5.5 * GIB)):
        with load(wan21, dtype="bfloat16", devices="cuda:0", chunk=chunk) as vae:
            vae.release()  # weights go up again inside the measurement
            decoded[chunk], peak = decode_and_measure(vae, latents)
            estimate = vae.memory_needed(HD)
        print(f"\n720p, chunk {chunk}: peak {peak / GIB:.2f} GiB, estimated {estimate / GIB:.2f} GiB")
        assert peak < limit
        assert peak <= estimate <= 1.4 * peak
    assert decoded[1].std() > 0.05
    assert torch.equal(decoded[1], decoded["auto"])


@pytest.mark.parametrize(
    ("frames", "rows", "columns", "chunk"),
    [
        (1, 90, 160, 1),  # an image: no caches
        (9, 60, 104, 1),  # 480p
        (9, 60, 104, 8),  # with as large a chunk as there is
    ],
)
def test_the_estimate_is_an_upper_bound(family, oracle, frames, rows, columns, chunk):
    latents = random_latents(family, frames=frames, rows=rows, columns=columns)
    with load(oracle, dtype="bfloat16", devices="cuda:0", chunk=chunk) as vae:
        vae.release()
        _, peak = decode_and_measure(vae, latents)
        size = (1, frames, rows, columns)
        estimate = decode_memory(vae.architecture, size, chunk=chunk, dtype=torch.bfloat16, kernels=True).total
    print(f"\n{family} {size} chunk {chunk}: peak {peak / GIB:.2f} GiB, estimated {estimate / GIB:.2f} GiB")
    assert peak <= estimate


def test_released_and_closed_memory_is_free(wan21):
    latents = random_latents("wan2.1", frames=3, rows=8, columns=8)
    vae = load(wan21, dtype="bfloat16", devices="cuda:0")
    vae.decode(latents)
    clear()
    held = torch.cuda.memory_allocated(CUDA)
    assert vae.weights_size <= held < 1.1 * vae.weights_size  # weights alone: nothing of the decode
    stream = vae.decode_stream(latents)
    next(stream)
    assert torch.cuda.memory_allocated(CUDA) > held
    stream.close()
    clear()
    left = [tuple(o.shape) for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_cuda]
    assert torch.cuda.memory_allocated(CUDA) == held, f"beside the weights there are {left}"
    vae.release()
    clear()
    assert torch.cuda.memory_allocated(CUDA) == 0


def limit_memory(bytes_allowed):
    """From here on, allocations beyond this run out of memory as if the GPU had no more."""
    clear()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(bytes_allowed / total, CUDA)


def reserved_peak(vae, latents):
    clear()
    torch.cuda.reset_peak_memory_stats(CUDA)
    frames = vae.decode(latents)
    return frames, torch.cuda.max_memory_reserved(CUDA)


def test_running_out_of_memory_goes_on_with_a_smaller_chunk_and_the_same_frames(wan21, caplog):
    latents = random_latents("wan2.1", frames=9, rows=60, columns=104)
    vae = load(wan21, dtype="bfloat16", devices="cuda:0", chunk=1)
    expected, fits = reserved_peak(vae, latents)
    vae.chunk = 8
    _, needed = reserved_peak(vae, latents)
    assert needed > 1.5 * fits
    # Just enough for a chunk of one, with some room for fragments.
    limit_memory(fits + (needed - fits) // 10)
    with caplog.at_level(logging.WARNING):
        decoded = vae.decode(latents)
    warnings = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert "chunk 8; going on with smaller" in warnings[0]
    assert torch.equal(decoded, expected)


def test_when_nothing_fits_it_says_what_would_and_a_smaller_decode_works_after_it(wan21):
    latents = random_latents("wan2.1", frames=5, rows=90, columns=160)
    small = random_latents("wan2.1", frames=3, rows=4, columns=4)
    vae = load(wan21, dtype="bfloat16", devices="cuda:0")
    expected = vae.decode(small)
    limit_memory(vae.weights_size + 2**29)
    with pytest.raises(wvp.OutOfMemoryError, match=r"1280x720 does not fit on cuda:0 even one latent frame at a time"):
        vae.decode(latents)
    assert torch.equal(vae.decode(small), expected)


@pytest.fixture(scope="module")
def published(family):
    """Of the published widths, which memory depends on."""
    return oracle_vae(family, width={"wan2.1": 96, "wan2.2": 256}[family], encoder_width=160)


SIZES = {"wan2.1": {"720p": (720, 1280), "480p": (480, 832)}, "wan2.2": {"720p": (704, 1280), "480p": (480, 832)}}


@pytest.mark.parametrize("size", ["720p", "480p"])
def test_81_frames_on_cards_of_8_to_24_gb(family, published, size, caplog):
    with load(published, dtype="bfloat16", devices=str(CUDA)) as vae:
        rows, columns = vae.architecture.latent_size(*SIZES[family][size])
        latents = random_latents(family, frames=21, rows=rows, columns=columns)
        expected = vae.decode(latents)
        assert expected.std() > 0.05
        for gib in (8, 12, 16, 24):
            vae.release()
            with card_of(gib) as room, caplog.at_level(logging.WARNING):
                assert torch.equal(vae.decode(latents), expected)
                assert 0 < most_reserved(room) <= room
        # With what was free its first chunk was one that fits.
        assert "out of memory" not in caplog.text


@pytest.mark.parametrize(
    ("size", "gib", "direction"),
    [("720p", 12, "decode"), ("480p", 8, "decode"), ("720p", 12, "encode"), ("480p", 8, "encode")],
)
def test_where_our_kernels_do_not_run_small_cards_do_it(family, published, size, gib, direction, caplog):
    with load(published, dtype="bfloat16", devices=str(CUDA)) as vae, torch_kernels_only():
        height, width = SIZES[family][size]
        rows, columns = vae.architecture.latent_size(height, width)
        with card_of(gib) as room, caplog.at_level(logging.WARNING):
            if direction == "decode":
                given = vae.decode(torch.randn(1, vae.architecture.z_dim, 9, rows, columns))
            else:
                given = vae.encode(torch.rand(1, 33, height, width, 3))
            assert 0 < most_reserved(room) <= room
        assert given.isfinite().all()
        assert given.std() > 0.05
        assert "out of memory" not in caplog.text
