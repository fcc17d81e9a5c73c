"""Decoding straight into files, of which a few steps' frames are ever in memory.

B videos, T latent frames, h x w latent rows and columns, z channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .architecture import Architecture
from .errors import ArgumentError, LatentError, OutputError
from .files.audio import Audio
from .files.kinds import user_path
from .files.latents import check_latents
from .files.settings import OutputSettings
from .files.video import is_sequence, plan_output
from .memory import images_that_pay
from .ops.pixel_format import PixelFormat

AnyAudio = str | Path | Audio | tuple[torch.Tensor, int]
Picture = Callable[..., torch.Tensor]
OnPicture = Callable[[int, int, Picture], None]

# What Wan's models were trained at.
USUAL_FPS = {"wan2.1": 16.0, "wan2.2": 24.0}
_OPTIONS = {field.name for field in dataclasses.fields(OutputSettings)}


class Decodes(Protocol):
    """What is needed of a VAE."""

    architecture: Architecture

    @property
    def group(self) -> dist.ProcessGroup | None: ...

    def output_shape(self, shape: Sequence[int]) -> torch.Size: ...

    def pixel_stream(
        self,
        latents: torch.Tensor,
        pixels: PixelFormat | None,
        normalized: bool = ...,
        on_wait: Callable[[], None] | None = ...,
    ) -> Any: ...


def output_settings(
    architecture: Architecture, *, fps: float | Fraction | None, audio: AnyAudio | None, **options: Any
) -> OutputSettings:
    """Settings as users give them.

    Raises:
        OutputError: one is unknown, or out of its range.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ArgumentError(f"{', '.join(unknown)} is no option of a video; those are {', '.join(sorted(_OPTIONS))}")
    if isinstance(audio, tuple):
        if len(audio) != 2:
            raise ArgumentError(f"audio has {len(audio)} parts; it must be (samples, samples a second), or a file")
        audio = Audio(*audio)
    elif isinstance(audio, (str, Path)):
        audio = user_path(audio, OutputError, another="name a file with sound")
    if options.get("preview") is not None:
        options["preview"] = user_path(options["preview"], OutputError, another="name a file such as preview.mp4")
    if options.get("metadata", {}) is None:
        del options["metadata"]
    return OutputSettings(
        fps=USUAL_FPS.get(architecture.family, USUAL_FPS["wan2.1"]) if fps is None else fps, audio=audio, **options
    )


def joined(latents: torch.Tensor | Sequence[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Latents whose parts follow one another, as one checked tensor ``[B, z, T, h, w]``: in time, or images in a batch.

    Raises:
        LatentError: there are none, one can't be decoded, or they differ in more than their length.
    """
    if isinstance(latents, torch.Tensor):
        return check_latents(latents, architecture)
    if not isinstance(latents, Sequence) or isinstance(latents, (str, bytes)):
        raise LatentError(
            f"latents are a {type(latents).__name__}; they must be a torch tensor [B, C, T, h, w], or a list of such "
            f"that follow one another"
        )
    # Each by itself: what axes it has is told by its own shape.
    parts = [check_latents(part, architecture) for part in latents]
    if not parts:
        raise LatentError("there are no latents to decode; give a tensor, or several that follow one another")
    axis = 0 if architecture.images_only else 2
    for number, part in enumerate(parts):
        shapes = [(*one.shape[:axis], *one.shape[axis + 1 :]) for one in (parts[0], part)]
        if shapes[0] != shapes[1]:
            raise LatentError(
                f"part {number + 1} of the latents has the shape {tuple(part.shape)}, and the first "
                f"{tuple(parts[0].shape)}; parts of one file may differ in their number of frames, or of images, only"
            )
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to("cpu", dtype) for part in parts], dim=axis)


class VideoDecode:
    """A decode of latents to a file that has been checked, and has not begun: of several, all can be made first.

    Args:
        vae: decodes.
        latents: ``[B, z, T, h, w]``.
        path: where to.
        settings: how.
        normalized: see `vae.VAE.decode`.
        on_wait: see there.

    Attributes:
        shape: ``[B, z, T, h, w]`` of the latents.
        files: that it will write; none on a group's other ranks.

    Raises:
        LatentError, ClosedError: as `vae.VAE.decode` does.
        OutputError: it can't be written so.
    """

    def __init__(
        self,
        vae: Decodes,
        latents: torch.Tensor,
        path: str | Path,
        settings: OutputSettings,
        normalized: bool = False,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        latents = check_latents(latents, vae.architecture)
        path = user_path(path, OutputError, another="name a file such as video.mp4")
        self.shape = latents.shape
        self._on_wait = on_wait
        self._frames = vae.output_shape(latents.shape)
        parts = [latents]
        # A batch's images are written as one video's frames, so that no more are in memory than are decoded together.
        self._images = latents.shape[2] == 1 and is_sequence(path)
        if self._images:
            self._frames = torch.Size((1, len(latents), *self._frames[2:]))
            parts = list(latents.split(images_that_pay(vae.architecture, *latents.shape[3:])))
        writes = vae.group is None or not dist.get_rank(vae.group)
        self._output = plan_output(path, self._frames, settings) if writes else None
        self._pixels = self._output.pixels if self._output else None
        # Each is checked at the call.
        self._streams = [vae.pixel_stream(part, self._pixels, normalized, on_wait) for part in parts]

    @property
    def files(self) -> list[Path]:
        return self._output.files if self._output else []

    def run(
        self,
        *,
        on_chunk: OnPicture | None = None,
        at_work: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> list[Path]:
        """Decodes, once.

        Args:
            on_chunk: see `vae.VAE.decode_to_video`.
            at_work: entered whenever files are opened, written to or closed.

        Returns:
            `files`.
        """
        if self._output is None:
            for _ in self._steps():
                pass
            return []
        done = 0
        with contextlib.closing(self._steps()) as steps, contextlib.ExitStack() as stack:
            with at_work():
                write = stack.enter_context(self._output.open(self._on_wait or _nothing))
            for frames in steps:
                with at_work():
                    write(frames)
                done += frames.shape[1]
                if on_chunk:
                    on_chunk(done, self._frames[1], _picture(frames[0, -1], self._pixels, self._frames))
            with at_work():
                stack.close()
        return self._output.files

    def _steps(self) -> Generator[torch.Tensor, None, None]:
        """What is decoded, as it is written."""
        for stream in self._streams:
            with contextlib.closing(stream):
                for frames in stream:
                    yield frames.transpose(0, 1) if self._images else frames


def _picture(frame: torch.Tensor, pixels: PixelFormat | None, shape: torch.Size) -> Picture:
    def picture(step: int = 1) -> torch.Tensor:
        return frame[::step, ::step] if pixels is None else pixels.picture(frame, shape[2], shape[3], step)

    return picture


def _nothing() -> None:
    pass
