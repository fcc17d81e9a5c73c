"""Frames as integers in the layout that video encoders take: packed RGB, planes of RGB, or planes of YUV.

B videos, t frames, H x W pixels, C colours

YUV is BT.709's of limited range (Rec. ITU-R BT.709-6, 3.2 to 3.5): Y' = 0.2126 R' + 0.7152 G' + 0.0722 B' and scaled
colour differences, quantised to the nearest integer, half to even, without dither. Chroma that has half the columns is
sited on the left one of each pair (weights 1, 2, 1 of three columns; beyond the edge the last one repeats), and chroma
that has half the rows in the middle of each pair: what H.264, H.265 and VP9 players take for granted, and ProRes says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

# Of red, green and blue.
_WEIGHTS = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the integers of a frame lie in memory.

    Attributes:
        name: ffmpeg's.
        kind: ``"packed"`` has a pixel's colours beside one another; ``"planar"`` has a plane a colour, green, blue and
            red; ``"yuv"`` has the planes Y, Cb and Cr. Either has alpha in a further plane, of full range.
        bits: of a value; more than 8 take two bytes.
        big_endian: the higher byte is the first.
        halved_columns: chroma has half the columns, rounded up.
        halved_rows: chroma has half the rows, rounded up.
        colours: C.
    """

    name: str
    kind: Literal["packed", "planar", "yuv"]
    bits: int = 8
    big_endian: bool = False
    halved_columns: bool = False
    halved_rows: bool = False
    colours: int = 3

    @property
    def sample_bytes(self) -> int:
        """Bytes of a value."""
        return 1 if self.bits == 8 else 2

    def planes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Rows of each plane, and bytes of such a row, of ``rows`` rows of a frame with ``columns`` columns."""
        if self.kind == "packed":
            return [(rows, columns * self.colours * self.sample_bytes)]
        whole = rows, columns * self.sample_bytes
        if self.kind == "planar":
            return [whole] * self.colours
        chroma_rows = -(-rows // 2) if self.halved_rows else rows
        chroma_columns = -(-columns // 2) if self.halved_columns else columns
        alpha = [whole] * (self.colours - 3)
        return [whole, *[(chroma_rows, chroma_columns * self.sample_bytes)] * 2, *alpha]

    def frame_bytes(self, rows: int, columns: int) -> int:
        """Bytes of ``rows`` rows of a frame with ``columns`` columns."""
        return sum(math.prod(plane) for plane in self.planes(rows, columns))

    def row_runs(self, rows: int, columns: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Where in a frame of ``rows`` rows the planes of rows ``start`` to ``stop`` lie: first and last byte of each.

        ``start`` must be even where chroma has half the rows, and so must ``stop`` but at the frame's end.
        """
        runs, at = [], 0
        for (height, width), (before, _), (own, _) in zip(
            self.planes(rows, columns), self.planes(start, columns), self.planes(stop - start, columns), strict=True
        ):
            runs.append((at + before * width, at + (before + own) * width))
            at += height * width
        return runs

    @property
    def without_alpha(self) -> PixelFormat:
        """The same of three colours."""
        return replace(self, name=f"{self.name} without alpha", colours=3)

    @property
    def alpha_alone(self) -> PixelFormat:
        """The alpha of such pixels, whose values are the first colour of frames."""
        order = ("be" if self.big_endian else "le") if self.bits > 8 else ""
        return PixelFormat(
            name=f"gray{self.bits if order else ''}{order}",
            kind="packed",
            bits=self.bits,
            big_endian=self.big_endian,
            colours=1,
        )

    def with_alpha(self, frames: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """The bytes of frames whose colours and whose alpha were made apart.

        Args:
            frames: ``[B, t, n]`` of `without_alpha`.
            alpha: ``[B, t, m]`` of `alpha_alone`.

        Returns:
            ``[B, t, n + m]``, uint8.
        """
        if self.kind != "packed":
            return torch.cat([frames, alpha], dim=-1)  # a plane more
        pixels = [part.unflatten(-1, (-1, colours * self.sample_bytes)) for part, colours in ((frames, 3), (alpha, 1))]
        return torch.cat(pixels, dim=-1).flatten(-2)

    def convert(self, frames: torch.Tensor) -> torch.Tensor:
        """The bytes of frames.

        Args:
            frames: ``[B, t, H, W, C]`` float in [0, 1], on any device. Rows that belong to one pair must both be there.
                Colours that the format has not, such as alpha, are left out.

        Returns:
            ``[B, t, frame_bytes(H, W)]``, uint8, on the same device. What NaN becomes is not defined.

        Raises:
            ValueError: frames of fewer colours.
        """
        if frames.shape[-1] < self.colours:
            raise ValueError(f"{self.name} takes frames of {self.colours} colours, not {frames.shape[-1]}")
        frames = frames[..., : self.colours]
        batch, count, rows, columns, _ = frames.shape
        out = torch.empty((batch, count, self.frame_bytes(rows, columns)), dtype=torch.uint8, device=frames.device)
        # Frame by frame: what lies between takes little memory.
        for video, into in zip(frames, out, strict=True):
            for frame, bytes_of_it in zip(video, into, strict=True):
                self._convert_frame(frame, bytes_of_it)
        return out

    def picture(self, frame: torch.Tensor, rows: int, columns: int, step: int = 1) -> torch.Tensor:
        """A frame's bytes as ``[H, W, C]`` in [0, 1]; for previews, chroma unfiltered.

        Args:
            frame: ``[frame_bytes(H, W)]``, uint8, on the host.
            rows: H of the frame.
            columns: W of the frame.
            step: of that many rows and columns one is taken.
        """
        y, x = (torch.arange(0, count, step, device=frame.device) for count in (rows, columns))
        most, unit = 2**self.bits - 1, 2 ** (self.bits - 8)
        runs = self.row_runs(rows, columns, 0, rows)
        planes = [frame[start:stop].view(-1, self.sample_bytes) for start, stop in runs]
        if self.kind == "packed":
            return self._values(planes[0].view(rows, columns, self.colours, -1)[y][:, x]) / most
        if self.kind == "planar":
            order = [2, 0, 1, 3][: self.colours]
            found = [self._values(planes[i].view(rows, columns, -1)[y][:, x]) for i in order]
            return torch.stack(found, dim=-1) / most
        luma = self._values(planes[0].view(rows, columns, -1)[y][:, x])
        alpha = [self._values(plane.view(rows, columns, -1)[y][:, x]) / most for plane in planes[3:]]
        height, width = self.planes(rows, columns)[1]
        if self.halved_rows:
            y = y // 2
        if self.halved_columns:
            x = x // 2
        chroma = [self._values(plane.view(height, width // self.sample_bytes, -1)[y][:, x]) for plane in planes[1:3]]
        luma = (luma / unit - 16) / 219
        cb, cr = ((plane / unit - 128) / 224 for plane in chroma)
        red, green, blue = _WEIGHTS
        r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
        return torch.stack([r, (luma - red * r - blue * b) / green, b, *alpha], dim=-1).clamp_(0, 1)

    def _values(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples ``[..., bytes]`` as floats ``[...]``."""
        if self.sample_bytes == 1:
            return samples[..., 0].float()
        high, low = (0, 1) if self.big_endian else (1, 0)
        return samples[..., high].float() * 256 + samples[..., low]

    def _convert_frame(self, frame: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns, _ = frame.shape
        if self.kind == "packed":
            values = [frame * (2**self.bits - 1)]
        elif self.kind == "planar":
            order = [1, 2, 0, 3][: self.colours]
            values = [frame[..., colour] * (2**self.bits - 1) for colour in order]
        else:
            values = self._yuv(frame)
        for plane, (start, stop) in zip(values, self.row_runs(rows, columns, 0, rows), strict=True):
            into = out[start:stop]
            whole = plane.round_().reshape(-1)
            if self.sample_bytes == 1:
                into.copy_(whole)
                continue
            # By way of int32: of unsigned numbers of 16 bits PyTorch knows little.
            integers = whole.to(torch.int32)
            high, low = (0, 1) if self.big_endian else (1, 0)
            pairs = into.view(-1, 2)
            pairs[:, high] = integers >> 8
            pairs[:, low] = integers & 255

    def _yuv(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """Y, Cb and Cr, and alpha if there is one, in units of their integers, not rounded."""
        red, green, blue = _WEIGHTS
        r, g, b, *alpha = frame.unbind(-1)
        y = r * red + g * green + b * blue
        unit = 2 ** (self.bits - 8)
        chroma = [
            self._halved((colour - y) * (224 * unit / (2 * (1 - weight)))).add_(128 * unit)
            for colour, weight in ((b, blue), (r, red))
        ]
        return [y.mul_(219 * unit).add_(16 * unit), *chroma, *(plane * (2**self.bits - 1) for plane in alpha)]

    def _halved(self, plane: torch.Tensor) -> torch.Tensor:
        if self.halved_rows:
            if plane.shape[0] % 2:
                plane = torch.cat([plane, plane[-1:]])
            plane = (plane[::2] + plane[1::2]) / 2
        if self.halved_columns:
            middle = plane[:, ::2]
            left = torch.cat([plane[:, :1], plane[:, 1:-1:2]], dim=1)[:, : middle.shape[1]]
            right = plane[:, 1::2]
            if right.shape[1] < middle.shape[1]:
                right = torch.cat([right, plane[:, -1:]], dim=1)
            plane = (left + 2 * middle + right) / 4
        return plane


YUV420 = PixelFormat(name="yuv420p", kind="yuv", halved_columns=True, halved_rows=True)
YUV420_10 = PixelFormat(name="yuv420p10le", kind="yuv", bits=10, halved_columns=True, halved_rows=True)
YUV422_10 = PixelFormat(name="yuv422p10le", kind="yuv", bits=10, halved_columns=True)
YUVA420 = PixelFormat(name="yuva420p", kind="yuv", halved_columns=True, halved_rows=True, colours=4)
YUVA444_10 = PixelFormat(name="yuva444p10le", kind="yuv", bits=10, colours=4)
GBR_16 = PixelFormat(name="gbrp16le", kind="planar", bits=16)
GBRA_16 = PixelFormat(name="gbrap16le", kind="planar", bits=16, colours=4)
RGB_8 = PixelFormat(name="rgb24", kind="packed")
RGB_16 = PixelFormat(name="rgb48be", kind="packed", bits=16, big_endian=True)
