"""Decoding straight into files with a second VAE for the alpha, as Wan-Alpha has one."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import wan_vae_parallel as wvp
from tests.oracle import load, oracle_vae, random_latents
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.files.video_in import VideoInput
from wan_vae_parallel.files.waiting_frames import WaitingFrames

FORMATS = [("v.webm", "vp9"), ("v.mov", "prores"), ("v.mkv", "ffv1"), ("p/%02d.png", "png8"), ("p/%02d.png", "png16")]


@pytest.fixture(scope="module")
def vaes():
    # Steps of different lengths.
    with load(oracle_vae("wan2.1"), chunk=1) as colours, load(oracle_vae("wan2.1", seed=5), chunk=2) as alpha:
        yield colours, alpha


@pytest.fixture(scope="module")
def latents():
    return random_latents("wan2.1", frames=4, rows=4, columns=3, batch=2)


@pytest.fixture(scope="module")
def frames(vaes, latents):
    colours, alpha = (vae.decode(latents) for vae in vaes)
    assert (alpha[..., 0] - alpha[..., 1]).abs().mean() > 0.05, "any colour would do as alpha"
    return torch.cat([colours, alpha[..., :1]], dim=-1)


@pytest.mark.parametrize(("name", "format"), FORMATS)
def test_files_are_those_of_frames_with_alpha(vaes, latents, frames, tmp_path, name, format):
    colours, alpha = vaes
    (tmp_path / "joined").mkdir()
    with open_output(tmp_path / "joined" / name, shape=frames.shape, fps=16, format=format) as write:
        write(frames)
    (tmp_path / "ours").mkdir()
    seen = []
    files = colours.decode_to_video(
        latents,
        tmp_path / "ours" / name,
        format=format,
        vae_alpha=alpha,
        on_chunk=lambda done, total, picture: seen.append((done, total, picture().shape)),
    )
    expected = sorted(file for file in (tmp_path / "joined").rglob("*") if file.is_file())
    assert sorted(files) == sorted(file for file in (tmp_path / "ours").rglob("*") if file.is_file())
    assert [file.name for file in sorted(files)] == [file.name for file in expected]
    # Without a random number in them: the same pixels are the same bytes.
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(sorted(files), expected, strict=True))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (26, 26)
    assert {shape for _, _, shape in seen} == {(32, 24, 1), (32, 24, 4)}


def test_the_files_alpha_is_the_second_vaes_red(vaes, latents, frames, tmp_path):
    colours, alpha = vaes
    colours.decode_to_video(latents[:1], tmp_path / "v.mkv", format="ffv1", vae_alpha=alpha)
    with VideoInput(tmp_path / "v.mkv", colours=4) as video:
        assert (torch.cat(list(video)) - frames[0]).abs().max() <= 0.5 / 65535 + 1e-6
    colours.decode_to_video(latents, tmp_path / "v.safetensors", vae_alpha=alpha)
    torch.testing.assert_close(load_file(tmp_path / "v.safetensors")["frames"], frames)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.mkv", "v.safetensors"]


def test_images_are_pictures_with_alpha(vaes, tmp_path):
    colours, alpha = vaes
    latents = random_latents("wan2.1", frames=1, rows=4, columns=3, batch=3)
    files = colours.decode_to_video(latents, tmp_path / "p" / "%d.png", format="png16", vae_alpha=alpha)
    assert [file.name for file in files] == ["0.png", "1.png", "2.png"]
    for file, one, other in zip(files, colours.decode(latents), alpha.decode(latents), strict=True):
        with VideoInput(file, colours=4) as picture:
            found = torch.cat(list(picture))
        assert (found - torch.cat([one, other[..., :1]], dim=-1)).abs().max() <= 0.5 / 65535 + 1e-5


def test_what_can_not_work_is_refused_before_the_first_step(vaes, latents, tmp_path):
    colours, alpha = vaes
    steps = []

    def decode(name="v.mkv", vae_alpha=alpha, **options):
        colours.decode_to_video(
            latents, tmp_path / name, vae_alpha=vae_alpha, on_chunk=lambda *_: steps.append(1), **options
        )

    with pytest.raises(wvp.OutputError, match=r"can't hold alpha as H\.264 .*; choose vp9, prores, ffv1, png8, png16"):
        decode("v.mp4")
    with load(oracle_vae("wan2.2")) as other, pytest.raises(wvp.CheckpointError, match="don't make the same frames"):
        decode(format="ffv1", vae_alpha=other)
    with pytest.raises(wvp.ArgumentError, match=r"vae_alpha is 'alpha\.safetensors'; it must be a VAE, as load_vae"):
        decode(format="ffv1", vae_alpha="alpha.safetensors")
    with pytest.raises(wvp.OutputError, match="no name has a NUL; name a file such as"):
        decode("v\0.mkv", format="ffv1")
    with load(oracle_vae("wan2.1")) as closed:
        closed.close()
        with pytest.raises(wvp.ClosedError):
            decode(format="ffv1", vae_alpha=closed)
    assert not steps
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_alpha_is_told_before_the_first_step(vaes, latents, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    # Two videos of 13 frames of 32x24 pixels in 16 bits are 39936 bytes.
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free[0]))
    free, steps = [39000], []

    def decode():
        vaes[0].decode_to_video(
            latents, tmp_path / "v.mkv", format="ffv1", vae_alpha=vaes[1], on_chunk=lambda *_: steps.append(1)
        )

    with pytest.raises(wvp.OutputError, match="are free there; free some room"):
        decode()
    assert not steps
    free[0] = 40000
    decode()
    assert steps


# In the middle of the alpha's decode, and of the colours'.
@pytest.mark.parametrize("at", [5, 20])
@pytest.mark.parametrize("name", ["v.mkv", "p/%d.png"])
def test_cancelled_it_leaves_nothing(vaes, latents, tmp_path, at, name):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done >= at:
            raise Stop

    format = "ffv1" if name == "v.mkv" else None
    with pytest.raises(Stop):
        vaes[0].decode_to_video(latents, tmp_path / name, format=format, vae_alpha=vaes[1], on_chunk=stop)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_of_alpha_is_an_error_that_says_so(vaes, latents, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WaitingFrames, "write", full)
    with pytest.raises(wvp.OutputError, match=r"nor its alpha beside it; free some room .*No space left"):
        vaes[0].decode_to_video(latents, tmp_path / "v.mkv", format="ffv1", vae_alpha=vaes[1])
    assert not list(tmp_path.iterdir())
