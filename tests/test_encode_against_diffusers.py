"""Encodes against diffusers' AutoencoderKLWan with random weights, through the API that users have."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import FAMILIES, load, max_error, oracle_latents, oracle_vae, random_video


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    return oracle_vae(family)


@pytest.fixture(scope="module")
def exact(family):
    return oracle_vae(family).double()


def expected(oracle, video):
    """``[B, z, t, h, w]``; frames beyond 4 n + 1 are not encoded."""
    used = (video.shape[1] - 1) // 4 * 4 + 1
    return torch.stack([oracle_latents(oracle, one[:used]).permute(3, 0, 1, 2) for one in video])


SHAPES = [  # frames, rows, columns, batch
    (1, 2, 3, 1),  # an image
    (2, 1, 1, 1),  # one frame too many; the smallest picture
    (4, 2, 1, 1),  # three too many
    (5, 3, 2, 2),  # odd multiples, a batch
    (6, 1, 3, 1),
    (9, 2, 2, 1),
    (17, 1, 2, 1),
    (33, 1, 1, 1),
]


@pytest.mark.parametrize("chunk", [1, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (2, 3)), "auto"])
@pytest.mark.parametrize(("frames", "rows", "columns", "batch"), SHAPES)
def test_fp32_is_within_the_bound_for_any_shape_and_chunk(family, oracle, frames, rows, columns, batch, chunk):
    video = random_video(family, frames=frames, rows=rows, columns=columns, batch=batch)
    reference = expected(oracle, video)
    with load(oracle, chunk=chunk) as vae:
        latents = vae.encode(video)
        assert latents.dtype == torch.float32
        assert latents.is_contiguous()
        assert latents.shape == vae.latent_shape(video.shape)
    assert max_error(latents, reference) <= 1e-4 * reference.std()


@pytest.mark.parametrize(("frames", "rows", "columns", "batch"), SHAPES)
def test_fp64_is_exact(family, exact, frames, rows, columns, batch):
    video = random_video(family, frames=frames, rows=rows, columns=columns, batch=batch, dtype=torch.float64)
    reference = expected(exact, video)
    with load(exact, dtype="float64") as vae:
        for chunk in (1, 2, 3, "auto"):
            vae.chunk = chunk
            latents = vae.encode(video)
            assert latents.dtype == torch.float64
            assert max_error(latents, reference) <= 1e-9, chunk


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_at_most_as_much_as_diffusers_in_it(family, oracle, exact, dtype):
    """Both round at many places, so their errors vary: 1.5 is the margin for that, not for a mistake."""
    video = random_video(family, frames=5, rows=2, columns=2)
    reference = expected(exact, video.double())
    half = oracle_vae(family).to(getattr(torch, dtype))
    theirs = expected(half, video.to(getattr(torch, dtype)))
    with load(oracle, dtype=dtype) as vae:
        ours = vae.encode(video)

    def error(latents):
        return (latents.double() - reference).square().mean().sqrt()

    assert error(ours) <= 1.5 * error(theirs)


def test_what_an_encode_and_a_decode_make_fits(family, oracle):
    video = random_video(family, frames=9, rows=1, columns=2)
    with load(oracle) as vae:
        assert vae.decode(vae.encode(video)).shape == video.shape
