"""Decoding straight into files, of which a few steps' frames are ever in memory.

B videos, T latent frames, h x w latent rows and columns, z channels; H x W frames of C colours
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .architecture import Architecture
from .errors import ArgumentError, CheckpointError, LatentError, OutputError, about_file
from .files.audio import Audio
from .files.kinds import user_path
from .files.latents import check_latents
from .files.settings import OutputSettings, no_check
from .files.video import check_keeps_alpha, is_sequence, plan_output
from .files.waiting_frames import WaitingFrames
from .files.whole import check_writable, unfinished_folder
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

    def take_over(self, other: Any) -> None: ...

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


def check_alike(
    colours: Architecture, alpha: Architecture, names: tuple[str, str] = ("the VAE of the colours", "vae_alpha")
) -> None:
    """Raises `CheckpointError` if two VAEs can't make the colours and the alpha of the same frames."""
    sizes = [one.frame_size(1, 1) for one in (colours, alpha)]
    if (sizes[0], colours.z_dim, colours.temporal_ratio) != (sizes[1], alpha.z_dim, alpha.temporal_ratio):
        raise CheckpointError(
            f"the two VAEs don't make the same frames: {names[0]} is a {colours.name} VAE, {colours.z_dim} channels to "
            f"{sizes[0][0]} pixels a side, and {names[1]} a {alpha.name} one, {alpha.z_dim} to {sizes[1][0]}; take the "
            f"two VAEs of Wan-Alpha"
        )


class VideoDecode:
    """A decode of latents to a file that has been checked, and has not begun: of several, all can be made first.

    Args:
        vae: decodes.
        latents: ``[B, z, T, h, w]``.
        path: where to.
        settings: how.
        normalized: see `vae.VAE.decode`.
        vae_alpha: decodes the same latents to frames whose first colour is the others' alpha. It does so before, and
            what it makes waits beside the file, a byte or two a pixel.
        on_wait: see `vae.VAE.decode`.

    Attributes:
        shape: ``[B, z, T, h, w]`` of the latents.
        files: that it will write; none on a group's other ranks.
        alpha: whether they will have alpha.

    Raises:
        LatentError, ClosedError: as `vae.VAE.decode` does.
        CheckpointError: the VAEs don't make the same frames.
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
        vae_alpha: Decodes | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        latents = check_latents(latents, vae.architecture)
        path = user_path(path, OutputError, another="name a file such as video.mp4")
        self.shape = latents.shape
        self._vae, self._vae_alpha = vae, vae_alpha
        self._on_wait = on_wait
        self._frames = vae.output_shape(latents.shape)
        if vae_alpha is not None:
            if not hasattr(vae_alpha, "pixel_stream"):
                raise ArgumentError(f"vae_alpha is {vae_alpha!r}; it must be a VAE, as load_vae returns")
            check_alike(vae.architecture, vae_alpha.architecture)
            if vae_alpha.group is not vae.group:
                raise ArgumentError("the VAE and vae_alpha are of different process groups; load both with the same")
            check_keeps_alpha(path, settings)
            self._frames = torch.Size((*self._frames[:4], 4))
        parts = [latents]
        # A batch's images are written as one video's frames, so that no more are in memory than are decoded together.
        self._images = latents.shape[2] == 1 and is_sequence(path)
        if self._images:
            self._frames = torch.Size((1, len(latents), *self._frames[2:]))
            parts = list(latents.split(images_that_pay(vae.architecture, *latents.shape[3:])))
        writes = vae.group is None or not dist.get_rank(vae.group)
        self._output = plan_output(path, self._frames, settings, on_wait or no_check) if writes else None
        self._pixels = self._output.pixels if self._output else None
        # Each is checked at the call.
        if vae_alpha is None:
            self._streams = [vae.pixel_stream(part, self._pixels, normalized, on_wait) for part in parts]
            return
        colours, self._alpha_pixels = (
            (self._pixels and self._pixels.without_alpha),
            (self._pixels and self._pixels.alpha_alone),
        )
        self._streams = [vae.pixel_stream(part, colours, normalized, on_wait) for part in parts]
        self._alpha_streams = [vae_alpha.pixel_stream(part, self._alpha_pixels, normalized, on_wait) for part in parts]
        if self._output:
            pixel = self._alpha_pixels.sample_bytes if self._alpha_pixels else torch.float32.itemsize
            check_writable(self._beside / path.name, needed=pixel * self._frames[:4].numel(), what="its alpha")

    @property
    def files(self) -> list[Path]:
        return self._output.files if self._output else []

    @property
    def alpha(self) -> bool:
        return (self._pixels.colours if self._pixels else self._frames[4]) == 4

    def run(
        self,
        *,
        on_chunk: OnPicture | None = None,
        at_work: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        before: Callable[[Any], None] | None = None,
    ) -> list[Path]:
        """Decodes, once.

        Args:
            on_chunk: see `vae.VAE.decode_to_video`.
            at_work: entered whenever files are opened, written to or closed.
            before: called with each VAE before it decodes.

        Returns:
            `files`.
        """
        with contextlib.ExitStack() as stack:
            alpha = self._decode_alpha(stack, on_chunk, at_work, before) if self._vae_alpha is not None else None
            self._begin(self._vae, self._vae_alpha, before)
            with contextlib.closing(self._steps(self._streams)) as steps, contextlib.ExitStack() as written:
                if self._output is None:
                    for _ in steps:
                        pass
                    return []
                with at_work():
                    write = written.enter_context(self._output.open(self._on_wait or no_check))
                done, total = 0, self._frames[1]
                for frames in steps:
                    with at_work():
                        whole = frames if alpha is None else self._with_alpha(frames, alpha.read(done, frames.shape[1]))
                        write(whole)
                    done += frames.shape[1]
                    if on_chunk:
                        picture = _picture(whole[0, -1], self._pixels, self._frames)
                        on_chunk(*((done, total) if alpha is None else (total + done, 2 * total)), picture)
                    del whole
                with at_work():
                    written.close()
            with at_work():
                stack.close()
        return self._output.files

    def _begin(self, vae: Decodes, other: Decodes | None, before: Callable[[Any], None] | None) -> None:
        if other is not None:
            vae.take_over(other)  # one set of worker processes for both
        if before:
            before(vae)

    def _decode_alpha(
        self,
        stack: contextlib.ExitStack,
        on_chunk: OnPicture | None,
        at_work: Callable[[], contextlib.AbstractContextManager[None]],
        before: Callable[[Any], None] | None,
    ) -> WaitingFrames | None:
        """Decodes the alpha to a file that is there until ``stack`` is closed; None on a group's other ranks."""
        assert self._vae_alpha is not None
        self._begin(self._vae_alpha, self._vae, before)
        with contextlib.closing(self._steps(self._alpha_streams)) as steps:
            if self._output is None:
                for _ in steps:
                    pass
                return None
            done, total = 0, self._frames[1]
            with at_work(), self._told():
                folder = stack.enter_context(unfinished_folder(self._beside, "alpha"))
                file = stack.enter_context((folder / "alpha").open("w+b"))
            alpha = WaitingFrames(file, batch=self._frames[0], total=total)
            for frames in steps:
                frames = frames if self._alpha_pixels else frames[..., :1]
                with at_work(), self._told():
                    alpha.write(frames)
                done += frames.shape[1]
                if on_chunk:
                    on_chunk(done, 2 * total, _picture(frames[0, -1], self._alpha_pixels, self._frames))
        return alpha

    def _with_alpha(self, frames: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        if self._pixels is not None:
            return self._pixels.with_alpha(frames, alpha)
        return torch.cat([frames[..., :3], alpha.to(frames.dtype)], dim=-1)

    @property
    def _beside(self) -> Path:
        """The folder where files lie or will, or, of pictures, that in which theirs will be made."""
        parent = self.files[0].parent
        return parent if parent.is_dir() else parent.parent

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                about_file(
                    self.files[0],
                    "could not be written, nor its alpha beside it; free some room or choose another place",
                    error,
                )
            ) from error

    def _steps(self, streams: Sequence[Any]) -> Generator[torch.Tensor, None, None]:
        """What is decoded, as it is written."""
        for stream in streams:
            with contextlib.closing(stream):
                for frames in stream:
                    yield frames.transpose(0, 1) if self._images else frames


def _picture(frame: torch.Tensor, pixels: PixelFormat | None, shape: torch.Size) -> Picture:
    def picture(step: int = 1) -> torch.Tensor:
        return frame[::step, ::step] if pixels is None else pixels.picture(frame, shape[2], shape[3], step)

    return picture
