"""The VAE that users hold: decoding, streaming, callbacks, life cycle.

Exact where the same steps run in the same order; close where chunks differ, since torch picks its CPU kernels by
shape. That frames are right is the business of test_against_diffusers.py.
"""

from __future__ import annotations

import gc
import itertools
import os
import weakref

import pytest
import torch
from safetensors.torch import save_file

import wan_vae_parallel as wvp
from tests.oracle import decode_at_once, load, oracle_vae, random_latents
from wan_vae_parallel import cancel
from wan_vae_parallel.cancel import check_cancelled
from wan_vae_parallel.files.latents import denormalize
from wan_vae_parallel.memory import decode_memory, encode_memory, encoder_parameter_count, parameter_count

CLOSE = {"atol": 1e-5, "rtol": 0}


# Callbacks.


@pytest.mark.parametrize("batch", [1, 2])
def test_on_chunk_sees_every_frame_once_in_order(family, family_vae, batch):
    latents = random_latents(family, frames=6, rows=2, columns=3, batch=batch)
    calls = []
    decoded = family_vae.decode(
        latents, on_chunk=lambda done, total, frames: calls.append((done, total, frames.clone()))
    )
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[0] == 1  # the first frame does not wait for the rest
    assert done[-1] == 21
    assert {call[1] for call in calls} == {21}
    assert [call[2].shape[1] for call in calls] == [after - before for before, after in itertools.pairwise([0, *done])]
    assert torch.equal(torch.cat([call[2] for call in calls], dim=1), decoded)


class Interrupt(Exception):
    """What a user interface raises to stop a decode."""


@pytest.mark.parametrize("at", [1, 5, 21])  # the first call, one in between, the last
def test_what_on_chunk_raises_reaches_the_caller_and_the_vae_goes_on_working(vae, latents, at):
    expected = vae.decode(latents)
    interrupt = Interrupt()
    calls = []

    def stop(done, _total, _frames):
        calls.append(done)
        if done >= at:
            raise interrupt

    with pytest.raises(Interrupt) as raised:
        vae.decode(latents, on_chunk=stop)
    assert raised.value is interrupt
    assert [done for done in calls if done >= at] == calls[-1:]  # not called again
    assert torch.equal(vae.decode(latents), expected)


def test_an_error_of_on_chunk_that_looks_like_running_out_of_memory_is_not_retried(vae, latents):
    # Only the decode's own is: the callback's frames may be lost already.
    calls = []

    def fail(done, _total, _frames):
        calls.append(done)
        raise torch.OutOfMemoryError("the caller's own")

    with pytest.raises(torch.OutOfMemoryError, match="the caller's own"):
        vae.decode(latents, on_chunk=fail)
    assert calls == [1]


# Streams.


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_hands_out_the_decodes_frames(family, family_vae, batch):
    latents = random_latents(family, frames=6, rows=2, columns=3, batch=batch)
    parts = list(family_vae.decode_stream(latents))
    assert len(parts) > 5
    assert all(part.shape[1] <= 2 for part in parts)
    assert torch.equal(torch.cat(parts, dim=1), family_vae.decode(latents))


def test_handed_out_frames_stay_as_they_are_while_others_follow(vae, latents):
    parts, copies = [], []
    for part in vae.decode_stream(latents):
        parts.append(part)
        copies.append(part.clone())
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def test_a_stream_may_be_closed_or_dropped_at_any_time(vae, latents):
    expected = vae.decode(latents)
    for taken in (0, 1, 3):
        stream = vae.decode_stream(latents)
        for _ in range(taken):
            next(stream)
        stream.close()
    dropped = vae.decode_stream(latents)
    next(dropped)
    del dropped
    assert torch.equal(vae.decode(latents), expected)


@pytest.mark.parametrize("what", ["decode_stream", "pixel_stream", "encode_stream", "decode", "encode"])
def test_what_ended_early_holds_nothing_though_its_iterator_is_held(vae, latents, monkeypatch, what):
    """Some versions of Python (3.12.3) do not clear a generator that was closed where it handles no exception."""
    runs = []
    for name in ("run", "encode"):
        real = getattr(vae._engine, name)

        def begun(*arguments, real=real):
            run = real(*arguments)
            runs.append(weakref.ref(run))
            return run

        monkeypatch.setattr(vae._engine, name, begun)

    def stop(*_):
        raise KeyError("enough")

    frames = torch.rand(1, 13, 16, 24, 3, generator=torch.Generator().manual_seed(1))
    gc.collect()
    gc.disable()
    try:
        if what.endswith("stream"):
            given = (latents, None) if what == "pixel_stream" else (latents,)
            stream = vae.encode_stream(frames[0].split(5)) if what == "encode_stream" else getattr(vae, what)(*given)
            next(stream)
            assert runs[-1]()
            stream.close()
        else:
            with pytest.raises(KeyError):
                getattr(vae, what)(latents if what == "decode" else frames, on_chunk=stop)
        assert len(runs) == 1
        assert not runs[-1]()
    finally:
        gc.enable()


def test_two_streams_at_a_time_do_not_mix(vae, latents):
    others = latents.flip(-1).contiguous()
    pairs = list(zip(vae.decode_stream(latents), vae.decode_stream(others), strict=True))
    assert torch.equal(torch.cat([pair[0] for pair in pairs], dim=1), vae.decode(latents))
    assert torch.equal(torch.cat([pair[1] for pair in pairs], dim=1), vae.decode(others))


def test_a_stream_refuses_bad_latents_at_the_call(vae, latents):
    with pytest.raises(wvp.LatentError, match="48 channels"):
        vae.decode_stream(random_latents("wan2.2", frames=2, rows=2, columns=2))
    latents[0, 0, 3, 0, 0] = torch.nan
    with pytest.raises(wvp.LatentError, match="1 NaN"):
        vae.decode_stream(latents)


# Latents as they come.


def _strided(latents):
    return latents.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)


def _sliced(latents):
    padded = torch.full([2 * size for size in latents.shape], torch.nan)
    padded[::2, ::2, ::2, ::2, ::2] = latents
    return padded[::2, ::2, ::2, ::2, ::2]


def _channels_last(latents):
    return latents.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("arrange", [_strided, _sliced, _channels_last])
def test_latents_of_any_strides(vae, latents, arrange):
    arranged = arrange(latents)
    assert not arranged.is_contiguous()
    assert torch.equal(vae.decode(arranged), vae.decode(latents))


def test_expanded_latents(vae):
    # Stride 0: one frame shown for a while.
    latents = random_latents("wan2.1", frames=1, rows=2, columns=3).expand(-1, -1, 4, -1, -1)
    assert torch.equal(vae.decode(latents), vae.decode(latents.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_float_dtype(vae, latents, dtype):
    other = latents.to(dtype)
    decoded = vae.decode(other)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, vae.decode(other.float()))


def test_latents_that_require_grad(vae, latents):
    decoded = vae.decode(latents.clone().requires_grad_())
    assert not decoded.requires_grad
    assert torch.equal(decoded, vae.decode(latents))


def test_latents_stay_as_they_are(vae, latents):
    before = latents.clone()
    vae.decode(latents)
    vae.decode(latents, normalized=True)
    assert torch.equal(latents, before)


def test_normalized_latents_get_the_published_mean_and_deviation(family, family_vae):
    latents = random_latents(family, frames=2, rows=2, columns=3)
    by_hand = denormalize(latents, family_vae.architecture)
    decoded = family_vae.decode(latents, normalized=True)
    assert torch.equal(decoded, family_vae.decode(by_hand))
    assert not torch.equal(decoded, family_vae.decode(latents))
    assert torch.equal(torch.cat(list(family_vae.decode_stream(latents, normalized=True)), dim=1), decoded)


def test_normalized_latents_of_channels_without_published_statistics_are_refused():
    vae = load(oracle_vae("wan2.1", z_dim=12))
    with pytest.raises(wvp.LatentError, match=r"none are published for Wan 2\.1 with 12 channels"):
        vae.decode(random_latents("wan2.1", frames=1, rows=1, columns=1, z_dim=12), normalized=True)


# Inference mode and threads: ComfyUI runs prompts on a thread of its own, under inference mode.


def test_decodes_inside_and_outside_of_inference_mode_alternately(vae, latents):
    expected = vae.decode(latents)
    for _ in range(2):
        with torch.inference_mode():
            inside = vae.decode(latents)
            inside_stream = torch.cat(list(vae.decode_stream(latents)), dim=1)
            from_inside = latents.clone()
        assert torch.equal(inside, expected)
        assert torch.equal(inside_stream, expected)
        outside = vae.decode(from_inside)
        assert torch.equal(outside, expected)
        outside.mul_(2)  # an inference tensor would refuse
        outside.requires_grad_()


def test_streamed_frames_can_be_written_to(vae, latents):
    for frames in vae.decode_stream(latents):
        frames.mul_(255)  # an inference tensor would refuse


def test_leaves_the_callers_modes_as_they_are(vae, latents):
    for _ in vae.decode_stream(latents):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_several_threads_decode_at_once(vae):
    videos = [torch.roll(random_latents("wan2.1", frames=5, rows=2, columns=3), i, dims=-1) for i in range(4)]
    expected = [vae.decode(video) for video in videos]
    vae.release()  # and the weights are loaded again by whoever comes first
    for frames, right in zip(decode_at_once(vae, videos), expected, strict=True):
        torch.testing.assert_close(frames, right, **CLOSE)


# Life cycle.


def test_released_weights_come_back_at_the_next_decode(vae, latents):
    expected = vae.decode(latents)
    assert vae.loaded
    vae.release()
    assert not vae.loaded
    assert torch.equal(vae.decode(latents), expected)
    assert vae.loaded
    vae.release()
    vae.release()  # twice is fine


def test_releasing_during_a_stream_does_not_hurt_it(vae, latents):
    stream = vae.decode_stream(latents)
    parts = [next(stream)]
    vae.release()
    parts += stream
    assert torch.equal(torch.cat(parts, dim=1), vae.decode(latents))


def test_a_closed_vae_says_so(vae, latents):
    vae.decode(latents)
    vae.close()
    assert not vae.loaded
    for decode in (vae.decode, vae.decode_stream):
        with pytest.raises(wvp.ClosedError, match="this VAE is closed; load it again"):
            decode(latents)
    vae.close()  # twice is fine


def test_a_vae_that_is_closed_while_it_decodes_says_so(vae, latents):
    with pytest.raises(wvp.ClosedError, match="this VAE was closed while it worked; load it again"):
        vae.decode(latents, on_chunk=lambda *_: vae.close())
    assert issubclass(wvp.ClosedError, wvp.WanVAEError)


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_that_are_no_numbers_are_named_and_no_dtype_is_advised(oracle, dtype, devices):
    if devices != "cpu" and dtype != "float32":
        pytest.skip("the same for any dtype")
    damaged = {key: tensor.clone() for key, tensor in oracle.state_dict().items()}
    damaged["decoder.conv_out.bias"].fill_(torch.nan)
    damaged["quant_conv.bias"].fill_(torch.inf)  # the encoder's
    with wvp.vae_from_state_dict(damaged, devices=devices, dtype=dtype) as vae:
        words = (
            r"the frames are NaN, since the state dict has weights that are no numbers: decoder\.head\.2\.bias; fetch"
        )
        with pytest.raises(wvp.CheckpointError, match=words) as raised:
            vae.decode(random_latents("wan2.1", frames=1, rows=2, columns=2))
        assert "try" not in str(raised.value)
        with pytest.raises(
            wvp.CheckpointError, match=r"the latents are NaN, since .*: conv1\.bias; fetch the VAE again"
        ):
            vae.encode(torch.rand(1, 1, 16, 16, 3))


def test_a_with_block_closes_whatever_happens(oracle, latents):
    with load(oracle) as vae:
        vae.decode(latents)
    with pytest.raises(wvp.WanVAEError, match="closed"):
        vae.decode(latents)
    with pytest.raises(Interrupt), load(oracle) as failing:
        raise Interrupt
    with pytest.raises(wvp.WanVAEError, match="closed"):
        failing.decode(latents)


def test_a_file_that_became_another_vae_meanwhile_is_noticed(tmp_path, oracle, latents):
    path = tmp_path / "vae.safetensors"
    save_file(oracle.state_dict(), path)
    vae = wvp.load_vae(path, devices="cpu")
    vae.decode(latents)
    vae.release()
    save_file(oracle_vae("wan2.1", width=16).state_dict(), path)
    with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors was replaced since it was loaded; load"):
        vae.decode(latents)
    path.unlink()
    with pytest.raises(wvp.CheckpointError, match="does not exist"):
        vae.decode(latents)


def test_weights_on_the_device_do_not_follow_the_callers_tensors(oracle, latents):
    state_dict = {key: tensor.clone() for key, tensor in oracle.state_dict().items()}
    vae = wvp.vae_from_state_dict(state_dict, devices="cpu")
    expected = vae.decode(latents)
    for tensor in state_dict.values():
        tensor.zero_()
    assert torch.equal(vae.decode(latents), expected)


def test_errors_call_a_state_dict_by_its_name():
    with pytest.raises(wvp.CheckpointError, match="the loader's output is not a Wan VAE"):
        wvp.vae_from_state_dict({}, name="the loader's output", devices="cpu")


# Options.


@pytest.mark.parametrize("chunk", [0, -1, "big", True, 1.5, None])
def test_a_chunk_that_is_none_is_refused(oracle, chunk):
    with pytest.raises(ValueError, match=r"chunk is .*; it must be 'auto' or a whole number of frames"):
        load(oracle, chunk=chunk)


def test_several_devices_are_refused_where_torch_can_not_join_them(oracle, monkeypatch):
    # As on Windows, which has no NCCL.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda backend: backend != "nccl")
    with pytest.raises(wvp.DeviceError, match=r"there are 2 devices in .*, but this torch has no nccl; name one"):
        load(oracle, devices="cuda:0,cuda:1")


def test_devices_are_a_tuple_of_what_was_named(oracle):
    assert load(oracle, devices="cpu").devices == (torch.device("cpu"),)
    # No worker starts before there is something to decode.
    several = load(oracle, devices="cpu,cpu,cpu")
    assert several.devices == (torch.device("cpu"),) * 3
    assert not several.loaded


def test_bad_devices_and_dtypes_are_refused_at_the_call(oracle):
    with pytest.raises(wvp.DeviceError, match="no device"):
        load(oracle, devices="tpu")
    with pytest.raises(wvp.DeviceError, match="dtype is 'int8'"):
        load(oracle, dtype="int8")


def test_memory_needed_is_that_of_the_chunk(vae):
    size = (2, 9, 4, 6)
    expected = decode_memory(vae.architecture, size, chunk=2, dtype=torch.float32, kernels=False)
    assert vae.memory_needed((2, 16, 9, 4, 6)) == expected.total
    assert expected.weights == 4 * parameter_count(vae.architecture)


def test_memory_that_an_encode_needs_is_that_of_the_chunk(vae):
    # 31 rows and 50 columns of pixels make 3 and 6 of latents; the batch is encoded one by one.
    vae.chunk = 3
    expected = encode_memory(vae.architecture, (3, 6), chunk=3, image=False, dtype=torch.float32, kernels=False)
    assert vae.encode_memory_needed((2, 9, 31, 50, 3)) == expected.total
    image = encode_memory(vae.architecture, (3, 6), chunk=1, image=True, dtype=torch.float32, kernels=False)
    assert vae.encode_memory_needed((1, 3, 31, 50, 3)) == image.total
    for shape, words in (((1, 9, 7, 50, 3), "50x7 are smaller than a latent voxel"), ((1, 0, 31, 50, 3), "are empty")):
        with pytest.raises(wvp.FrameError, match=words):
            vae.encode_memory_needed(shape)


def test_the_weights_that_count_are_those_that_are_loaded(vae, latents):
    decoder, encoder = vae.part_size("decoder"), vae.part_size("encoder")
    assert (decoder, encoder) == (4 * parameter_count(vae.architecture), 4 * encoder_parameter_count(vae.architecture))
    assert (vae.weights_size, vae.memory_held, vae.loaded_parts) == (decoder, 0, frozenset())
    vae.encode(torch.rand(1, 1, 16, 16, 3))
    assert (vae.weights_size, vae.memory_held, vae.loaded_parts) == (encoder, encoder, {"encoder"})
    vae.decode(latents)
    assert (vae.weights_size, vae.memory_held) == (encoder + decoder, encoder + decoder)
    vae.release()
    assert (vae.weights_size, vae.memory_held, vae.loaded_parts) == (decoder, 0, frozenset())


def test_what_the_caller_raises_while_it_waits_ends_an_encode_between_two_latents(vae):
    # With 16 pictures at once, whose latents come together.
    vae.chunk = 16
    waits = []

    def interrupt():
        waits.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.encode(torch.rand(1, 33, 16, 16, 3), on_wait=interrupt)
    assert waits == [1]
    vae.encode(torch.rand(1, 1, 16, 16, 3))


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_a_step_on_one_device_ends_at_its_next_layer_where_it_is_cancelled(vae, latents, way, monkeypatch):
    monkeypatch.setattr(cancel, "LOOK_SECONDS", 0.0)
    vae.chunk = 16
    given = latents if way == "decode" else torch.rand(1, 33, 16, 16, 3)
    asked, parts = [], []

    def run(last=0):
        asked.clear()
        parts.clear()

        def on_wait():
            asked.append(True)
            if len(asked) == last:
                raise KeyboardInterrupt

        return getattr(vae, way)(given, on_wait=on_wait, on_chunk=lambda *part: parts.append(part))

    run()  # reads the weights
    expected = run()
    layers, all_parts = len(asked), len(parts)
    assert layers > 40  # of two steps, over twenty each
    for last in (1, layers // 4, layers // 2, layers):
        with pytest.raises(KeyboardInterrupt):
            run(last)
        assert len(asked) == last
        assert len(parts) < all_parts
    assert torch.equal(run(), expected)


# What a first user does to it.


def test_arguments_may_be_positional(oracle, tmp_path, latents):
    save_file(oracle.state_dict(), tmp_path / "vae.safetensors")
    with wvp.load_vae(tmp_path / "vae.safetensors", "cpu", "float32", 2) as vae:
        assert torch.equal(vae.decode(latents, True), vae.decode(denormalize(latents, vae.architecture)))


def test_other_weights_than_those_that_were_checked_never_decode(oracle, tmp_path, latents):
    path = tmp_path / "vae.safetensors"
    save_file(oracle.state_dict(), path)
    vae = wvp.load_vae(path, devices="cpu", chunk=2)
    # Of the same shapes, before the first decode.
    save_file({key: tensor * 2 for key, tensor in oracle.state_dict().items()}, path)
    with pytest.raises(wvp.CheckpointError, match="was replaced since it was loaded"):
        vae.decode(latents)


def test_nor_do_those_that_were_written_over_with_the_file_s_time_set_back(oracle, tmp_path, latents):
    path = tmp_path / "vae.safetensors"
    save_file(oracle.state_dict(), path)
    other = tmp_path / "other.safetensors"
    save_file({key: tensor * 2 for key, tensor in oracle.state_dict().items()}, other)
    before = path.stat()
    vae = wvp.load_vae(path, devices="cpu", chunk=2)
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (before.st_size, before.st_ino)
    with pytest.raises(wvp.CheckpointError, match="was replaced since it was loaded"):
        vae.decode(latents)


def test_a_state_dict_may_be_emptied_after_loading(oracle, latents):
    tensors = dict(oracle.state_dict())
    vae = wvp.vae_from_state_dict(tensors, devices="cpu", chunk=2)
    tensors.clear()
    assert torch.equal(vae.decode(latents), load(oracle, chunk=2).decode(latents))


def test_a_stream_ends_with_its_vae(vae, latents):
    begun, not_begun = vae.decode_stream(latents), vae.decode_stream(latents)
    next(begun)
    vae.close()
    for stream in (begun, not_begun):
        with pytest.raises(wvp.WanVAEError, match="closed"):
            next(stream)


def test_latents_beyond_the_dtype_are_refused(oracle, latents):
    with pytest.raises(wvp.LatentError, match=r"reach 1e\+06, and float16 ends at"):
        load(oracle, dtype="float16").decode(torch.full_like(latents, 1e6))


def test_sparse_and_meta_latents_are_refused(vae):
    for strange in (torch.zeros(1, 16, 1, 2, 2).to_sparse(), torch.zeros(1, 16, 1, 2, 2, device="meta")):
        with pytest.raises(wvp.LatentError, match="ordinary, dense"):
            vae.decode(strange)


@pytest.mark.parametrize("way", ["decode_stream", "encode_stream"])
def test_a_stream_can_be_cancelled_and_leaves_the_caller_alone(vae, latents, way):
    given = latents if way == "decode_stream" else torch.rand(3, 4, 16, 16, 3)
    asked, enough = [], []

    def on_wait():
        asked.append(True)
        if enough:
            raise TimeoutError("cancelled")

    def source():
        for part in given:
            check_cancelled()
            yield part

    stream = getattr(vae, way)(source() if way == "encode_stream" else given, on_wait=on_wait)
    next(stream)
    before = len(asked)
    enough.append(True)
    check_cancelled()  # between two steps nothing is asked
    assert len(asked) == before
    if way == "encode_stream":
        with pytest.raises(TimeoutError, match="cancelled"):
            list(stream)
