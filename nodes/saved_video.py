"""A video's file as core's VIDEO."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as model_management
import folder_paths
from comfy_api.latest import InputImpl, Types

from ..wan_vae_parallel.errors import OutputError
from ..wan_vae_parallel.files.video_out import encode_again, tag_as_alpha, tag_as_hvc1

logger = logging.getLogger(__name__)

_check = model_management.throw_exception_if_processing_interrupted

# Where core's VIDEO keeps the name of its file.
_CORES_FILE = "_VideoFromFile__file"
# And what part of it is meant.
_CORES_TRIM = ("_VideoFromFile__start_time", "_VideoFromFile__duration")
# What each container holds, of our formats' streams: core copies those where nothing else is asked for. MP4 is what its
# Save Video writes by default.
_HOLDS = {"mp4": ("h264", "h265", "vp9"), "mkv": ("ffv1", "vp9"), "webm": ("vp9",)}
# Formats that hold RGB, of which core would make YUV by another matrix than it writes.
_RGB = ("ffv1", "png8", "png16")
# Whether core encodes streams again as they come and with their tags; before, it is by way of 8 bits of all frames in
# memory, in colours without tags, and sound of several channels breaks.
_CORE_ENCODES_STREAMS = hasattr(InputImpl.VideoFromFile, "_save_transcoded")


def _temporary() -> str:
    folder: str = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    return folder


class SavedVideo(InputImpl.VideoFromFile):
    """A file as core's VIDEO; what core's copies lack of it is added when it is saved.

    - Streams that MP4 can't hold are encoded again, as H.264; others too where H.264 is asked for and core does it
      badly. What core encodes itself it gets in BT.709's colours, with their tags.
    - H.265 in MP4 keeps the tag hvc1, without which Apple's players refuse it, and VP9 the word that it has alpha.
    - That alpha is left out, for which there is no place in what core makes of a video, is told.

    Args:
        file: where it is.
        format: the engine's name of what is in it.
        alpha: whether there is alpha in it.
        options: core's.
    """

    def __init__(self, file: str, *, format: str, alpha: bool = False, **options: Any) -> None:
        super().__init__(file, **options)
        self._format, self._alpha = format, alpha

    def save_to(
        self, path: Any, format: Any = Types.VideoContainer.AUTO, codec: Any = Types.VideoCodec.AUTO, **rest: Any
    ) -> Any:
        """As core's, and as the class says."""
        container = _container(path, format)
        automatic = codec == Types.VideoCodec.AUTO
        asked = codec == Types.VideoCodec.H264 and self._format != "h264" and not _CORE_ENCODES_STREAMS
        copied = (
            automatic
            and self._format in _HOLDS.get(container, (self._format,))
            and not any(getattr(self, name, None) for name in _CORES_TRIM)
            and all(value is None for name, value in rest.items() if name != "metadata")
        )
        if self._alpha and (container == "mp4" or not copied):
            logger.warning(
                "Wan VAE Parallel: this video has alpha, and what is saved of it has no place for that: it is saved "
                "without. With save on, Wan VAE Decode to Video (Parallel) keeps its own file, which has it"
            )
        ours = asked or (self._format not in _HOLDS["mp4"] and codec in (Types.VideoCodec.AUTO, Types.VideoCodec.H264))
        if container == "mp4" and ours:
            return self._save_encoded_again(path, format, codec, rest, lossless=False)
        if self._format in _RGB and container in _HOLDS and not copied and _CORE_ENCODES_STREAMS:
            # Of Matroska core would copy what it gets.
            codec = Types.VideoCodec.H264 if automatic and container == "mkv" else codec
            return self._save_encoded_again(path, format, codec, rest, lossless=True)
        result = super().save_to(path, format=format, codec=codec, **rest)
        if self._format == "h265":
            _tag(path, tag_as_hvc1, "Apple's players may refuse this H.265 video")
        if self._format == "vp9" and self._alpha and container in ("webm", "mkv") and copied:
            _tag(path, tag_as_alpha, "readers may not see that this video has alpha")
        return result

    def _save_encoded_again(self, path: Any, format: Any, codec: Any, rest: dict[str, Any], *, lossless: bool) -> Any:
        """Not from the file by core, whose colours would be those of other tags than it writes."""
        with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
            encoded = Path(folder) / ("encoded.mkv" if lossless else "encoded.mp4")
            encode_again(Path(self.get_stream_source()), encoded, _check, lossless=lossless)
            copied = copy.copy(self)
            copied._format, copied._alpha = "yuv" if lossless else "h264", False
            setattr(copied, _CORES_FILE, str(encoded))
            return copied.save_to(path, format=format, codec=codec, **rest)

    def as_trimmed(self, *args: Any, **options: Any) -> Any:
        """As core's, of those versions that trim; a part of the file stays one of ours."""
        trimmed = super().as_trimmed(*args, **options)
        if type(trimmed) is InputImpl.VideoFromFile:
            trimmed.__class__, trimmed._format, trimmed._alpha = SavedVideo, self._format, self._alpha
        return trimmed


def _container(path: Any, format: Any) -> str:
    """The container that core writes, by its name or the file's; empty where it goes by what it copies."""
    if format != Types.VideoContainer.AUTO:
        return str(getattr(format, "value", format))
    return os.path.splitext(os.fspath(path))[1].lower()[1:] if isinstance(path, (str, os.PathLike)) else ""


def _tag(path: Any, tag: Callable[[Path, Callable[[], None]], bool], otherwise: str) -> None:
    """Tags what core has written, to a file or a buffer; what can't be done is only said."""
    try:
        if isinstance(path, (str, os.PathLike)):
            tag(Path(path), _check)
            return
        with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
            copy_of_it = Path(folder) / "video"
            copy_of_it.write_bytes(path.getvalue())
            if tag(copy_of_it, _check):
                path.seek(0)
                path.truncate()
                path.write(copy_of_it.read_bytes())
    except OutputError as error:
        logger.warning("Wan VAE Parallel: %s: %s", otherwise, error)
