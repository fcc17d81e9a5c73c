"""How frames are to be written, as users choose it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from pathlib import Path

from ..errors import OutputError
from .audio import Audio
from .formats import Quality

# Of fewer a frame lasts longer than MP4 can say; of more, MKV and WebM, which count milliseconds, have two at one time.
LEAST_FPS, MOST_FPS = Fraction(1, 100), 1000
# Of frame rates; that of NTSC is 1001.
_MOST_DENOMINATOR = 1_000_000

Check = Callable[[], None]


def no_check() -> None:
    """For who does not cancel."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """How frames are written.

    Attributes:
        fps: frames a second of a video; pictures have none.
        format: one of `formats.FORMATS`; None for what the file's suffix usually means.
        quality: ``"low"``, ``"medium"``, ``"high"``, ``"best"``, or the encoder's CRF, where less is better.
        audio: samples, or a file with sound; it is cut or filled with silence to the video's length.
        metadata: texts that go into the file.
        odd: of odd sides, where a format takes even ones only: ``"pad"`` repeats the last row or column, ``"crop"``
            leaves it out.
        old_pictures: numbered pictures of an older, longer video that would follow the new ones: ``"refuse"`` to write,
            or ``"clear"`` them away when the new ones are there.
        preview: a small H.264 video besides, of the first video, for what can't play the file itself.
        ffmpeg: another one than imageio-ffmpeg's: a path, or a name to look for on the PATH.

    Raises:
        OutputError: one is out of its range.
    """

    fps: float | Fraction = 16
    format: str | None = None
    quality: Quality = "high"
    audio: Audio | Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    odd: str = "pad"
    old_pictures: str = "refuse"
    preview: Path | None = None
    ffmpeg: str | Path | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.fps, Real) and not isinstance(self.fps, bool)
        if not number or not math.isfinite(self.fps) or not LEAST_FPS <= self.fps <= MOST_FPS:
            fps = self.fps if number else repr(self.fps)
            raise OutputError(
                f"a video can't have {fps} frames a second; name a rate from {float(LEAST_FPS)} to {MOST_FPS}"
            )
        for name, value, allowed in (
            ("odd", self.odd, ("pad", "crop")),
            ("old_pictures", self.old_pictures, ("refuse", "clear")),
        ):
            if value not in allowed:
                raise OutputError(f"{name} is {value!r}; it must be {' or '.join(allowed)}")
        if not isinstance(self.audio, (Audio, Path, type(None))):
            raise OutputError(
                f"audio is a {type(self.audio).__name__}; it must be a file with sound, or samples and their rate"
            )
        if not isinstance(self.preview, (Path, type(None))):
            raise OutputError(
                f"preview is a {type(self.preview).__name__}, and not a path; name a file for it, or leave it out"
            )
        if not isinstance(self.metadata, Mapping):
            raise OutputError(f"metadata is a {type(self.metadata).__name__}; it must be a dict of texts")
        for word in (word for pair in self.metadata.items() for word in pair):
            if not isinstance(word, str):
                raise OutputError(f"metadata has {word!r}, a {type(word).__name__}; it must be of texts: make it a str")
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise OutputError(
                    f"metadata has {word[error.start : error.end]!r}, half a character; take it out, or write the text "
                    f"as JSON"
                ) from error
        if isinstance(self.audio, Path) and not self.audio.is_file():
            raise OutputError(f"there is no audio file {self.audio}; name one, or leave the audio away")

    @property
    def rate(self) -> Fraction:
        """Frames a second."""
        # Of NumPy's numbers Fraction takes some.
        fps = self.fps if isinstance(self.fps, (int, float, Fraction)) else float(self.fps)
        return Fraction(fps).limit_denominator(_MOST_DENOMINATOR)
