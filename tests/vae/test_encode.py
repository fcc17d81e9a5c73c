"""Encoding as users call it: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import wan_vae_parallel as wvp
from tests.oracle import load, oracle_vae, random_video
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.runtime.local import LocalEncoder

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def video():
    """``[1, 9, 16, 24, 3]``: latents of 3 x 2 x 3."""
    return random_video("wan2.1", frames=9, rows=2, columns=3)


@pytest.fixture(scope="module")
def latents(oracle, video):
    with load(oracle, chunk=2) as vae:
        return vae.encode(video)


@pytest.fixture(autouse=True)
def _said_anew():
    dispatch.say_once.cache_clear()


def test_four_axes_are_one_video(vae, video, latents):
    assert torch.equal(vae.encode(video[0]), latents)


@pytest.mark.parametrize("frames", [10, 11, 12])
def test_frames_that_make_no_whole_latent_frame_are_left_out(vae, video, latents, frames):
    longer = torch.cat([video, video[:, : frames - 9]], dim=1)
    torch.testing.assert_close(vae.encode(longer), latents, **CLOSE)


def test_pictures_are_cut_to_their_middle_and_that_is_said(vae, video, latents, caplog):
    larger = torch.rand(1, 9, 16 + 7, 24 + 3, 3)
    larger[:, :, 3:19, 1:25] = video
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(vae.encode(larger), latents, **CLOSE)
    assert "frames of 27x23 are cut to 24x16, the middle of them" in caplog.text


def test_alpha_is_left_out(vae, video, latents):
    assert torch.equal(vae.encode(torch.cat([video, torch.rand(1, 9, 16, 24, 1)], dim=-1)), latents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_dtypes_and_strides(vae, video, dtype):
    given = video.to(dtype)
    expected = vae.encode(given.float())
    torch.testing.assert_close(vae.encode(given), expected, **CLOSE)
    strided = given.permute(4, 0, 1, 3, 2).contiguous().permute(1, 2, 4, 3, 0)
    torch.testing.assert_close(vae.encode(strided), expected, **CLOSE)


def test_the_callers_frames_stay_as_they_are_and_may_require_grad(vae, video, latents):
    given = video.clone().requires_grad_()
    encoded = vae.encode(given)
    assert torch.equal(encoded, latents)
    assert not encoded.requires_grad
    assert torch.equal(given.detach(), video)


def test_normalized_latents_are_what_the_diffusion_model_sees(vae, video, latents):
    normalized = vae.encode(video, normalized=True)
    torch.testing.assert_close(vae.decode(normalized, normalized=True), vae.decode(latents), atol=1e-4, rtol=0)
    assert not torch.equal(normalized, latents)


def test_on_chunk_sees_every_latent_frame_once_in_order(vae, monkeypatch):
    monkeypatch.setattr(vae, "chunk", 2)
    video = random_video("wan2.1", frames=13, rows=1, columns=2, batch=2)
    calls = []
    latents = vae.encode(video, on_chunk=lambda done, total, new: calls.append((done, total, new.clone())))
    assert [total for _, total, _ in calls] == [8] * len(calls)
    counts = [new.shape[2] for _, _, new in calls]
    assert [done for done, _, _ in calls] == [sum(counts[: i + 1]) for i in range(len(counts))]
    together = torch.cat([new for _, _, new in calls], dim=2)
    assert torch.equal(together, torch.cat(list(latents.split(1)), dim=2))


def test_what_on_chunk_raises_ends_the_encode_and_the_next_one_works(vae, video, latents):
    def stop(_done, _total, _latents):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        vae.encode(video, on_chunk=stop)
    assert torch.equal(vae.encode(video), latents)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_a_stream_gives_the_encodes_latents_whatever_its_parts(vae, video, latents, parts):
    stream = vae.encode_stream(video[0].split(parts))
    torch.testing.assert_close(torch.cat(list(stream), dim=2), latents, **CLOSE)


def test_a_stream_may_use_its_memory_again_and_end_anywhere(vae, video, latents):
    def frames():
        buffer = torch.empty_like(video[0, :1])
        for frame in (*video[0], *video[0, :2]):  # two more than latents have room for
            yield buffer.copy_(frame)
        buffer.fill_(math.nan)

    torch.testing.assert_close(torch.cat(list(vae.encode_stream(frames())), dim=2), latents, **CLOSE)


def test_a_stream_holds_no_more_than_a_few_steps_frames(vae, monkeypatch):
    monkeypatch.setattr(vae, "chunk", 2)
    taken = given = 0

    def frames():
        nonlocal taken
        for frame in torch.rand(41, 1, 8, 8, 3):
            taken += 1
            yield frame

    for latents in vae.encode_stream(frames()):
        given += latents.shape[2]
        assert taken <= 4 * given + 16
    assert (taken, given) == (41, 11)


def test_what_a_streams_source_raises_reaches_the_caller(vae, video, latents):
    def frames():
        yield video[0, :5]
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        list(vae.encode_stream(frames()))
    assert torch.equal(vae.encode(video), latents)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8), r"frames are uint8; .*frames\.float\(\) / 255"),
        (torch.zeros(1, 5, 16, 16, 3, dtype=torch.int64), "frames are int64; they must be floating point"),
        (torch.zeros(5, 16, 16), "have 3 axes"),
        (torch.zeros(0, 16, 16, 3), "are empty"),
        (torch.zeros(1, 5, 16, 16, 2), "have 2 channels, and this Wan 2.1 VAE takes 3"),
        (torch.zeros(1, 3, 81, 48, 83), "have 83 channels.*channels come last"),
        (torch.zeros(1, 3, 5, 16, 16), "have 16 channels.*channels come last"),  # as torch has pictures
        (torch.zeros(5, 7, 16, 3), "frames of 16x7 are smaller than a latent voxel of Wan 2.1, which has 8x8 pixels"),
        (torch.zeros(5, 3, 16, 24), r"have 24 channels.*channels come last, or take frames\.movedim\(-3, -1\)"),
        (torch.zeros(1, 3, 5, 16, 24), r"have 24 channels.*channels come last, or take frames\.movedim\(-4, -1\)"),
        (torch.zeros(5, 16, 16, 1), r"have 1 channels.*or take frames\.expand\(\*frames\.shape\[:-1\], 3\) of grey"),
        (torch.nested.nested_tensor([torch.zeros(5, 16, 16, 3)] * 2, layout=torch.jagged), "nested tensor"),
        ([[0.0]], "frames are of the type list"),
        (torch.zeros(5, 16, 16, 3).to_sparse(), "dense"),
        (torch.zeros(5, 16, 16, 3, device="meta"), "dense"),
    ],
)
def test_what_can_not_be_encoded_is_refused_with_its_reason(vae, frames, message):
    with pytest.raises(wvp.FrameError, match=message):
        vae.encode(frames)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("frame", [0, 8])
def test_values_that_are_not_finite_are_refused(vae, video, latents, frame, value):
    bad = video.clone()
    bad[0, frame, 3, 5, 1] = value
    with pytest.raises(wvp.FrameError, match="NaN or infinite"):
        vae.encode(bad)
    with pytest.raises(wvp.FrameError, match="NaN or infinite"):
        list(vae.encode_stream(bad[0].split(2)))
    assert torch.equal(vae.encode(video), latents)


def test_what_overflows_is_an_error_of_the_frames(vae, video):
    with pytest.raises(wvp.FrameError, match=r"latents are NaN, and float32 does not overflow with sound weights"):
        vae.encode(video * 3e38)


def test_values_far_outside_are_encoded_and_said_once(vae, video, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            vae.encode(video * 255)
    assert caplog.text.count("where pictures have [0, 1]") == 1


@pytest.mark.parametrize("other", [(16, 24, 3), (21, 21, 3), (16, 16, 4)])
def test_frames_of_other_sizes_in_a_stream_are_refused(vae, other):
    # Also where they are the same once they are cut, and alpha is left out.
    with pytest.raises(wvp.FrameError, match="must have one size and dtype"):
        list(vae.encode_stream([torch.rand(1, 16, 16, 3), torch.rand(4, *other)]))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.rand(5, 16, 16, 3), r"of the type Tensor; .* an iterable of tensors \[t, H, W, C\], or give \[frames\]"),
        ("video.mp4", "of the type str"),
        (None, "of the type NoneType"),
    ],
)
def test_what_is_no_stream_is_refused_at_the_call(vae, frames, words):
    with pytest.raises(wvp.FrameError, match=words):
        vae.encode_stream(frames)


def test_shapes_are_those_of_what_is_encoded_and_decoded(vae, video, latents):
    assert vae.latent_shape(video.shape) == latents.shape
    assert vae.latent_shape(list(video.shape[1:])) == latents.shape
    assert vae.output_shape(latents.shape) == vae.decode(latents).shape
    image = latents[:, :, 0]
    assert vae.output_shape(image.shape) == vae.decode(image).shape
    assert vae.memory_needed(image.shape) == vae.memory_needed(image.unsqueeze(2).shape)
    assert vae.encode_memory_needed(video.shape[1:]) == vae.encode_memory_needed(video.shape)


@pytest.mark.parametrize("shape", [None, 5, (5,), (1, 16, 2.5, 4, 4), (1, 16, -3, 4, 4), (1, 16, 0, 4, 4), "shape"])
def test_what_is_no_shape_is_refused(vae, shape):
    for call, error in (
        (vae.output_shape, wvp.LatentError),
        (vae.memory_needed, wvp.LatentError),
        (vae.latent_shape, wvp.FrameError),
        (vae.encode_memory_needed, wvp.FrameError),
    ):
        with pytest.raises(error):
            call(shape)


def test_a_stream_of_nothing_is_refused(vae):
    with pytest.raises(wvp.FrameError, match="the video is empty"):
        list(vae.encode_stream([]))


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_vae_without_an_encoder_says_so(devices):
    weights = {k: v for k, v in oracle_vae("wan2.1").state_dict().items() if not k.startswith(("encoder", "quant"))}
    with wvp.vae_from_state_dict(weights, devices=devices) as vae:
        for encode in (vae.encode, vae.encode_stream):
            with pytest.raises(wvp.CheckpointError, match="has no encoder"):
                encode(torch.zeros(1, 1, 8, 8, 3))


def test_a_closed_vae_says_so(video):
    vae = load(oracle_vae("wan2.1"))
    vae.close()
    with pytest.raises(wvp.ClosedError):
        vae.encode(video)


def test_one_line_an_encode_names_all_that_counts(video, caplog):
    with load(oracle_vae("wan2.1"), chunk=3) as vae, caplog.at_level(logging.INFO):
        vae.encode(video)
        vae.encode(video)
    first, second = [r.getMessage() for r in caplog.records if r.getMessage().startswith("encoded")]
    assert "encoded 9 frames of 24x16 on cpu, in float32, chunk 3, in " in first
    assert first.endswith("(first)")
    assert second.endswith("(warm)")


def test_encodes_may_have_a_dtype_of_their_own(video, latents):
    weights = oracle_vae("wan2.1").state_dict()
    with wvp.vae_from_state_dict(weights, devices="cpu", dtype="bfloat16", encode_dtype="float32") as vae:
        torch.testing.assert_close(vae.encode(video), latents, **CLOSE)
        assert (vae.dtype, vae.encode_dtype) == (torch.bfloat16, torch.float32)
    with wvp.vae_from_state_dict(weights, devices="cpu", dtype="bfloat16") as vae:
        assert vae.encode_dtype == torch.bfloat16
        assert not torch.allclose(vae.encode(video), latents, **CLOSE)


@pytest.mark.parametrize("at_piece", [0, 1, 3])  # before any latents, behind the first ones, with several handed out
def test_out_of_memory_goes_on_with_smaller_chunks_and_the_same_latents(vae, monkeypatch, caplog, at_piece):
    video = random_video("wan2.1", frames=33, rows=1, columns=2)
    monkeypatch.setattr(vae, "chunk", 1)
    expected = vae.encode(video)
    monkeypatch.setattr(vae, "chunk", 8)
    real, tried = LocalEncoder.stream, []

    def stream(self, pieces, window, chunk, **options):
        tried.append(chunk)
        for number, step in enumerate(real(self, pieces, window, chunk, **options)):
            if chunk > 1 and number == at_piece:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)\nand more lines")
            yield step

    monkeypatch.setattr(LocalEncoder, "stream", stream)
    done = []
    with caplog.at_level(logging.WARNING):
        encoded = vae.encode(video, on_chunk=lambda count, _, new: done.append((count, new.shape[2])))
    assert tried == [8, 4, 2, 1]
    assert [count for count, _ in done] == [sum(n for _, n in done[: i + 1]) for i in range(len(done))]
    assert done[-1][0] == 9
    torch.testing.assert_close(encoded, expected, **CLOSE)
    assert caplog.text.count("ran out of memory") == 1


def test_when_not_even_one_frame_fits_the_error_says_what_to_do(vae, video, latents, monkeypatch):
    with monkeypatch.context() as patch:

        def stream(*_arguments, **_options):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            yield

        patch.setattr(LocalEncoder, "stream", stream)
        with pytest.raises(wvp.OutOfMemoryError, match="24x16 does not fit on cpu even one frame at a time: it takes"):
            vae.encode(video)
        patch.setattr(vae, "chunk", 4)
        with pytest.raises(wvp.OutOfMemoryError, match="a stream can't be read again"):
            list(vae.encode_stream([video[0]]))
    assert torch.equal(vae.encode(video), latents)
