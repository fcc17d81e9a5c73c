"""A video's file as core's VIDEO."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import comfy.model_management as model_management
import folder_paths
from comfy_api.latest import InputImpl, Types

from ..wan_vae_parallel.errors import OutputError
from ..wan_vae_parallel.files.video_out import encode_again, tag_as_hvc1

logger = logging.getLogger(__name__)

_check = model_management.throw_exception_if_processing_interrupted

# Where core's VIDEO keeps the name of its file.
_CORES_FILE = "_VideoFromFile__file"
# What MP4 holds, which core's Save Video writes by default.
_IN_MP4 = ("h264", "h265", "vp9")
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
      badly.
    - H.265 in MP4 keeps the tag hvc1, without which Apple's players refuse it.
    - That alpha is left out, which MP4 has no place for, is told.

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
        named = isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(".mp4")
        to_mp4 = named or format == Types.VideoContainer.MP4
        asked = codec == Types.VideoCodec.H264 and self._format != "h264" and not _CORE_ENCODES_STREAMS
        if to_mp4 and self._alpha:
            logger.warning(
                "Wan VAE Parallel: this video has alpha, which MP4 has no place for: it is saved without. With save "
                "on, Wan VAE Decode to Video (Parallel) keeps its own file, which has it"
            )
        ours = (self._format not in _IN_MP4 or asked) and codec in (Types.VideoCodec.AUTO, Types.VideoCodec.H264)
        if not to_mp4 or not ours:
            result = super().save_to(path, format=format, codec=codec, **rest)
            if self._format == "h265":
                _tag_as_hvc1(path)
            return result
        # Not by core, whose colours would be those of other tags than it writes.
        with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
            encoded = Path(folder) / "encoded.mp4"
            encode_again(Path(self.get_stream_source()), encoded, _check)
            copied = copy.copy(self)
            copied._format, copied._alpha = "h264", False
            setattr(copied, _CORES_FILE, str(encoded))
            return copied.save_to(path, format=format, codec=codec, **rest)

    def as_trimmed(self, *args: Any, **options: Any) -> Any:
        """As core's, of those versions that trim; a part of the file stays one of ours."""
        trimmed = super().as_trimmed(*args, **options)
        if type(trimmed) is InputImpl.VideoFromFile:
            trimmed.__class__, trimmed._format, trimmed._alpha = SavedVideo, self._format, self._alpha
        return trimmed


def _tag_as_hvc1(path: Any) -> None:
    """`video_out.tag_as_hvc1` of what core has written, to a file or a buffer; what it can't do is only said."""
    try:
        _tag(path)
    except OutputError as error:
        logger.warning("Wan VAE Parallel: Apple's players may refuse this H.265 video: %s", error)


def _tag(path: Any) -> None:
    if isinstance(path, (str, os.PathLike)):
        tag_as_hvc1(Path(path), _check)
        return
    with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
        copy_of_it = Path(folder) / "video"
        copy_of_it.write_bytes(path.getvalue())
        if tag_as_hvc1(copy_of_it, _check):
            path.seek(0)
            path.truncate()
            path.write(copy_of_it.read_bytes())
