"""Sound that goes with a video.

C channels, N samples
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from pathlib import Path

import torch

from ..errors import OutputError
from .ffmpeg import layout_channels, sound_channels

_MOST_CHANNELS = 8
_RATES = (1000, 384000)
# What so many channels usually are, as WAV files order them.
_LAYOUTS = ("mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1")
# What Opus gets: others are mixed to the nearest. Of its own (RFC 7845, 5.1.1.2) 5.0 and 6.1 are left out, whose
# channels ffmpeg's libopus takes one for another; within 5.1 and 7.1 they are right. Of a subwoofer a mix leaves
# nothing, so that it must have its place; and pairs for headphones would become one.
_OPUS, _OPUS_WITH_SUBWOOFER, _OPUS_PAIR = "mono|stereo|3.0|quad|5.1|7.1", "5.1|7.1", "stereo"
_SUBWOOFER = "LFE"
_PAIRS = ({"DL", "DR"}, {"BIL", "BIR"})
# What any ffmpeg mixes into others where they have no place of their own; of the rest it leaves out some or all.
_MIXED = {"FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR"}


@dataclass(frozen=True, eq=False)
class Audio:
    """Samples in memory.

    Attributes:
        waveform: ``[C, N]``, floats in [-1, 1]; of no samples it is silence.
        sample_rate: samples a second.
    """

    waveform: torch.Tensor
    sample_rate: int

    def __post_init__(self) -> None:
        wave, rate = self.waveform, self.sample_rate
        if not isinstance(wave, torch.Tensor) or wave.dim() != 2 or not wave.is_floating_point():
            shape = f"{tuple(wave.shape)} {wave.dtype}" if isinstance(wave, torch.Tensor) else type(wave).__name__
            raise OutputError(f"the audio is {shape}; it must be a tensor of floats [channels, samples]")
        if not 1 <= wave.shape[0] <= _MOST_CHANNELS:
            raise OutputError(
                f"the audio has {wave.shape[0]} channels; it must have 1 to {_MOST_CHANNELS}: mix it to stereo"
            )
        if isinstance(rate, bool) or not isinstance(rate, Integral) or not _RATES[0] <= rate <= _RATES[1]:
            raise OutputError(
                f"the audio has {rate!r} samples a second; it must have a whole number from {_RATES[0]} to {_RATES[1]}"
            )
        if not bool(wave.isfinite().all()):
            raise OutputError("the audio has NaN or infinite samples; look at what made it")


def write_samples(audio: Audio, seconds: Fraction, file: Path) -> None:
    """Writes the samples of so many seconds, as `audio_input` tells of them."""
    used = audio.waveform[:, : math.ceil(seconds * audio.sample_rate)].detach().to("cpu", torch.float32)
    if not used.shape[1]:
        used = torch.zeros(used.shape[0], 1)  # to go on from: not every ffmpeg fills what is empty
    file.write_bytes(used.t().contiguous().numpy().astype("<f4").tobytes())


def audio_input(audio: Audio | Path, samples: str) -> list[str]:
    """Ffmpeg's arguments that read ``audio``, whose samples are in the file ``samples`` if it is no file itself."""
    if isinstance(audio, Path):
        return ["-i", f"file:{audio}"]
    layout = _LAYOUTS[audio.waveform.shape[0] - 1]
    return ["-f", "f32le", "-sample_rate", str(audio.sample_rate), "-ch_layout", layout, "-i", f"file:{samples}"]


def audio_channels(audio: Audio | Path, program: str) -> tuple[str, ...] | None:
    """The channels of ``audio`` as ffmpeg names them; none of places that nobody knows, None of no sound."""
    if isinstance(audio, Path):
        return sound_channels(program, audio)
    return layout_channels(program, _LAYOUTS[audio.waveform.shape[0] - 1])


def encoders_layouts(channels: tuple[str, ...] | None, encoder: str) -> str | None:
    """Layouts, as ffmpeg's filter takes them, one of which ``encoder`` is to get; None for what comes.

    Raises:
        OutputError: channels would be left out in any.
    """
    if encoder != "libopus" or channels is None:
        return None
    if set(channels) in _PAIRS:
        return _OPUS_PAIR
    if not channels or (lost := [name for name in channels if name not in _MIXED]):
        which = f"the channels {' '.join(lost)}" if channels else "channels of unknown places"
        raise OutputError(
            f"the sound has {which}, which Opus has no place for; mix it to 7.1 or fewer, or choose a format whose "
            f"sound is not compressed (ffv1, prores)"
        )
    return _OPUS_WITH_SUBWOOFER if _SUBWOOFER in channels else _OPUS


def audio_filter(seconds: Fraction, layouts: str | None = None) -> str:
    """Ffmpeg's filter that cuts the sound to so many seconds, or adds silence, in one of ``layouts``."""
    channels = f"aformat=channel_layouts={layouts}," if layouts else ""
    return f"{channels}apad,atrim=end={float(seconds):.6f}"
