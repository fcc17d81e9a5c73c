"""Images: one latent frame each; a batch goes through together, without a past and without time convolutions."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import FAMILIES, RATIO, load, max_error, oracle_frames, oracle_latents, oracle_vae, random_latents
from wan_vae_parallel import Architecture
from wan_vae_parallel.files.latents import normalize
from wan_vae_parallel.memory import decode_memory, images_that_pay, largest_chunk
from wan_vae_parallel.model.decoder import WanDecoder
from wan_vae_parallel.model.encoder import WanEncoder
from wan_vae_parallel.model.layers import CausalConv3d
from wan_vae_parallel.ops import conv as conv_ops

FP32_BOUND = 1e-4
FP64_BOUND = 1e-9


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    return oracle_vae(family)


def pictures(family, count=5):
    """``[B, 1, H, W, C]``, of which the third and fourth are the same."""
    shape = (count, 1, 4 * RATIO[family], 3 * RATIO[family], 3)
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    frames[3] = frames[2]
    return frames


@pytest.fixture(scope="module")
def encoded(family, oracle):
    """What the oracle encodes `pictures` to, one after the other."""
    return torch.stack([oracle_latents(oracle, picture).permute(3, 0, 1, 2) for picture in pictures(family)])


@pytest.fixture
def convolved(monkeypatch):
    """Shapes of the weights that convolutions are called with, and numbers of the slots that they read."""
    seen = []
    convolve = conv_ops._convolved

    def spy(arena, slots, weight, *rest):
        seen.append((tuple(weight.shape[2:]), slots.numel()))
        return convolve(arena, slots, weight, *rest)

    monkeypatch.setattr(conv_ops, "_convolved", spy)
    return seen


@pytest.mark.parametrize("chunk", ["auto", 1, 2, 100])
def test_a_batch_is_the_oracles_whatever_goes_through_together(family, oracle, chunk):
    latents = random_latents(family, batch=5, frames=1, rows=3, columns=2)
    with load(oracle, chunk=chunk) as vae:
        images = vae.decode(latents)
        assert images.shape == (5, 1, 3 * RATIO[family], 2 * RATIO[family], 3)
        assert max_error(images, oracle_frames(oracle, latents)) <= FP32_BOUND
        # What ComfyUI passes, without the axis.
        assert torch.equal(vae.decode(latents[:, :, 0]), images)
        assert torch.equal(torch.cat(list(vae.decode_stream(latents)), dim=1), images)


def test_images_are_videos_first_frames(family):
    """In fp64: the library's sums differ in their order."""
    oracle = oracle_vae(family).double()
    latents = random_latents(family, batch=2, frames=2, rows=3, columns=2).double()
    with load(oracle, dtype="float64") as vae:
        assert max_error(vae.decode(latents[:, :, :1]), vae.decode(latents)[:, :1]) <= FP64_BOUND


def test_on_two_devices_along_either_axis(family, oracle, encoded):
    if family == "wan2.1":
        pytest.skip("Wan 2.2 has all that it has, and shortcuts")
    with load(oracle, devices="cpu,cpu", chunk=2) as vae:
        for rows, columns in ((4, 3), (3, 4)):
            latents = random_latents(family, batch=3, frames=1, rows=rows, columns=columns)
            assert max_error(vae.decode(latents), oracle_frames(oracle, latents)) <= FP32_BOUND
        assert max_error(vae.encode(pictures(family)), encoded) <= FP32_BOUND
        turned = pictures(family).transpose(2, 3)[:2]  # more columns than rows
        expected = torch.stack([oracle_latents(oracle, picture).permute(3, 0, 1, 2) for picture in turned])
        assert max_error(vae.encode(turned), expected) <= FP32_BOUND


def test_no_blank_frame_is_read_and_no_time_convolution_called(family, oracle, convolved):
    with load(oracle) as vae:
        vae.decode(random_latents(family, batch=3, frames=1, rows=2, columns=2))
        assert {kernel for kernel, _ in convolved} == {(1, 3, 3)}
        assert {slots for _, slots in convolved} == {3}
        convolved.clear()
        vae.encode(torch.rand(1, 1, 2 * RATIO[family], 2 * RATIO[family], 3))
        # The first of the encoder's reads neighbourhoods that are gathered before.
        assert {kernel for kernel, _ in convolved} == {(1, 3, 3), (1, 1, 1)}
        assert {slots for _, slots in convolved} == {1}


def test_videos_are_as_they_were(family, oracle, convolved):
    with load(oracle, chunk=1) as vae:
        vae.decode(random_latents(family, frames=2, rows=2, columns=2))
    assert {kernel for kernel, _ in convolved} == {(3, 3, 3), (3, 1, 1)}
    assert {slots for kernel, slots in convolved if kernel == (3, 3, 3)} == {3}


@pytest.mark.parametrize("chunk", ["auto", 1, 2, 100])
def test_pictures_encode_together_whatever_goes_at_once(family, oracle, encoded, chunk):
    seen = []
    with load(oracle, chunk=chunk) as vae:
        latents = vae.encode(pictures(family), on_chunk=lambda done, total, newest: seen.append((done, total, newest)))
        assert latents.is_contiguous()
        assert max_error(latents, encoded) <= FP32_BOUND
    assert seen[-1][:2] == (5, 5)
    assert sum(newest.shape[2] for *_, newest in seen) == 5


def test_a_picture_that_equals_the_one_before_is_not_computed_again(family, oracle, convolved):
    with load(oracle, chunk=1) as vae:
        vae.encode(pictures(family, 4)[:3])
        three = len(convolved)
        vae.encode(pictures(family, 4))
    assert len(convolved) == 2 * three


def test_an_encode_that_is_normalised_is_so_for_each_picture(family, oracle, encoded):
    with load(oracle) as vae:
        latents = vae.encode(pictures(family), normalized=True)
        torch.testing.assert_close(latents, normalize(encoded, vae.architecture), atol=FP32_BOUND, rtol=1e-4)


@pytest.mark.parametrize("model", [WanDecoder, WanEncoder])
def test_no_page_is_for_a_past(family, model):
    with torch.device("meta"):
        built = model(Architecture.published(family, width=16))
    images, video = built.page_needs(2, image=True), built.page_needs(2)
    assert all(need.kept == need.convs == 0 for need in images.values())
    assert any(need.kept for need in video.values())
    for key, need in images.items():
        assert need.slots(1, keeps=False) < video[key].slots(1, keeps=True)
    time_convs = {m.key for m in built.modules() if isinstance(m, CausalConv3d) and m.kind.kernel == (3, 1, 1)}
    if model is WanDecoder:
        assert time_convs
        assert not time_convs & images.keys()


def test_the_present_frames_weight_is_a_third_and_made_anew_with_the_weights():
    conv = CausalConv3d(4, 4, scale=1)
    for seed in (0, 1):
        weight = torch.randn(4, 4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        conv.load_state_dict({"weight": weight, "bias": torch.zeros(4)}, assign=True)
        present = conv.present_weight()
        assert torch.equal(present, weight[:, :, 2:])
        assert present.is_contiguous(memory_format=torch.channels_last_3d)
        assert conv.present_weight() is present


def test_as_many_go_together_as_pay_and_fit():
    architecture, settings = Architecture.published("wan2.1"), {"dtype": torch.bfloat16, "kernels": True}
    assert [images_that_pay(architecture, rows, rows) for rows in (64, 166, 512)] == [14, 2, 1]
    # Of 8 of 1328x1328 two, and one where memory is short.
    size = (8, 1, 166, 166)
    assert largest_chunk(architecture, size, free=80 * 2**30, **settings) == 2
    one, two = (decode_memory(architecture, size, chunk=chunk, **settings).total for chunk in (1, 2))
    assert one < two
    assert largest_chunk(architecture, size, free=round(one / 0.9) + 2**20, **settings) == 1


def test_an_image_takes_less_than_a_videos_step():
    architecture = Architecture.published("wan2.1")
    image, video = (
        decode_memory(architecture, (1, frames, 512, 512), chunk=1, dtype=torch.bfloat16, kernels=True)
        for frames in (1, 2)
    )
    assert image.caches == 0
    assert image.total < video.total - video.caches / 2
    # 4096x4096: three frames of the last stage, those of the one before, and what they are made of.
    assert image.total < 21 * 2**30
