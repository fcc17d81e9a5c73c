"""What the nodes do whose frames go to a file, or come from one, a few at a time.

B videos, T latent frames, h x w latent rows and columns, z channels; H x W frames of C colours
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as model_management
import torch

from ..wan_vae_parallel.errors import CheckpointError, FrameError, LatentError
from ..wan_vae_parallel.files.frames_in import open_video, resized
from ..wan_vae_parallel.files.settings import OutputSettings
from ..wan_vae_parallel.images import encode_pictures, images_at_once
from ..wan_vae_parallel.to_video import VideoDecode, joined
from .graph_errors import in_graph_words
from .latents import look_normalized, read_samples
from .progress import ChunkProgress
from .report import tell_encoded
from .vaes import ParallelVAE, _output_dtype

_check = model_management.throw_exception_if_processing_interrupted
_ANOTHER = "choose another video"


@in_graph_words()
def latents_for_file(vae: ParallelVAE, latent: Any, *, normalized: bool) -> tuple[torch.Tensor, bool]:
    """What of a LATENT is to be decoded to a file, ``[B, z, T, h, w]``, and whether it is normalised.

    As `ParallelVAE.decode_samples` reads it, but for what needs frames to be put together.

    Raises:
        LatentError: it is a loop's, or has frames that were decoded already.
    """
    samples = read_samples(latent, vae._current_engine("decoder").architecture)
    if samples.latents is None:
        raise LatentError(
            "the LATENT has frames that are decoded already (video); connect them to Create Video, by way of Wan VAE "
            "Decode (Parallel)"
        )
    if samples.looped:
        raise LatentError(
            "the LATENT is of a loop (looped), whose last frames are decoded once more with its first ones; connect "
            "Wan VAE Decode (Parallel) and Create Video"
        )
    normalized = normalized or vae._normalized
    return samples.latents, normalized or (samples.from_wrapper and look_normalized(samples.latents))


@in_graph_words()
def plan_file(
    vae: ParallelVAE,
    latents: Sequence[torch.Tensor],
    path: Path,
    settings: OutputSettings,
    *,
    normalized: bool,
    vae_alpha: ParallelVAE | None = None,
) -> VideoDecode:
    """A decode of parts of one video to a file, checked and not begun.

    Args:
        vae: decodes.
        latents: ``[1, z, T, h, w]`` each, one after the other in time.
        path: where to.
        settings: how.
        normalized: see `wan_vae_parallel.VAE.decode`.
        vae_alpha: decodes their alpha; see `wan_vae_parallel.VAE.decode_to_video`.

    Raises:
        CheckpointError: the VAEs don't make the same frames.
        LatentError: they can't be decoded.
        OutputError: they can't be written so.
    """
    engine = vae._current_engine("decoder")
    alpha = vae_alpha and vae_alpha._current_engine("decoder").vae
    whole = joined(latents, engine.architecture)
    return VideoDecode(engine.vae, whole, path, settings, normalized, vae_alpha=alpha, on_wait=_check)


@in_graph_words()
def decode_to_file(
    vae: ParallelVAE, decode: VideoDecode, *, part: int, parts: int, vae_alpha: ParallelVAE | None = None
) -> list[Path]:
    """Decodes to a file, or several of pictures, with progress, previews and cancelling; returns these.

    Args:
        vae: decodes.
        decode: what `plan_file` made.
        part: which of ``parts`` videos it is, for the progress bar.
        parts: how many there are.
        vae_alpha: what it was planned with.
    """
    progress = ChunkProgress(parts=parts)
    size = vae._engine.architecture.frame_size(*decode.shape[3:])
    used = [one for one in (vae, vae_alpha) if one is not None]

    def before(decoder: Any) -> None:
        own = next(one for one in used if one._engine.vae is decoder)
        own._engine.set_chunk(own._chunk)
        own._engine.make_room("decoder", own._engine.memory_needed(decode.shape))

    return decode.run(on_chunk=progress.pictures_of(part, size), before=before)


@in_graph_words()
def encode_file(vae: ParallelVAE, path: Path, *, size: tuple[int, int], most: int | None, chunk: int) -> torch.Tensor:
    """Encodes a video's file to ``[1, z, T', h, w]``, with progress and cancelling.

    With a VAE that knows no time each frame is a picture: ``[T, z, 1, h, w]``.

    Args:
        vae: encodes.
        path: of the file.
        size: width and height to stretch frames to; 0 for the video's own, or in proportion to the other one.
        most: frames, the first ones; None for all.
        chunk: latent frames' pictures at once; 0 for as many as the VAE was made with.

    Raises:
        CheckpointError: the weights have no encoder.
        FrameError: the file can't be read, or has no frames.
    """
    since = time.monotonic()
    engine = vae._current_engine("encoder")
    architecture = engine.architecture
    if architecture.encoder_width is None:
        raise CheckpointError(
            f"{engine.source.name} has no encoder, so that this VAE can only decode; encode with the whole Wan VAE"
        )
    engine.set_chunk((chunk or vae._chunk) * architecture.temporal_ratio)
    progress = ChunkProgress(parts=1, previews=False).part(0)
    parts: list[torch.Tensor] = []
    with open_video(path, colours=architecture.input_channels, most=most, another=_ANOTHER) as source:

        def frames() -> Iterator[torch.Tensor]:
            room = False
            for frame in source:
                _check()
                frame = resized(frame, _stretched(frame, size, architecture.encode_ratio))
                if not room:
                    count = source.expected or most or architecture.temporal_ratio + 1
                    shape = (1, count, *frame.shape[1:])
                    if architecture.images_only:
                        shape = (images_at_once(architecture, *frame.shape[1:3]), 1, *frame.shape[1:])
                    engine.make_room("encoder", engine.encode_memory_needed(shape))
                    room = True
                yield frame

        done = 0
        # As core's VAE Encode does with such a VAE: each frame is a picture.
        images = architecture.images_only
        encode = functools.partial(encode_pictures, engine.vae) if images else engine.vae.encode_stream
        for latents in encode(frames(), normalized=vae._normalized, on_wait=_check):
            parts.append(latents)
            done += len(latents) if images else latents.shape[2]
            total = source.expected and architecture.latent_frames(architecture.encoded_frames(source.expected))
            progress(done, max(done, total or 0), latents)
    if not parts:
        raise FrameError(f"{path.name} has no frames; {_ANOTHER}")
    whole = torch.cat(parts, dim=0 if images else 2)
    tell_encoded(whole, architecture, since, engine.worked_on)
    return whole.to(vae.output_device, _output_dtype(vae))


def _stretched(frame: torch.Tensor, size: tuple[int, int], ratio: int) -> tuple[int, int]:
    """Width and height for ``[1, H, W, C]``; of one that is not given the nearest multiple of ``ratio``."""
    height, width = frame.shape[1:3]
    if not any(size):
        return width, height
    if all(size):
        return size
    asked = size[0] / width if size[0] else size[1] / height
    other = max(ratio, round((height if size[0] else width) * asked / ratio) * ratio)
    return (size[0], other) if size[0] else (other, size[1])
