"""Encodes on several workers: the latents of one device, however rows are shared out."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import FAMILIES, load, max_error, oracle_latents, oracle_vae, random_video


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def exact(family):
    return oracle_vae(family).double()


SHAPES = [  # rows, columns, frames
    (5, 2, 9),  # rows, not divisible
    (2, 7, 5),  # columns
    (1, 1, 5),  # fewer rows than workers
    (3, 3, 1),  # an image
]


@pytest.mark.parametrize("workers", [2, 3, *(pytest.param(many, marks=pytest.mark.slow) for many in (5, 8))])
def test_latents_are_those_of_one_device(family, exact, workers):
    with load(exact, dtype="float64", chunk=2, devices=",".join(["cpu"] * workers)) as vae:
        for rows, columns, frames in SHAPES:
            video = random_video(family, frames=frames, rows=rows, columns=columns, dtype=torch.float64)
            reference = oracle_latents(exact, video[0]).permute(3, 0, 1, 2)[None]
            assert max_error(vae.encode(video), reference) <= 1e-9, (rows, columns, frames)


def test_the_last_latent_row_is_right_where_rows_do_not_divide(exact, family):
    # Four shards of pictures whose rows are no multiple of 8 * 4: padding them makes the last rows wrong.
    video = random_video(family, frames=5, rows=5, columns=4, dtype=torch.float64)
    reference = oracle_latents(exact, video[0]).permute(3, 0, 1, 2)[None]
    with load(exact, dtype="float64", devices="cpu,cpu,cpu,cpu") as vae:
        latents = vae.encode(video)
    assert max_error(latents[..., -1, :], reference[..., -1, :]) <= 1e-9
    assert max_error(latents[..., -1], reference[..., -1]) <= 1e-9


def test_repeats_are_left_out_on_all_workers_alike(exact, family):
    video = random_video(family, frames=29, rows=2, columns=1, dtype=torch.float64)
    video[:, 3:25] = video[:, 3:4]
    reference = oracle_latents(exact, video[0]).permute(3, 0, 1, 2)[None]
    with load(exact, dtype="float64", chunk=3, devices="cpu,cpu") as vae:
        assert max_error(vae.encode(video), reference) <= 1e-9
        # In a stream it is the same, whatever parts the frames come in.
        parts = torch.cat(list(vae.encode_stream(video[0].split(5))), dim=2)
    assert max_error(parts, reference) <= 1e-9


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    ("rows", "columns", "chunk"),
    [*(pytest.param(2, 2, chunk, marks=pytest.mark.slow) for chunk in ("auto", 20)), (1, 1, "auto"), (4, 2, 16)],
)
def test_frames_that_wait_in_large_chunks_stay_what_they_are(family, exact, workers, rows, columns, chunk):
    # Few new frames a piece, so that many pieces wait in front of a stage, longer than the memory that they came in.
    video = random_video(family, frames=33, rows=rows, columns=columns, dtype=torch.float64)
    video[:, 1:] = video[:, 1::4].repeat_interleave(4, dim=1)
    reference = oracle_latents(exact, video[0]).permute(3, 0, 1, 2)[None]
    with load(exact, dtype="float64", chunk=chunk, devices=",".join(["cpu"] * workers)) as vae:
        for size in (1, 7):
            parts = torch.cat(list(vae.encode_stream(video[0].split(size))), dim=2)
            assert max_error(parts, reference) <= 1e-9, size
