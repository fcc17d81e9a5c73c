"""Frames of pictures and tensors, and which file is read as what."""

from __future__ import annotations

import os

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan_vae_parallel import FrameError
from wan_vae_parallel.files.frames_in import is_tensor, open_frames, read_frames, resized
from wan_vae_parallel.files.pictures import to_picture
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.ops.dispatch import say_once

FRAMES = torch.randint(0, 256, (12, 16, 24, 3), generator=torch.Generator().manual_seed(0)).float() / 255


def read(path, **options):
    with open_frames(path, colours=options.pop("colours", 3), **options) as source:
        frames = torch.cat(list(source))
        assert source.expected == len(frames)
        return frames


def test_numbered_pictures_come_back_as_decode_wrote_them(tmp_path):
    name = tmp_path / "frames" / "%04d.png"
    with open_output(name, shape=(1, *FRAMES.shape), fps=16.0) as write:
        write(FRAMES[None])
    assert torch.equal(read(name), FRAMES)
    assert torch.equal(read(name, most=5), FRAMES[:5])
    assert torch.equal(read(tmp_path / "frames"), FRAMES)
    # A folder that is there is meant, whatever its name.
    assert torch.equal(read((tmp_path / "frames").rename(tmp_path / "100%d")), FRAMES)
    (tmp_path / "100%d").rename(tmp_path / "frames")
    # From any number on, and other files don't matter.
    (tmp_path / "frames" / "0000.png").unlink()
    (tmp_path / "frames" / "12.png").write_text("of another name")
    assert torch.equal(read(name), FRAMES[1:])


def test_a_folder_is_read_in_natural_order(tmp_path):
    names = ["a 2.png", "a 10.png", "B 1.PNG", "b 9.bmp", "b 010.png"]
    for frame, name in zip(FRAMES, names, strict=False):
        to_picture(frame).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    assert torch.equal(read(tmp_path), FRAMES[:5])


def test_a_missing_number_is_named(tmp_path):
    for i in (3, 4, 6):
        to_picture(FRAMES[i]).save(tmp_path / f"{i:03d}.png")
    with pytest.raises(FrameError, match=r"has 003\.png to 006\.png, but no 005\.png"):
        read(tmp_path / "%03d.png")


def test_pictures_of_different_sizes_are_told_before_any_is_read_unless_they_get_one(tmp_path):
    to_picture(FRAMES[0]).save(tmp_path / "1.png")
    to_picture(FRAMES[1, :8]).save(tmp_path / "2.png")
    with pytest.raises(FrameError, match=r"2\.png has 24x8 pixels, and the first picture 24x16; .* --size"):
        open_frames(tmp_path, colours=3)
    with open_frames(tmp_path, colours=3, any_size=True) as source:
        assert [tuple(frame.shape) for frame in source] == [(1, 16, 24, 3), (1, 8, 24, 3)]


def test_pictures_of_every_kind_become_colours(tmp_path, caplog):
    grey = (FRAMES[0, ..., :1] * 255).round().to(torch.uint8)
    Image.fromarray(grey[..., 0].numpy()).save(tmp_path / "grey.png")
    assert torch.equal(read_frames(tmp_path / "grey.png", colours=3), FRAMES[:1, ..., :1].expand(-1, -1, -1, 3))
    deep = (FRAMES[0, ..., 0] * 65535).round().numpy().astype(numpy.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    got = read_frames(tmp_path / "deep.png", colours=4)
    assert (got[..., :3] - FRAMES[:1, ..., :1]).abs().max() < 1e-4
    assert (got[..., 3] == 1).all()
    alpha = torch.cat([FRAMES[0], FRAMES[1, ..., :1]], dim=-1)
    to_picture(alpha).save(tmp_path / "alpha.png")
    assert torch.equal(read_frames(tmp_path / "alpha.png", colours=4)[0], alpha)
    say_once.cache_clear()
    assert "alpha" not in caplog.text
    assert torch.equal(read_frames(tmp_path / "alpha.png", colours=3)[0], FRAMES[0])  # left out, as ComfyUI does
    assert "pictures have alpha, which is left out" in caplog.text
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (24, 16)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_frames(tmp_path / "turned.jpg", colours=3).shape == (1, 24, 16, 3)


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [("f.tif", numpy.float32, "floating point"), ("i.tif", numpy.int32, "integers of 32 bits")],
)
def test_pictures_that_do_not_say_what_white_is_are_refused(tmp_path, name, dtype, words):
    Image.fromarray((FRAMES[0, ..., 0] * 200).numpy().astype(dtype)).save(tmp_path / name)
    with pytest.raises(FrameError, match=rf"{name} has grey as {words} .*make it a picture of 8 or 16 bits"):
        read_frames(tmp_path / name, colours=3)


@pytest.mark.parametrize("shape", [(12, 16, 24, 3), (2, 6, 16, 24, 3)])
@pytest.mark.parametrize("key", ["frames", "anything"])
def test_a_tensor_is_read_as_it_is(tmp_path, shape, key):
    save_file({key: FRAMES.view(shape)}, tmp_path / "f.safetensors")
    assert is_tensor(tmp_path / "f.safetensors")
    assert torch.equal(read_frames(tmp_path / "f.safetensors", colours=3), FRAMES.view(shape))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"a": torch.zeros(1), "b": torch.zeros(2)},
            r"2 tensors: a \(1,\), b \(2,\); it must have one named frames",
        ),
        ({"frames": torch.zeros(16, 24, 3)}, r"of 3 axes \(16, 24, 3\); frames have five"),
        ({"frames": torch.zeros(1, 16, 24, 3, dtype=torch.uint8)}, "divide them by what white is, 255 as a rule"),
        ({"latent_tensor": torch.zeros(1, 16, 1, 2, 2)}, "has latents in it"),
    ],
)
def test_tensors_that_are_no_frames_are_told(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(FrameError, match=words):
        read_frames(tmp_path / "f.safetensors", colours=3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.mp4", "does not exist; name a video"),
        ("none/%04d.png", "there is no folder"),
        ("%04d.png", "has no picture named as %04d.png"),
        ("pipe.mp4", "is no file"),
        ("x.latent", "has latents in it"),
        ("empty", "has no pictures"),
    ],
)
def test_what_is_not_there_is_told(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(FrameError, match=words):
        open_frames(tmp_path / name, colours=3)


def test_pictures_that_can_not_be_read_are_told(tmp_path):
    to_picture(FRAMES[0]).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:600])
    (tmp_path / "text.png").write_text("no picture")
    to_picture(FRAMES[0]).save(
        tmp_path / "moving.webp", save_all=True, append_images=[to_picture(FRAMES[1])], lossless=True
    )
    for name, words in (("cut", "can't be read as a picture"), ("text", "can't be read"), ("none", "does not exist")):
        with pytest.raises(FrameError, match=f"{name}.png {words}"):
            read_frames(tmp_path / f"{name}.png", colours=3)
    with pytest.raises(FrameError, match="is an animation of 2 frames"):
        read_frames(tmp_path / "moving.webp", colours=3)


def test_resizing_is_pillows_bicubic():
    # Up and down; without overshoot, which Pillow clamps twice. It rounds rows' results and columns' to 8 bits each.
    frames = (FRAMES[:1] * 100 + 75).round() / 255
    for size in ((40, 32), (8, 8), (24, 8)):
        expected = to_picture(frames[0]).resize(size, Image.Resampling.BICUBIC)
        got = resized(frames, size)
        assert got.shape == (1, size[1], size[0], 3)
        assert got.is_contiguous()
        assert (got[0] - torch.from_numpy(numpy.array(expected)).float() / 255).abs().max() < 2 / 255
    assert resized(FRAMES, (24, 16)) is FRAMES
    batch = FRAMES.view(2, 6, 16, 24, 3).half()
    assert torch.equal(resized(batch, (8, 8)).flatten(0, 1), resized(batch.flatten(0, 1), (8, 8)))


@pytest.mark.parametrize("name", ["v.mkv", "v.png", "v.safetensors"])
def test_what_aria2_has_not_finished_is_not_read(tmp_path, name):
    path = tmp_path / name
    if name == "v.mkv":
        with open_output(path, shape=(1, *FRAMES.shape), fps=16, format="ffv1") as write:
            write(FRAMES[None])
    elif name == "v.png":
        to_picture(FRAMES[0]).save(path)
    else:
        save_file({"frames": FRAMES}, path)
    (tmp_path / f"{name}.aria2").touch()

    with pytest.raises(FrameError, match=rf"not downloaded in full, as {name}\.aria2 is beside it"):
        read_frames(path, colours=3) if is_tensor(path) else read(path)
    (tmp_path / f"{name}.aria2").unlink()
    assert len(read_frames(path, colours=3) if is_tensor(path) else read(path))
