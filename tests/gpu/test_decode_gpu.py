"""Decoding on one CUDA device: precision, layouts, the way to the host; memory is test_decode_memory_gpu.py's."""

from __future__ import annotations

import contextlib
import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import wan_vae_parallel as wvp
from tests.gpu.device import CUDA, clear
from tests.layouts import layouts_of_a_decode
from tests.oracle import load, max_error, oracle_frames, oracle_vae, random_latents
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.runtime.device_to_host import to_host
from wan_vae_parallel.runtime.local import LocalDecoder
from wan_vae_parallel.runtime.steps import Frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
    pytest.mark.usefixtures("clean_device"),
]

# cuDNN's and torch's kernels that do nothing but change the order of axes.
LAYOUT_KERNEL = re.compile(
    r"nchw_?to_?nhwc|nhwc_?to_?nchw|nchw_?2_?nhwc|nhwc_?2_?nchw|tensor_?transform|transpose_?(readwrite|kernel|3d|2d)",
    re.IGNORECASE,
)


@contextlib.contextmanager
def tf32(allowed: bool):
    """TF32 allowed or not in the whole process, as a host program may have set it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_device(oracle, dtype):
    return copy.deepcopy(oracle).to(CUDA, dtype)


def half_precision_errors(oracle, family, dtype_name):
    """Errors in a half precision against the fp32 oracle: (the engine's, diffusers'), each on all values."""
    dtype = getattr(torch, dtype_name)
    latents = random_latents(family, frames=5, rows=12, columns=20)
    with tf32(allowed=False):
        exact = oracle_frames(on_device(oracle, torch.float32), latents.to(CUDA)).cpu()
    clear()
    peer = oracle_frames(on_device(oracle, dtype), latents.to(CUDA, dtype)).float().cpu()
    clear()
    ours = load(oracle, dtype=dtype_name, devices="cuda:0").decode(latents)
    return (ours - exact).abs(), (peer - exact).abs()


# Precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_diffusers(family, oracle, dtype):
    ours, peer = half_precision_errors(oracle, family, dtype)
    print(f"\n{family} {dtype}: max {ours.max():.2e} (diffusers {peer.max():.2e}), "
          f"mean {ours.mean():.2e} (diffusers {peer.mean():.2e})")  # fmt: skip
    assert ours.isfinite().all()
    assert ours.mean() <= peer.mean()
    assert ours.square().mean() <= peer.square().mean()
    assert ours.max() <= peer.max()


@pytest.mark.parametrize("chunk", [1, 2, "auto"])
def test_fp32_is_fp32_even_where_the_program_allowed_tf32(family, oracle, chunk):
    latents = random_latents(family, frames=4, rows=5, columns=7)
    with tf32(allowed=True):
        decoded = load(oracle, chunk=chunk, devices="cuda:0").decode(latents)
        # And it stays allowed for the program.
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    assert max_error(decoded, load(oracle).decode(latents)) <= 1e-4


def test_fp64_agrees_with_the_cpu(family):
    oracle = oracle_vae(family)
    latents = random_latents(family, frames=3, rows=3, columns=4).double()
    decoded = load(oracle, dtype="float64", devices="cuda:0").decode(latents)
    assert max_error(decoded, load(oracle, dtype="float64").decode(latents)) <= 1e-9


def test_auto_is_bf16_on_all_gpus(wan21):
    with wvp.vae_from_state_dict(wan21.state_dict()) as vae:
        assert (vae.devices[0], vae.dtype) == (CUDA, torch.bfloat16)
        assert len(vae.devices) == torch.cuda.device_count()


# Layouts.


def arranged(state_dict, interleaved):
    """The same weights, convolutions' in channels-last order or not."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if interleaved else {}
    return {
        key: tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))
        for key, tensor in state_dict.items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frames_do_not_depend_on_the_format_that_weights_come_in(family, oracle, dtype):
    latents = random_latents(family, frames=3, rows=6, columns=10)
    planar, interleaved = (
        wvp.vae_from_state_dict(arranged(oracle.state_dict(), order), devices="cuda:0", dtype=dtype).decode(latents)
        for order in (False, True)
    )
    assert torch.equal(planar, interleaved)


def test_frames_do_not_depend_on_the_strides_or_the_device_of_latents(family, oracle):
    vae = load(oracle, dtype="bfloat16", devices="cuda:0")
    latents = random_latents(family, frames=3, rows=6, columns=10)
    expected = vae.decode(latents)
    assert torch.equal(vae.decode(latents.to(CUDA)), expected)
    assert torch.equal(vae.decode(latents.contiguous(memory_format=torch.channels_last_3d)), expected)


def test_every_convolution_of_torchs_is_channels_last_and_no_copy_reorders(family, oracle):
    # fp32 has no kernels of our own.
    checkpoint = checkpoint_from_state_dict(oracle.state_dict(), source="the oracle")
    decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=CUDA, dtype=torch.float32)
    latents = random_latents(family, frames=4, rows=6, columns=10)
    spy = layouts_of_a_decode(decoder, latents, 2)
    assert spy.convolutions > 60
    assert not spy.planar
    # But for the latents on their way in.
    assert not [
        reordered for reordered in spy.reordered if f"takes {tuple(latents[0].movedim(0, -1).shape)}" not in reordered
    ]


def test_half_precision_asks_torch_for_no_convolution(family, oracle):
    checkpoint = checkpoint_from_state_dict(oracle.state_dict(), source="the oracle")
    decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=CUDA, dtype=torch.bfloat16)
    assert layouts_of_a_decode(decoder, random_latents(family, frames=4, rows=6, columns=10), 2).convolutions == 0


@pytest.mark.parametrize("lacking", ["Triton", "a compiler"])
def test_without_triton_it_decodes_with_torchs_kernels_and_says_so(family, oracle, monkeypatch, caplog, lacking):
    probe = pytest.importorskip("wan_vae_parallel.ops.kernels.probe", reason="there are no kernels without Triton")
    latents = random_latents(family, frames=3, rows=6, columns=10)
    with load(oracle, dtype="float32", devices="cuda:0") as vae:
        exact = vae.decode(latents)
    with load(oracle, dtype="bfloat16", devices="cuda:0") as vae:
        with_kernels = vae.decode(latents)
    if lacking == "Triton":
        monkeypatch.setitem(sys.modules, "triton.language", None)
    else:
        monkeypatch.setattr(probe, "_probe_kernel", None)
    monkeypatch.setattr(dispatch, "_tried", {})
    dispatch._why_not.cache_clear()
    try:
        with load(oracle, dtype="bfloat16", devices="cuda:0") as vae:
            without = vae.decode(latents)
    finally:
        dispatch._why_not.cache_clear()
    assert ("Triton is missing" if lacking == "Triton" else "Triton can't compile kernels") in caplog.text
    assert not torch.equal(without, with_kernels)
    assert (without - exact).abs().mean() < 2 * (with_kernels - exact).abs().mean()
    assert (without - exact).abs().max() < 3 * (with_kernels - exact).abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_bits_for_every_chunk_and_both_orders_of_the_axes(family, oracle, dtype):
    latents = random_latents(family, frames=6, rows=7, columns=10)
    checkpoint = checkpoint_from_state_dict(oracle.state_dict(), source="the oracle")
    decoder = LocalDecoder(checkpoint.architecture, checkpoint.decoder, device=CUDA, dtype=getattr(torch, dtype))

    def frames(chunk, transposed=False):
        given = latents.transpose(-1, -2) if transposed else latents
        return torch.cat([part.cpu() for part in decoder.stream(given, chunk, transposed=transposed)], dim=1)

    expected = frames(1)
    assert expected.std() > 0.05
    for chunk in (2, 3, 5):
        assert torch.equal(frames(chunk), expected)
    assert torch.equal(frames(2, transposed=True), expected)


def kernel_names(work):
    """The names of the kernels that ``work()`` runs on the device."""
    work()  # once outside, so that what libraries do once is not seen
    torch.cuda.synchronize(CUDA)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(CUDA)
    return {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}


def test_no_kernel_converts_layouts(family, oracle):
    vae = load(oracle, dtype="bfloat16", devices="cuda:0", chunk=2)
    latents = random_latents(family, frames=4, rows=12, columns=20)
    names = kernel_names(lambda: vae.decode(latents))
    assert "_conv_kernel" in names, f"the profiler saw too little to judge: {sorted(names)}"
    assert not [name for name in names if LAYOUT_KERNEL.search(name)]


def test_the_pattern_matches_the_conversions_of_a_planar_convolution():
    # That the test above can fail. cuDNN's bf16 kernels are channels-last, so planar tensors are converted for them.
    x = torch.randn(1, 96, 6, 64, 64, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(96, 96, 3, 3, 3, device=CUDA, dtype=torch.bfloat16)
    names = kernel_names(lambda: F.conv3d(x, weight))
    assert [name for name in names if LAYOUT_KERNEL.search(name)], sorted(names)


# The way to the host.


@pytest.mark.parametrize("ahead", [(1, 1), (4, 4), (9, 9), (1, 4)])
def test_frames_arrive_on_the_host_in_order_and_whole(ahead):
    sizes = [1, 4, 4, 2, 8, 3]  # buffers grow, shrink and are used again

    def frames():
        for i, size in enumerate(sizes):
            # Enough work that a copy that does not wait for it would be seen.
            made = torch.full((1, size, 256, 256, 3), float(i), device=CUDA)
            for _ in range(50):
                made = made + 1
            yield Frames(made, made.sum().isfinite(), light=i in (2, 4, 5))

    for i, (size, (host, finite)) in enumerate(zip(sizes, to_host(frames(), CUDA, *ahead), strict=True)):
        assert finite
        assert host.device.type == "cpu"
        assert host.shape == (1, size, 256, 256, 3)
        assert (host == i + 50).all()


def test_one_nan_anywhere_is_seen():
    steps = [torch.ones((1, 4, 720, 1280, 3), device=CUDA) for _ in range(3)]
    steps[1][0, 3, 719, 1279, 2] = torch.nan
    assert [finite for _, finite in to_host(map(Frames.of, steps), CUDA)] == [True, False, True]


def test_fp16_that_overflows_in_a_later_chunk_is_told(wan21):
    latents = random_latents("wan2.1", frames=4, rows=5, columns=7)
    latents[:, :, 2:] *= 1e4
    weights = dict(wan21.state_dict())
    weights["post_quant_conv.weight"] = 100 * weights["post_quant_conv.weight"]
    seen = []
    vae = wvp.vae_from_state_dict(weights, devices="cuda:0", dtype="float16", chunk=1)
    with pytest.raises(wvp.WanVAEError, match="frames are NaN: in float16"):
        vae.decode(latents, on_chunk=lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]  # those of the first two latent frames


def test_autocast_and_a_default_device_change_nothing(family, oracle):
    latents = random_latents(family, frames=3, rows=6, columns=10)
    for dtype in ("float32", "bfloat16"):
        with load(oracle, dtype=dtype, devices="cuda:0") as vae:
            expected = vae.decode(latents)
        vae = load(oracle, dtype=dtype, devices="cuda:0")
        with torch.autocast("cuda", dtype=torch.float16), torch.device(CUDA):
            decoded = vae.decode(latents)
        assert decoded.device.type == "cpu"
        # cuDNN may add in another order from call to call; fp16 would err by a hundred times this.
        assert max_error(decoded, expected) <= (0 if dtype == "bfloat16" else 1e-5)


def test_each_step_may_be_asked_for_on_another_stream(wan21):
    vae = load(wan21, dtype="bfloat16", devices="cuda:0", chunk=1)
    latents = random_latents("wan2.1", frames=9, rows=12, columns=20)
    expected = vae.decode(latents)
    streams = [torch.cuda.Stream(CUDA) for _ in range(3)]
    parts, stream = [], vae.decode_stream(latents)
    for i in range(expected.shape[1]):
        torch.cuda._sleep(2_000_000)
        with torch.cuda.stream(streams[i % 3]):
            parts.append(next(stream))
    assert next(stream, None) is None
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_streamed_frames_are_the_callers_own(family, oracle):
    vae = load(oracle, dtype="bfloat16", devices="cuda:0", chunk=1)
    latents = random_latents(family, frames=5, rows=6, columns=10)
    parts = list(vae.decode_stream(latents))
    assert torch.equal(torch.cat(parts, dim=1), vae.decode(latents))
    for frames in parts:
        frames.mul_(255)


def test_decodes_on_a_stream_of_the_callers(wan21):
    # Inside a side stream, as frameworks that overlap work call it.
    vae = load(wan21, dtype="bfloat16", devices="cuda:0", chunk=2)
    latents = random_latents("wan2.1", frames=5, rows=6, columns=10).to(CUDA)
    expected = vae.decode(latents)
    torch.cuda.synchronize(CUDA)
    with torch.cuda.stream(torch.cuda.Stream(CUDA)):
        assert torch.equal(vae.decode(latents), expected)
