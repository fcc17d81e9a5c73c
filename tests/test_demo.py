"""The demo checkpoint shows the demo's animation, frame by frame, and again after an encode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.oracle import FAMILIES, oracle_vae, original_state_dict
from wan_vae_parallel.demo import _picture
from wan_vae_parallel.files.checkpoint import read_checkpoint

SMALLEST = {"wan2.1": 8, "wan2.2": 16}
# Latent rows and columns of the tests' videos: as small as shows the pictures' parts.
SIZE = {"wan2.1": (14, 24), "wan2.2": (8, 14)}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def demo(family, tmp_path_factory):
    """The smallest demo checkpoint, and its architecture."""
    path = tmp_path_factory.mktemp(family) / "demo.safetensors"
    return path, wvp.save_demo_checkpoint(path, family, width=SMALLEST[family])


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.fixture(scope="module")
def round_trip(demo, family):
    """The demo's latents, their frames, what these are encoded to, and the frames of that."""
    path, architecture = demo
    rows, columns = SIZE[family]
    latents = wvp.demo_latents(architecture, frames=4, rows=rows, columns=columns)
    with wvp.load_vae(path, devices="cpu", dtype="float32") as vae:
        frames = vae.decode(latents)
        encoded = vae.encode(frames)
        return latents, frames, encoded, vae.decode(encoded)


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


def test_what_is_encoded_and_decoded_again_shows_the_same(round_trip, demo):
    _, frames, _, again = round_trip
    ratio = demo[1].spatial_ratio
    least = 33.0
    assert all(psnr(one, other) > least for one, other in zip(again[0], frames[0], strict=True))
    # What a wrong encoder would show: other frames, frames of a group in another order, rows and columns half a latent
    # voxel off, or one column's in another's place.
    wrong = {
        "a frame late": again.roll(1, 1)[:, 1:],
        "a group reversed": again[:, 1:].unflatten(1, (3, 4)).flip(2).flatten(1, 2),
        "rows off": again[:, 1:].roll(ratio // 2, 2),
        "columns off": again[:, 1:].roll(ratio // 2, 3),
        "colours in another order": again[:, 1:].flip(4),
        "rows and columns exchanged": again[:, 1:].transpose(2, 3).reshape(again[:, 1:].shape),
    }
    for what, shown in wrong.items():
        assert psnr(shown, frames[:, 1:]) < least - 1, what


def test_the_encoder_gives_the_demos_latents_back_the_first_frames_too(round_trip):
    latents, _, encoded, _ = round_trip
    assert encoded.shape == latents.shape
    # Of every latent frame in every channel that shows something; the others are not quite empty.
    error = (encoded - latents).abs().mean(dim=(0, 3, 4))
    assert error[:12].max() < 0.1
    assert error.mean() < 0.05
    assert latents[:, :12].abs().mean() > 0.2
    alike = [correlation(encoded[0, c, t], latents[0, c, t]) for c in range(12) for t in range(4)]
    assert min(alike) > 0.9


def test_every_frame_shows_its_own_picture(demo, round_trip, family):
    architecture = demo[1]
    (rows, columns), latent_frames = SIZE[family], 4
    latents, (frames,) = round_trip[:2]
    assert latents.shape == (1, architecture.z_dim, latent_frames, rows, columns)
    count = len(frames)
    assert count == 13
    shown = F.avg_pool2d(frames.movedim(-1, 1), architecture.spatial_ratio).movedim(1, -1)
    pictures = torch.stack([_picture(i, count, rows, columns) for i in range(count)])
    alike = torch.tensor([[correlation(frame, picture) for picture in pictures] for frame in shown])
    own = alike.diagonal()
    assert own.min() > 0.95
    # Neighbours are alike; a picture well before or after is less like it than its own.
    apart = (torch.arange(count)[:, None] - torch.arange(count)).abs() >= 4
    assert (alike.where(apart, -torch.inf).max(1).values < own).all()
    # Neither washed out nor garish: contrast is the picture's.
    gains = [alike[i, i] * shown[i].std() / (pictures[i] / 2).std() for i in range(count)]
    assert min(gains) > 0.75
    assert max(gains) < 1.25


def test_the_animation_moves():
    # Were all pictures the same, the test above would say nothing about time.
    pictures = torch.stack([_picture(i, 13, 14, 24) for i in range(13)])
    assert all((pictures[i] - pictures[i + 1]).abs().max() > 0.1 for i in range(12))


def test_the_checkpoint_is_complete_and_of_the_published_shapes(demo, family):
    # Against diffusers' model: whoever loads whole VAEs strictly finds every key, the encoder's too.
    path, architecture = demo
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture == architecture
    expected = original_state_dict(oracle_vae(family, width=architecture.width))
    tensors = load_file(path)
    assert set(tensors) == set(expected)
    for key, tensor in expected.items():
        if family == "wan2.1" or not key.startswith("encoder."):  # the oracle's 2.2 encoder is a narrow one
            assert tensors[key].shape == tensor.shape, key


def test_the_checkpoint_is_the_same_each_time(demo, family, tmp_path):
    path, architecture = demo
    wvp.save_demo_checkpoint(tmp_path / "again.safetensors", family, width=architecture.width)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_branches_are_not_empty(demo):
    # A residual block or an attention that does nothing could not show that a halo or a layout is wrong.
    tensors = load_file(demo[0])
    assert all(tensor.any() for tensor in tensors.values())


def test_a_width_that_can_not_hold_the_signals_is_refused(family, tmp_path):
    width = SMALLEST[family] - 1
    with pytest.raises(ValueError, match=f"width is {width}; .* needs at least {SMALLEST[family]}"):
        wvp.save_demo_checkpoint(tmp_path / "demo.safetensors", family, width=width)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_can_not_be_written_is_an_output_error(family, tmp_path):
    with pytest.raises(wvp.OutputError, match="there is no folder"):
        wvp.save_demo_checkpoint(tmp_path / "nowhere" / "demo.safetensors", family, width=SMALLEST[family])


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 1, 1), (2, 1, 9), (1, 7, 1)])
def test_latents_of_any_size(family, frames, rows, columns):
    architecture = wvp.Architecture.published(family)
    latents = wvp.demo_latents(architecture, frames=frames, rows=rows, columns=columns)
    assert latents.shape == (1, architecture.z_dim, frames, rows, columns)
    assert latents.isfinite().all()
