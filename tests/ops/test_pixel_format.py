"""Frames as integers: layout exact, colours against the standard's formulas in float64."""

import dataclasses
import itertools

import pytest
import torch

from wan_vae_parallel.ops.pixel_format import (
    GBR_16,
    GBRA_16,
    RGB_8,
    RGB_16,
    YUV420,
    YUV420_10,
    YUV422_10,
    YUVA420,
    YUVA444_10,
    PixelFormat,
)

ALL = [YUV420, YUV420_10, YUV422_10, GBR_16, RGB_8, RGB_16]
YUV = [YUV420, YUV420_10, YUV422_10]


def named(formats):
    return pytest.mark.parametrize("pixels", formats, ids=lambda pixels: pixels.name)


def planes(pixels, data, rows, columns):
    """A frame's planes as integers, [rows, columns] each."""
    found = []
    for (height, width), (start, stop) in zip(
        pixels.planes(rows, columns), pixels.row_runs(rows, columns, 0, rows), strict=True
    ):
        part = data[start:stop].numpy()
        if pixels.sample_bytes == 2:
            part = part.view(">u2" if pixels.big_endian else "<u2")
        found.append(torch.from_numpy(part.astype("int64")).view(height, width // pixels.sample_bytes))
    return found


# 8 bits, as the standard's table and every video textbook have them.
@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((1, 1, 1), (235, 128, 128)),
        ((1, 0, 0), (63, 102, 240)),
        ((0, 1, 0), (173, 42, 26)),
        ((0, 0, 1), (32, 240, 118)),
        ((0.5, 0.5, 0.5), (126, 128, 128)),
    ],
)
@named(YUV)
def test_colours_are_bt709s_of_limited_range(pixels, colour, expected):
    frame = torch.tensor(colour, dtype=torch.float32).expand(1, 1, 4, 6, 3)
    for plane, value in zip(planes(pixels, pixels.convert(frame)[0, 0], 4, 6), expected, strict=True):
        assert plane.unique().numel() == 1
        unit = 2 ** (pixels.bits - 8)
        assert abs(plane[0, 0] / unit - value) <= 0.5


@named(YUV)
def test_chroma_is_sited_left_and_luma_rounded_to_the_nearest(pixels):
    # Chroma that rises evenly has the same value whichever symmetric filter takes it: it tells the place alone.
    rows, columns = 6, 16
    x = torch.arange(columns, dtype=torch.float64) / 64
    blue = (0.3 + x).expand(rows, columns)
    frame = torch.stack([torch.full_like(blue, 0.4), torch.full_like(blue, 0.4), blue], dim=-1)[None, None]
    y, cb, _ = planes(pixels, pixels.convert(frame)[0, 0], rows, columns)
    unit = 2 ** (pixels.bits - 8)
    luma = 0.4 * (1 - 0.0722) + 0.0722 * blue
    assert (y - (luma * 219 + 16) * unit).abs().max() <= 0.5 + 1e-6
    expected = (128 + 224 * (blue - luma) / (2 * (1 - 0.0722))) * unit
    # But at the left edge, where the neighbour repeats.
    assert (cb[:, 1:] - expected[:: 2 if pixels.halved_rows else 1, 2::2]).abs().max() <= 0.5 + 1e-6


def test_chroma_of_half_the_rows_lies_between_two():
    rows, columns = 8, 4
    blue = (0.3 + torch.arange(rows, dtype=torch.float64) / 32)[:, None].expand(rows, columns)
    frame = torch.stack([torch.full_like(blue, 0.4), torch.full_like(blue, 0.4), blue], dim=-1)[None, None]
    _, cb, _ = planes(YUV420_10, YUV420_10.convert(frame)[0, 0], rows, columns)
    luma = 0.4 * (1 - 0.0722) + 0.0722 * blue
    whole = (128 + 224 * (blue - luma) / (2 * (1 - 0.0722))) * 4
    assert (cb[:, 0] - (whole[::2, 0] + whole[1::2, 0]) / 2).abs().max() <= 0.5 + 1e-6


@named([GBR_16, RGB_8, RGB_16])
def test_rgb_is_equal_to_rounding(pixels):
    frames = torch.rand(2, 3, 5, 7, 3, generator=torch.Generator().manual_seed(1))
    frames[0, 0, 0, 0] = torch.tensor([0.0, 1.0, 0.5])
    data = pixels.convert(frames)
    assert data.shape == (2, 3, 5 * 7 * 3 * pixels.sample_bytes)
    for video in range(2):
        for frame in range(3):
            found = planes(pixels, data[video, frame], 5, 7)
            rgb = found[0].view(5, 7, 3) if pixels.kind == "packed" else torch.stack([found[i] for i in (2, 0, 1)], -1)
            most = 2**pixels.bits - 1
            assert (rgb / most - frames[video, frame].double()).abs().max() <= 0.5 / most + 1e-7


@named(ALL)
@pytest.mark.parametrize("size", [(8, 16), (6, 4), (5, 7), (2, 1), (1, 2), (1, 1)])
def test_every_size_fills_its_bytes_and_comes_back(pixels, size):
    frames = torch.linspace(0.2, 0.7, size[0] * size[1]).view(1, 1, *size, 1).expand(1, 1, *size, 3)  # grey
    data = pixels.convert(frames)[0, 0]
    assert data.shape == (pixels.frame_bytes(*size),)
    assert (pixels.picture(data, *size) - frames[0, 0]).abs().max() <= 0.6 / 219


@named(ALL)
@pytest.mark.parametrize("bounds", [(0, 2, 8), (0, 4, 6, 8)])
def test_rows_of_a_frame_make_the_bytes_that_the_whole_has_there(pixels, bounds):
    frames = torch.rand(1, 2, 8, 6, 3, generator=torch.Generator().manual_seed(2))
    whole = pixels.convert(frames)
    together = torch.full_like(whole, 77)
    for start, stop in itertools.pairwise(bounds):
        own = pixels.convert(frames[:, :, start:stop])
        at = 0
        for first, last in pixels.row_runs(8, 6, start, stop):
            together[..., first:last] = own[..., at : at + last - first]
            at += last - first
    assert torch.equal(together, whole)


def test_saturated_colours_come_back_in_previews():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    frame = colours.repeat_interleave(4, dim=0).expand(4, 16, 3)
    for pixels in ALL:
        picture = pixels.picture(pixels.convert(frame[None, None])[0, 0], 4, 16)
        assert torch.equal(pixels.picture(pixels.convert(frame[None, None])[0, 0], 4, 16, 3), picture[::3, ::3])
        flat = torch.tensor([2, 6, 10, 14])  # away from where colours meet
        assert (picture[:, flat] - frame[:, flat]).abs().max() < 0.01, pixels.name


def test_fewer_colours_are_refused_and_more_left_out():
    with pytest.raises(ValueError, match="3 colours, not 1"):
        YUV420.convert(torch.zeros(1, 1, 2, 2, 1))
    frames = torch.rand(1, 1, 2, 2, 4)  # with alpha, which is left out
    assert torch.equal(YUV420.convert(frames), YUV420.convert(frames[..., :3]))
    four = dataclasses.replace(RGB_8, name="rgba", colours=4)
    assert isinstance(four, PixelFormat)
    assert four.convert(torch.zeros(1, 1, 2, 2, 4)).shape == (1, 1, 16)


@pytest.mark.parametrize(
    ("pixels", "plain"),
    [(YUVA420, YUV420), (GBRA_16, GBR_16), (YUVA444_10, dataclasses.replace(YUVA444_10, colours=3))],
    ids=["yuva420p", "gbrap16le", "yuva444p10le"],
)
@pytest.mark.parametrize("size", [(8, 16), (5, 7), (1, 1)])
def test_alpha_is_a_further_plane_of_full_range(pixels, plain, size):
    frames = torch.rand(1, 2, *size, 4, generator=torch.Generator().manual_seed(3))
    frames[0, 0, 0, 0, 3] = 1.0
    data, colours = pixels.convert(frames), plain.convert(frames)
    assert torch.equal(data[..., : colours.shape[-1]], colours)
    most = 2**pixels.bits - 1
    for frame in range(2):
        *_, alpha = planes(pixels, data[0, frame], *size)
        assert (alpha / most - frames[0, frame, ..., 3].double()).abs().max() <= 0.5 / most + 1e-7
        shown = pixels.picture(data[0, frame], *size)
        assert shown.shape == (*size, 4)
        assert (shown[..., 3] - frames[0, frame, ..., 3]).abs().max() <= 0.5 / most + 1e-6
        assert torch.allclose(shown[..., :3], plain.picture(colours[0, frame], *size))
