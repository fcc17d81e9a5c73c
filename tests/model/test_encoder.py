"""The encoder's chain of stages: steps of time, frames that repeat, memory promises, against itself and diffusers.

T frames, H x W pixels, C colours; t latent frames, h x w latent rows and columns, z channels
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.oracle import FAMILIES, RATIO, oracle_latents, oracle_vae
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.model.encoder import WanEncoder
from wan_vae_parallel.model.layers import CausalConv3d, DownConv
from wan_vae_parallel.model.lines import Join, Line, Piece
from wan_vae_parallel.model.state import StreamState, WholePicture

FAR = 1000


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    return oracle_vae(family).double()


@pytest.fixture(scope="module")
def model(oracle):
    checkpoint = checkpoint_from_state_dict(oracle.state_dict(), source="the oracle")
    with torch.device("meta"):
        model = WanEncoder(checkpoint.architecture)
    model.load_state_dict(checkpoint.encoder, strict=True, assign=True)
    return model


def random_frames(family, frames, rows=1, columns=2):
    """``[T, H, W, C]``, fp64, all different."""
    shape = (frames, rows * RATIO[family], columns * RATIO[family], 3)
    return torch.rand(shape, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)


def pieces(video, *sizes, seen=True):
    """``video`` in pieces of these sizes, again and again; repeats are told, or not even looked for."""
    counts = [0]
    for before, frame in itertools.pairwise(video):
        counts.append(counts[-1] + 1 if seen and torch.equal(before, frame) else 0)
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(video):
            return
        own = counts[start : start + size]
        new = [frame for frame, count in zip(video[start:], own, strict=False) if not count]
        yield Piece(torch.stack(new) if new else None, tuple(own))
        start += size


@torch.no_grad()
def encode(model, video, chunk, *sizes, seen=True):
    """``[t, h, w, z]``; every place of the pages is free again afterwards but for those of the past."""
    ratio = model.architecture.spatial_ratio
    pages = model.pages(
        video.shape[1] // ratio, video.shape[2] // ratio, chunk=chunk, keeps=len(video) > 1,
        dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    for one in pages.values():
        one.arena[1:, 1:-1, 1:-1] = torch.nan  # old values are never read
    state = StreamState(pages, edges=WholePicture(), keeps=len(video) > 1)
    encoding = model.begin(state, chunk)
    made = [means for piece in pieces(video, *(sizes or (4,)), seen=seen) for means in encoding.push(piece)]
    latents = torch.cat([*made, *encoding.end()])
    kept = {key: need.kept for key, need in model.page_needs(chunk).items()}
    for key, one in pages.items():
        in_use = len(one.arena) - len(one._free)
        assert in_use <= kept[key] + 1, f"{key}: {in_use} places are not given back, {kept[key]} are the past's"
    return latents


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("sizes", [(1,), (3, 1, 7), (17,)])
def test_latents_depend_neither_on_the_chunk_nor_on_the_pieces(family, oracle, model, chunk, sizes):
    video = random_frames(family, 17)
    torch.testing.assert_close(
        encode(model, video, chunk, *sizes), oracle_latents(oracle, video), atol=1e-12, rtol=1e-12
    )


REPEATS = {
    "a picture and grey": lambda video: video[1:].fill_(0.5),
    "all equal": lambda video: video.copy_(video[0].clone()),
    "in the middle": lambda video: video[20:60].copy_(video[20].clone()),
    "two runs": lambda video: (video[3:40].copy_(video[3].clone()), video[40:77].copy_(video[40].clone())),
    "at the end": lambda video: video[50:].copy_(video[50].clone()),
    "short runs": lambda video: [video[i : i + 13].copy_(video[i].clone()) for i in range(0, 81, 13)],
    "pairs": lambda video: video[1::2].copy_(video[:-1:2].clone()),
    "nearly all": lambda video: video[1:80].copy_(video[1].clone()),
}


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("what", REPEATS)
def test_frames_that_repeat_give_the_latents_that_all_frames_give(family, oracle, model, what, chunk):
    video = random_frames(family, 81, 1, 1)
    REPEATS[what](video)
    expected = oracle_latents(oracle, video)
    torch.testing.assert_close(encode(model, video, chunk), expected, atol=1e-12, rtol=1e-12)
    if chunk == 4:
        torch.testing.assert_close(encode(model, video, chunk, seen=False), expected, atol=1e-12, rtol=1e-12)


def computed(model, video, chunk):
    """How many frames each layer that sees more than one position made, by its name."""
    made, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, CausalConv3d | DownConv):

            def see(module, arguments, _, name=name):
                frames = len(arguments[0]) // module.kind.time_stride
                made[name] = made.get(name, 0) + frames

            hooks.append(module.register_forward_hook(see))
    encode(model, video, chunk)
    for hook in hooks:
        hook.remove()
    return made


def test_of_a_picture_and_80_equal_frames_few_are_computed(family, model):
    video = random_frames(family, 81, 1, 1)
    REPEATS["a picture and grey"](video)
    few = computed(model, video, 4)
    nested = family == "wan2.2"
    names = {
        12: ["encoder.conv1", "downsamples.0.downsamples.1.residual.6" if nested else "downsamples.1.residual.6"],
        20: ["downsamples.1.downsamples.1.residual.6" if nested else "downsamples.4.residual.6"],
    }
    for count, layers in names.items():
        for layer in layers:
            name = layer if layer.startswith("encoder.") else f"encoder.{layer}"
            assert few[name] == count, name
    quarter = "encoder.downsamples.2.downsamples.1.residual.6" if nested else "encoder.downsamples.7.residual.6"
    assert few[quarter] == 20  # of 41
    everything = computed(model, random_frames(family, 81, 1, 1), 4)
    assert everything["encoder.conv1"] == 81
    assert everything[quarter] == 41


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_no_stage_takes_more_frames_than_the_chunk(family, model, chunk):
    most = {}

    def see(module, arguments):
        most[module] = max(most.get(module, 0), len(arguments[0]) // module.kind.time_stride)

    hooks = [
        module.register_forward_pre_hook(see)
        for module in model.modules()
        if isinstance(module, CausalConv3d | DownConv)
    ]
    encode(model, random_frames(family, 33), chunk)
    for hook in hooks:
        hook.remove()
    assert max(most.values()) == chunk


def test_a_longer_video_begins_with_the_shorter_ones_latents(family, model):
    # Causality: nothing that follows changes what came before.
    video = random_frames(family, 17)
    torch.testing.assert_close(encode(model, video, 2)[:3], encode(model, video[:9], 2), atol=1e-12, rtol=1e-12)


def test_a_line_gives_out_new_frames_then_known_ones_and_keeps_the_last():
    line = Line(1)  # from a count of 3 on a frame is known
    x = torch.arange(3.0).view(3, 1)
    line.put(Piece(x, (0, 0, 0, 1, 2, 3, 4)))
    assert line.ready(FAR) == FAR  # as many as there will be before a known one
    assert line.ready(2) == 2
    taken = line.take(2)
    assert taken.counts == (0, 0)
    assert taken.frames.tolist() == [[0.0], [1.0]]
    taken.frames.fill_(-1)  # the stage writes over it
    taken = line.take(FAR)
    assert taken.counts == (0, 1, 2)
    assert taken.frames.tolist() == [[2.0], [2.0], [2.0]]
    taken.frames.fill_(-1)
    assert line.known
    taken = line.take(FAR)
    assert (taken.frames, taken.counts) == (None, (3, 4))
    line.put(Piece(None, (5,)))
    assert line.take(FAR).counts == (5,)
    assert not line.waits


def test_a_repeat_behind_an_empty_line_is_a_copy_of_the_last_frame():
    line = Line(2)
    line.put(Piece(torch.ones(1, 1), (0,)))
    line.take(FAR).frames.fill_(-1)
    for _ in range(2):
        line.put(Piece(None, (1,)))
        taken = line.take(FAR).frames
        assert taken.tolist() == [[1.0]]
        taken.fill_(-1)


def test_a_join_makes_nothing_of_what_is_known():
    assert list(Join(None, shortcut=False).put(None, None, (7, 8, 9, 10, 11), None)) == [Piece(None, (3, 4))]
