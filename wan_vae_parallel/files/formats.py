"""What frames are written as: containers, codecs, pixels, and what each can't take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Literal

from ..errors import OutputError, about_file
from ..ops.pixel_format import (
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

QUALITIES = ("low", "medium", "high", "best")
Quality = Literal["low", "medium", "high", "best"] | int

# What players of HD video take for granted, and what other players are told.
_BT709 = {"color_range": "tv", "colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
# FFV1's encoder takes 1.97 million pixels of four colours a slice, in grids of these numbers.
_SLICE_PIXELS, _SLICES = 1_900_000, (16, 64, 256)
# Of a frame, by ffmpeg: 128 more columns and rows of 8 bytes a pixel must be less than 2 GiB.
_MOST_PIXELS, _PADDING = (2**31 - 1) // 8, 128
_SRGB = {"color_range": "pc", "colorspace": "rgb", "color_primaries": "bt709", "color_trc": "iec61966-2-1"}


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A way to write frames that ffmpeg knows.

    Attributes:
        name: as users choose it.
        title: for people.
        suffixes: of files, the usual one first; without them it is numbered pictures.
        encoder: ffmpeg's.
        pixels: what the encoder gets and keeps.
        alpha: what it gets of frames with alpha, if it can keep that.
        arguments: for the encoder.
        alpha_arguments: in their place, of frames with alpha.
        trial_arguments: after them, where one large frame is encoded to see whether the encoder takes such ones: what
            is done sooner.
        tags: what is said of the colours.
        crf: what each quality means to the encoder; none where there is only one.
        most_crf: the largest of these numbers.
        audio: the encoder of sound, by suffix.
        even: sides must be even.
        sides: the least and the most pixels of a side.
        browsers: whether they play it.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    encoder: str
    pixels: PixelFormat
    alpha: PixelFormat | None = None
    arguments: tuple[str, ...] = ()
    alpha_arguments: tuple[str, ...] = ()
    trial_arguments: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    crf: Mapping[str, int] = field(default_factory=dict)
    most_crf: int = 0
    audio: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    even: bool = False
    sides: tuple[int, int] = (1, 65535)
    browsers: bool = False

    @property
    def pictures(self) -> bool:
        """Whether each frame is a file of its own."""
        return not self.suffixes

    def of_colours(self, colours: int) -> PixelFormat:
        """The pixels of frames of so many colours; videos that have no alpha leave it out."""
        if not self.pictures:
            return self.alpha if self.alpha and colours == self.alpha.colours else self.pixels
        names = {8: {1: "gray", 3: "rgb24", 4: "rgba"}, 16: {1: "gray16be", 3: "rgb48be", 4: "rgba64be"}}
        return dataclasses.replace(self.pixels, name=names[self.pixels.bits][colours], colours=colours)

    def encoder_arguments(self, pixels: PixelFormat, width: int, height: int) -> tuple[str, ...]:
        """For the encoder of such pixels, in frames of that size."""
        arguments = self.alpha_arguments if pixels == self.alpha and self.alpha_arguments else self.arguments
        if self.encoder != "ffv1":
            return arguments
        slices = next((count for count in _SLICES if width * height <= count * _SLICE_PIXELS), _SLICES[-1])
        return (*arguments, "-slices", str(slices))

    def quality_arguments(self, quality: Quality) -> list[str]:
        """For the encoder.

        Raises:
            OutputError: no such quality, or the format has none to choose.
        """
        number = isinstance(quality, Integral) and not isinstance(quality, bool)
        if not number and quality not in QUALITIES:
            raise OutputError(
                f"quality is {quality!r}; it must be {', '.join(QUALITIES)}"
                + (f" or a CRF from 0 to {self.most_crf}" if self.crf else "")
            )
        if not self.crf:
            if number:
                raise OutputError(f"{self.title} has no CRF, and {quality} was asked for; leave the quality away")
            return []
        crf = self.crf[quality] if isinstance(quality, str) else quality
        if not 0 <= crf <= self.most_crf:
            raise OutputError(f"{self.title} has a CRF from 0 (best) to {self.most_crf}, not {crf}")
        return ["-crf", str(crf)]

    def check_size(self, width: int, height: int) -> None:
        """Raises `OutputError` where the encoder can't take frames of that size."""
        if (reason := self._too_small_or_large(width, height)) is None:
            return
        others = [one.name for one in FORMATS.values() if one._too_small_or_large(width, height) is None]
        way = (
            f"choose another format ({', '.join(others)})"
            if others
            else "no video or picture takes them; decode to a tensor"
        )
        raise OutputError(f"{self.title} takes {reason}; {way}")

    def _too_small_or_large(self, width: int, height: int) -> str | None:
        least, most = self.sides
        for side, pixels in (("wide", width), ("high", height)):
            if not least <= pixels <= most:
                return f"{least} to {most} pixels a side, and frames of {width}x{height} are {pixels} {side}"
        if (width + _PADDING) * (height + _PADDING) >= _MOST_PIXELS:
            millions = _MOST_PIXELS // 10**6
            return (
                f"up to {millions} million pixels a frame, {_PADDING} more rows and columns included, and frames of "
                f"{width}x{height} have more"
            )
        return None


_AAC = ("-c:a", "aac", "-b:a", "192k")
_OPUS = ("-c:a", "libopus", "-b:a", "160k")
_PCM = ("-c:a", "pcm_s24le")

FORMATS = {
    one.name: one
    for one in (
        FileFormat(
            name="h264",
            title="H.264 (8 bit)",
            suffixes=(".mp4", ".mkv", ".mov"),
            encoder="libx264",
            pixels=YUV420,
            # Half of the usual frames to look ahead at: 60 MB less at 720p. "faster" takes half of the usual preset's
            # time, and with a CRF less by one makes files of the same PSNR that are 2 to 9% larger.
            arguments=("-preset", "faster", "-rc-lookahead", "20"),
            tags=_BT709,
            crf={"low": 27, "medium": 19, "high": 13, "best": 5},
            most_crf=51,
            audio=dict.fromkeys((".mp4", ".mkv", ".mov"), _AAC),
            even=True,
            sides=(2, 16384),
            browsers=True,
        ),
        FileFormat(
            name="h265",
            title="H.265 (10 bit)",
            suffixes=(".mp4", ".mkv", ".mov"),
            encoder="libx265",
            pixels=YUV420_10,
            # hvc1: Apple's players take no other tag.
            arguments=("-x265-params", "log-level=error:frame-threads=2:rc-lookahead=15", "-tag:v", "hvc1"),
            tags=_BT709,
            crf={"low": 30, "medium": 22, "high": 16, "best": 8},
            most_crf=51,
            audio=dict.fromkeys((".mp4", ".mkv", ".mov"), _AAC),
            even=True,
            # Of fewer columns than 56 libx265 ends itself at the third frame.
            sides=(64, 16384),
        ),
        FileFormat(
            name="vp9",
            title="VP9 (8 bit)",
            suffixes=(".webm", ".mkv"),
            encoder="libvpx-vp9",
            pixels=YUV420,
            alpha=YUVA420,
            arguments=("-b:v", "0", "-deadline", "good", "-cpu-used", "4", "-row-mt", "1"),
            # Of 12000x12000 on two cores 14 s, and 49 with memory for frames to look ahead at, which a single frame
            # does not prove to be there with other encoders either.
            trial_arguments=("-deadline", "realtime", "-cpu-used", "8", "-lag-in-frames", "0"),
            tags=_BT709,
            crf={"low": 42, "medium": 32, "high": 22, "best": 10},
            most_crf=63,
            audio=dict.fromkeys((".webm", ".mkv"), _OPUS),
            browsers=True,
        ),
        FileFormat(
            name="prores",
            title="ProRes 422 HQ (10 bit)",
            suffixes=(".mov",),
            encoder="prores_ks",
            pixels=YUV422_10,
            alpha=YUVA444_10,
            arguments=("-profile:v", "hq", "-vendor", "apl0"),
            alpha_arguments=("-profile:v", "4444", "-vendor", "apl0", "-alpha_bits", "16"),
            tags=_BT709,
            audio={".mov": _PCM},
            even=True,
        ),
        FileFormat(
            name="ffv1",
            title="FFV1 (lossless RGB, 16 bit)",
            suffixes=(".mkv",),
            encoder="ffv1",
            pixels=GBR_16,
            alpha=GBRA_16,
            arguments=("-level", "3", "-g", "1", "-slicecrc", "1"),
            tags=_SRGB,
            audio={".mkv": _PCM},
        ),
        FileFormat(name="png8", title="PNG pictures (8 bit)", suffixes=(), encoder="png", pixels=RGB_8),
        FileFormat(name="png16", title="PNG pictures (16 bit)", suffixes=(), encoder="png", pixels=RGB_16),
    )
}
# What a suffix means where no format is named.
_USUAL = {".mp4": "h264", ".mkv": "h264", ".mov": "h264", ".webm": "vp9", ".png": "png8"}
VIDEO_SUFFIXES = tuple(suffix for suffix in _USUAL if suffix != ".png")


def choose_format(path: Path, name: str | None) -> FileFormat:
    """The format of ``name`` for a file or numbered pictures at ``path``; None for what the suffix usually means.

    Raises:
        OutputError: an unknown format, or one that such a file can't hold.
    """
    suffix = path.suffix.lower()
    if name is not None and name not in FORMATS:
        raise OutputError(f"format is {name!r}; it must be one of {', '.join(FORMATS)}")
    chosen = FORMATS[name or _USUAL[suffix]]
    if chosen.pictures != (suffix == ".png") or (chosen.suffixes and suffix not in chosen.suffixes):
        wanted = "a name as frames/%04d.png" if chosen.pictures else f"a {' or '.join(chosen.suffixes)}"
        raise OutputError(about_file(path, f"can't hold {chosen.title}; name {wanted}, or choose another format"))
    return chosen
