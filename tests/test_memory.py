"""The arithmetic of memory against what models and decodes really hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from wan_vae_parallel import memory
from wan_vae_parallel.architecture import Architecture
from wan_vae_parallel.memory import (
    chunk_to_hand_on,
    decode_memory,
    encode_memory,
    free_memory,
    gibibytes,
    kernels_take_decoder,
    kernels_take_encoder,
    largest_chunk,
    largest_encode_chunk,
    largest_frame,
    parameter_count,
)
from wan_vae_parallel.model.decoder import WanDecoder
from wan_vae_parallel.model.encoder import WanEncoder
from wan_vae_parallel.ops.limits import attention_takes, norm_takes

ARCHITECTURES = [
    Architecture.published("wan2.1"),
    Architecture.published("wan2.2"),
    Architecture.published("wan2.1", width=24),  # pruned
    Architecture.published("wan2.2", width=32),
    Architecture(family="wan2.1", z_dim=12, width=8, output_channels=4),  # with alpha
    Architecture(family="wan2.2", z_dim=20, width=8, output_channels=4),
]
HD = (1, 21, 90, 160)
BF16 = {"dtype": torch.bfloat16, "kernels": True}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_parameter_count_is_the_models(architecture):
    with torch.device("meta"):
        model = WanDecoder(architecture)
    assert parameter_count(architecture) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.width < 96], ids=str)
@pytest.mark.parametrize(("frames", "chunk", "videos"), [(6, 1, 1), (6, 2, 1), (6, 2, 3), (1, 1, 1)])
def test_page_elements_are_those_that_a_decode_allocates(architecture, frames, chunk, videos):
    rows, columns = 2, 3
    with torch.device("meta"):
        model = WanDecoder(architecture)
    pages = model.pages(
        rows, columns, chunk=chunk, videos=videos, keeps=frames > 1, dtype=torch.bfloat16, device=torch.device("meta")
    )
    kept, others = memory._page_elements(
        model.page_needs(chunk, image=frames == 1), rows, columns, videos=videos, keeps=frames > 1, gather=False
    )
    assert kept + others == sum(one.arena.numel() for one in pages.values())
    assert (kept > 0) == (frames > 1)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize(("frames", "chunk"), [(9, 1), (9, 3), (1, 1)])
def test_page_elements_are_those_that_an_encode_allocates(family, frames, chunk):
    architecture = Architecture.published(family, width=16)
    with torch.device("meta"):
        model = WanEncoder(architecture)
    pages = model.pages(2, 3, chunk=chunk, keeps=frames > 1, dtype=torch.bfloat16, device=torch.device("meta"))
    needs = model.page_needs(chunk, image=frames == 1)
    kept, others = memory._page_elements(needs, 2, 3, videos=1, keeps=frames > 1, gather=False)
    assert kept + others == sum(one.arena.numel() for one in pages.values())
    assert (kept > 0) == (frames > 1)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_memory_grows_with_what_is_encoded(family):
    architecture = Architecture.published(family)

    def total(size=(90, 160), chunk=1, image=False, dtype=torch.bfloat16):
        kernels = dtype == torch.bfloat16
        return encode_memory(architecture, size, chunk=chunk, image=image, dtype=dtype, kernels=kernels).total

    by_chunk = [total(chunk=chunk) for chunk in (1, 2, 3, 4, 8)]
    assert by_chunk == sorted(set(by_chunk))
    assert total(dtype=torch.float32) > total()
    assert total((60, 104)) < total() < total((136, 240))
    assert total(image=True) < total()


def test_an_encode_of_720p_is_planned_with_what_it_may_take():
    architecture = Architecture.published("wan2.1")
    assert encode_memory(architecture, (90, 160), chunk=1, image=False, **BF16).total < 4 * 2**30
    chunk = largest_encode_chunk(architecture, (90, 160), frames=81, free=80 * 2**30, **BF16)
    assert chunk == 2
    assert encode_memory(architecture, (90, 160), chunk=chunk, image=False, **BF16).total < 5.4 * 2**30
    assert largest_encode_chunk(architecture, (90, 160), frames=81, free=5 * 2**30, **BF16) == 1
    assert largest_encode_chunk(architecture, (90, 160), frames=1, free=80 * 2**30, **BF16) == 1
    assert largest_encode_chunk(architecture, (2, 2), frames=None, free=80 * 2**30, **BF16) == 64
    on_cpu = {"dtype": torch.float32, "kernels": False, "device_type": "cpu", "free": 80 * 2**30}
    assert largest_encode_chunk(architecture, (60, 104), frames=81, **on_cpu) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES[:2], ids=str)
def test_memory_grows_with_what_is_decoded(architecture):
    def total(shape, chunk=1, dtype=torch.bfloat16):
        return decode_memory(architecture, shape, chunk=chunk, dtype=dtype, kernels=dtype == torch.bfloat16).total

    by_chunk = [total(HD, chunk) for chunk in (1, 2, 3, 4, 8)]
    assert by_chunk == sorted(set(by_chunk))
    assert total(HD, 1, torch.float32) > total(HD, 1)
    assert total((1, 21, 60, 104)) < total(HD) < total((1, 21, 136, 240))
    assert total((2, 21, 90, 160)) > total(HD)
    # Its length costs nothing but the latents: only past frames pass from step to step.
    assert total(HD) < total((1, 200, 90, 160)) < 1.05 * total(HD)
    # A chunk larger than the video is the video.
    assert total((1, 3, 90, 160), 100) == total((1, 3, 90, 160), 2)


def test_the_parts_add_up_and_an_image_needs_no_caches():
    architecture = Architecture.published("wan2.1")
    video = decode_memory(architecture, HD, chunk=1, **BF16)
    assert video.total == video.weights + video.caches + video.step
    assert 2 * parameter_count(architecture) < video.weights < 2.2 * parameter_count(architecture)
    assert 3.5 * 2**30 < video.caches < 4.5 * 2**30  # 4.06 GiB: two frames of each convolution's input
    assert decode_memory(architecture, (1, 1, 90, 160), chunk=1, **BF16).caches == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES[:2], ids=str)
def test_largest_chunk_shrinks_with_free_memory_and_never_below_one(architecture):
    shape = (1, 21, 30, 52)
    free = [2**40, 2**33, 2**32, 2**31, 2**30, 0]
    chunks = [largest_chunk(architecture, shape, **BF16, free=bytes_free) for bytes_free in free]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > 1
    assert chunks[-1] == 1
    for chunk, bytes_free in zip(chunks, free, strict=True):
        if chunk > 1:  # it was promised to fit
            assert decode_memory(architecture, shape, chunk=chunk, **BF16).total <= bytes_free


@pytest.mark.parametrize(
    ("frames", "chunk", "most"),
    [
        ((1, 81, 720, 1280, 3), 15, 2),
        ((2, 81, 720, 1280, 3), 15, 1),
        ((1, 81, 480, 832, 3), 15, 5),
        ((1, 81, 480, 832, 3), 3, 3),
        ((1, 81, 2160, 3840, 3), 1, 1),
        ((8, 1, 720, 1280, 3), 4, 2),
    ],
)
def test_chunks_are_smaller_where_an_encoder_takes_the_frames(frames, chunk, most):
    assert chunk_to_hand_on(chunk, frames) == most


def test_largest_chunk_is_no_more_than_follows_the_first_frame():
    architecture = Architecture.published("wan2.1")
    for frames, most in ((1, 1), (2, 1), (3, 2)):
        assert largest_chunk(architecture, (1, frames, 2, 2), **BF16, free=2**50) == most


def test_largest_chunk_stays_small_where_one_frame_keeps_a_device_busy():
    # 4K has nine times the pixels of 720p: larger chunks would only cost memory.
    assert largest_chunk(Architecture.published("wan2.1"), (1, 21, 270, 480), **BF16, free=2**50) == 1


@pytest.mark.parametrize(
    ("family", "width", "rows", "columns", "chunk"),
    [
        ("wan2.1", 96, 90, 160, 1),  # of 720p, one is much
        ("wan2.1", 96, 16, 16, 1),
        ("wan2.1", 96, 8, 8, 4),
        ("wan2.1", 16, 16, 16, 20),  # a demo's: as many as there are, 36 would do
        ("wan2.1", 16, 60, 104, 1),
        ("wan2.2", 256, 4, 4, 2),
        ("wan2.2", 256, 45, 80, 1),
    ],
)
def test_a_step_on_the_cpu_is_some_seconds_work(family, width, rows, columns, chunk):
    architecture = Architecture.published(family, width=width)
    given = {"dtype": torch.float32, "kernels": False, "free": 2**50}
    assert largest_chunk(architecture, (1, 21, rows, columns), device_type="cpu", **given) == chunk
    assert chunk <= largest_chunk(architecture, (1, 21, rows, columns), device_type="cuda", **given)


def test_largest_frame_fits_and_keeps_the_proportions():
    architecture = Architecture.published("wan2.1")
    free = decode_memory(architecture, HD, chunk=1, **BF16).total
    width, height = map(int, largest_frame(architecture, HD, **BF16, free=free).split("x"))
    assert width % 8 == height % 8 == 0
    assert abs(width / height - 16 / 9) < 0.1
    smaller = (1, 21, height // 8, width // 8)
    assert decode_memory(architecture, smaller, chunk=1, **BF16).total <= free
    assert width * height > 0.5 * 1280 * 720
    assert largest_frame(architecture, HD, **BF16, free=0) == "no frame"


def test_free_memory_of_the_host_is_no_more_than_it_has():
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("this system does not tell its memory in /proc/meminfo")
    total = int(meminfo.read_text().split()[1]) * 1024
    assert 0 < free_memory(torch.device("cpu")) <= total


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MiB"), (3 * 2**20, "3.0 MiB"), (2**30, "1.0 GiB"), (4.06 * 2**30, "4.1 GiB")]
)
def test_sizes_for_people(count, text):
    assert gibibytes(count) == text


@pytest.mark.parametrize(
    ("width", "norms", "attentions"),
    [(96, True, True), (24, True, True), (8, True, True), (20, False, True), (12, False, True), (88, False, False)],
)
def test_plans_know_of_widths_that_our_kernels_do_not_take(width, norms, attentions):
    assert norm_takes(width) == norms
    assert attention_takes(4 * width) == attentions
    architecture = dataclasses.replace(Architecture.published("wan2.1"), width=width, encoder_width=width)
    takes = norms and attentions
    assert kernels_take_decoder(architecture) == kernels_take_encoder(architecture) == takes
