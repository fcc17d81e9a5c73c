"""The chain of stages: steps of time, feature caches, what it asks of its edges, memory formats.

T latent frames, h rows, w columns, z latent channels
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.oracle import FAMILIES, Z_DIM, oracle_vae
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.model.blocks import AttentionBlock
from wan_vae_parallel.model.decoder import WanDecoder
from wan_vae_parallel.model.layers import CausalConv3d, UpsampleConv
from wan_vae_parallel.model.state import Pages, StreamState, WholePicture
from wan_vae_parallel.ops.frames import to_frames


@pytest.fixture(params=FAMILIES, scope="module")
def checkpoint(request):
    return checkpoint_from_state_dict(oracle_vae(request.param).state_dict(), source="the oracle")


@pytest.fixture
def model(checkpoint):
    return build(checkpoint)


def build(checkpoint, weights=None):
    with torch.device("meta"):
        model = WanDecoder(checkpoint.architecture)
    model.load_state_dict(weights or checkpoint.decoder, strict=True, assign=True)
    return model


def latents(checkpoint, frames, rows=3, columns=4):
    """``[T, h, w, z]``, as the model takes them."""
    shape = (frames, rows, columns, Z_DIM[checkpoint.architecture.family])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def new_state(model, video, chunk, edges=None, transposed=False):
    frames, rows, columns, _ = video.shape
    keeps = frames > 1
    pages = model.pages(
        rows, columns, chunk=chunk, videos=1, keeps=keeps, dtype=torch.float32, device=torch.device("cpu")
    )
    return StreamState(pages, edges=edges or WholePicture(), transposed=transposed, keeps=keeps)


@torch.no_grad()
def decode(model, video, chunk, edges=None, transposed=False):
    return torch.cat(list(model.stream(video, new_state(model, video, chunk, edges, transposed), chunk)))


def bordered_convs(model):
    """Every 3x3x3 and 3x3 convolution."""
    return [m for m in model.modules() if isinstance(m, CausalConv3d | UpsampleConv) and m.key.border]


# Of seven latent frames: divides what follows the first one, doesn't divide it, is all; the same again.
@pytest.mark.parametrize("chunk", [2, 5, 7, *(pytest.param(one, marks=pytest.mark.slow) for one in (3, 6, 100))])
def test_frames_do_not_depend_on_the_chunk(model, checkpoint, chunk):
    video = latents(checkpoint, 7)
    torch.testing.assert_close(decode(model, video, chunk), decode(model, video, 1), atol=1e-5, rtol=1e-5)


def test_a_longer_video_begins_with_the_shorter_ones_frames(model, checkpoint):
    # Causality: nothing that follows changes what came before.
    video = latents(checkpoint, 5)
    torch.testing.assert_close(decode(model, video, 2)[:9], decode(model, video[:3], 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_no_stage_takes_more_frames_than_the_chunk(model, checkpoint, chunk):
    """The memory promise: what a stage has doubled is split again before the next one."""
    video = latents(checkpoint, 8)
    taken = []

    def see(module, arguments):
        taken.append((module, len(arguments[0])))

    entries = bordered_convs(model)
    for module in entries:
        module.register_forward_pre_hook(see)
    with torch.no_grad():
        sizes = [len(frames) for frames in model.stream(video, new_state(model, video, chunk), chunk)]
    assert sum(sizes) == 29
    assert max(sizes) <= chunk
    assert sizes[0] == 1  # the video's first frame leaves before anything else enters
    for module in entries:
        frames = [count for seen, count in taken if seen is module]
        assert frames[0] == 1
        assert max(frames) <= chunk


def test_the_first_frame_leaves_before_the_second_latent_frame_enters(model, checkpoint):
    video = latents(checkpoint, 3)
    entered = []
    model.decoder.conv1.register_forward_pre_hook(lambda _, arguments: entered.append(len(arguments[0])))
    with torch.no_grad():
        frames = model.stream(video, new_state(model, video, 1), 1)
        assert len(next(frames)) == 1
        assert len(entered) == 1
        frames.close()


@pytest.mark.parametrize(("frames", "chunk"), [(1, 1), (2, 1), (6, 4), (9, 1), (9, 2), (9, 4)])
def test_pages_have_just_the_slots_that_a_decode_takes(model, checkpoint, frames, chunk, monkeypatch):
    """The memory promise: not one slot too few, none that is never used."""
    video = latents(checkpoint, frames)
    chunk = max(1, min(chunk, frames - 1))
    state = new_state(model, video, chunk)
    least = {key: len(pages._free) for key, pages in state._pages.items()}
    real = Pages.take

    def take(pages, count):
        taken = real(pages, count)
        key = next(key for key, own in state._pages.items() if own is pages)
        least[key] = min(least[key], len(pages._free))
        return taken

    monkeypatch.setattr(Pages, "take", take)
    with torch.no_grad():
        for _ in model.stream(video, state, chunk):
            pass
    # A shorter video never fills its pages.
    assert frames < 9 or not any(least.values()), least
    for key, pages in state._pages.items():
        assert len(pages._free) >= len(pages.arena) - max(1, _kept(model, key))


def _kept(model, key):
    return sum(conv.past_frames for conv in model.modules() if isinstance(conv, CausalConv3d) and conv.key == key)


def test_a_transposed_video_makes_transposed_activations(model, checkpoint):
    # Columns are split like this: the video is transposed, the kernels are told so.
    video = latents(checkpoint, 4)
    frames = decode(model, video.transpose(1, 2).contiguous(), 2, transposed=True)
    patch = model.architecture.patch
    expected = to_frames(decode(model, video, 2), patch)
    torch.testing.assert_close(to_frames(frames, patch, transposed=True), expected, atol=1e-5, rtol=1e-5)


class SpyEdges:
    """Edges that remember what they were asked, and have nothing else to ask for."""

    __slots__ = ("asked",)

    def __init__(self):
        self.asked = []

    def fill_halo(self, frames, *, below_only=False):  # noqa: ARG002
        self.asked.append(("fill_halo", frames.arena.data_ptr(), frames.slots))

    def all_rows(self, shard):
        self.asked.append(("all_rows", None, tuple(shard.shape)))
        return shard


@pytest.mark.parametrize("chunk", [1, 3])
def test_asks_its_edges_once_a_convolution_for_the_new_frames_halo_and_once_an_attention(model, checkpoint, chunk):
    """Design idea 3, the seam that shards will use: past frames kept their halo, so only new ones are asked for."""
    edges, expected, seen = SpyEdges(), [], set()

    def convolving(module, arguments):
        expected.append(("fill_halo", arguments[0].arena.data_ptr(), arguments[0].slots))
        seen.add(module)

    def attending(_, arguments):
        expected.append(("all_rows", None, (*arguments[0].shape[:3], 2 * arguments[0].shape[3])))

    for module in bordered_convs(model):
        module.register_forward_pre_hook(convolving)
    attentions = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    for module in attentions:
        module.register_forward_pre_hook(attending)
    decode(model, latents(checkpoint, 4), chunk, edges)
    assert len(attentions) == 1
    assert seen == set(bordered_convs(model))
    assert edges.asked == expected


class HalfPicture:
    """Edges of one half of a picture; the other half decodes in another thread, in step."""

    def __init__(self, half, posted, barrier):
        self.half, self.posted, self.barrier = half, posted, barrier

    def fill_halo(self, frames, *, below_only=False):  # noqa: ARG002
        # The upper half lacks the row below it, the lower one the row above.
        arena, slots = frames.arena, list(frames.slots)
        self.posted[self.half] = arena[slots, -2 if self.half == 0 else 1].clone()
        self.barrier.wait()
        arena[slots, -1 if self.half == 0 else 0] = self.posted[1 - self.half]
        self.barrier.wait()

    def all_rows(self, shard):
        self.posted[self.half] = shard.clone()
        self.barrier.wait()
        whole = torch.cat([self.posted[0], self.posted[1]], dim=1)
        self.barrier.wait()
        return whole


@pytest.mark.parametrize("rows_above", [1, 2, 3])  # of five: uneven halves, even a single row
def test_two_halves_that_exchange_through_their_edges_make_the_whole_picture(model, checkpoint, rows_above):
    """That the seam is enough: no other place of the model knows the picture's height."""
    video = latents(checkpoint, 4, rows=5, columns=3)
    whole = decode(model, video, 2)
    posted, barrier = {}, threading.Barrier(2, timeout=60)

    def decode_half(half):
        part = video[:, :rows_above] if half == 0 else video[:, rows_above:]
        return decode(model, part.contiguous(), 2, HalfPicture(half, posted, barrier))

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(decode_half, (0, 1)))
    torch.testing.assert_close(torch.cat(halves, dim=1), whole, atol=1e-5, rtol=1e-5)


def channels_last(tensor):
    """The same values with their bytes in channels-last order, if it is a convolution's weight."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


def test_frames_do_not_depend_on_the_memory_format_that_the_weights_come_in(checkpoint):
    # Exact: after loading both are the same bytes.
    video = latents(checkpoint, 3)
    planar = {key: tensor.contiguous() for key, tensor in checkpoint.decoder.items()}
    interleaved = {key: channels_last(tensor) for key, tensor in checkpoint.decoder.items()}
    assert any(not tensor.is_contiguous() for tensor in interleaved.values())
    frames = decode(build(checkpoint, planar), video, 2)
    assert torch.equal(decode(build(checkpoint, interleaved), video, 2), frames)


@pytest.mark.parametrize("rearrange", [torch.Tensor.contiguous, channels_last], ids=["NCDHW", "NDHWC"])
def test_weights_lie_in_the_format_that_convolutions_compute_in(checkpoint, rearrange):
    model = build(checkpoint, {key: rearrange(tensor) for key, tensor in checkpoint.decoder.items()})
    formats = {CausalConv3d: torch.channels_last_3d, UpsampleConv: torch.channels_last}
    convs = [module for module in model.modules() if isinstance(module, tuple(formats))]
    assert len(convs) > 30
    for conv in convs:
        assert conv.weight.is_contiguous(
            memory_format=formats[CausalConv3d if isinstance(conv, CausalConv3d) else UpsampleConv]
        )


def test_loading_is_strict(checkpoint):
    missing = dict(checkpoint.decoder)
    del missing["decoder.conv1.bias"]
    with pytest.raises(RuntimeError, match=r"decoder\.conv1\.bias"):
        build(checkpoint, missing)
    with pytest.raises(RuntimeError, match="surplus"):
        build(checkpoint, {**checkpoint.decoder, "surplus": torch.zeros(1)})
