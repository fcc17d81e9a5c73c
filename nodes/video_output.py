"""Where a decoded video goes, and what ComfyUI hears of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management as model_management
import folder_paths
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..wan_vae_parallel.errors import ArgumentError, OutputError
from ..wan_vae_parallel.files.formats import FORMATS
from ..wan_vae_parallel.files.settings import OutputSettings
from ..wan_vae_parallel.files.video_out import pictures_as_video
from .saved_video import SavedVideo

logger = logging.getLogger(__name__)

# What the node calls the engine's formats, and the suffix of their files.
VIDEO_FORMATS = {
    "MP4 H.264 8 bit": ("h264", ".mp4"),
    "MP4 H.265 10 bit": ("h265", ".mp4"),
    "WebM VP9 8 bit": ("vp9", ".webm"),
    "MOV ProRes 422 HQ 10 bit": ("prores", ".mov"),
    "MKV FFV1 lossless 16 bit": ("ffv1", ".mkv"),
    "PNG pictures 8 bit": ("png8", ""),
    "PNG pictures 16 bit": ("png16", ""),
}
# The names of pictures, in a folder of their own.
_PICTURE = "%05d.png"


class VideoOutput:
    """Where a video goes, and what ComfyUI hears of it.

    Args:
        title: of the format.
        prefix: of its name, as the user wrote it.
        saved: in the output folder; else in the temporary one.
        size: width and height.
        taken: names that other videos will have, which are not there yet.
    """

    def __init__(self, title: str, prefix: str, *, saved: bool, size: tuple[int, int], taken: Sequence[Path]) -> None:
        if title not in VIDEO_FORMATS:
            raise ArgumentError(f"format is {title!r}; it must be one of {', '.join(VIDEO_FORMATS)}")
        self.format, suffix = VIDEO_FORMATS[title]
        kind = io.FolderType.output if saved else io.FolderType.temp
        root = folder_paths.get_output_directory() if saved else folder_paths.get_temp_directory()
        temporary = folder_paths.get_temp_directory()
        chosen = FORMATS[self.format]
        self.path, subfolder = _place(prefix, root, suffix or f"/{_PICTURE}", taken, size)
        self._saved = saved
        self._shown = ui.SavedResult(self.path.name, subfolder, kind)
        # Pictures that were saved are shown as Save Image does, by themselves.
        self._pictures = os.path.join(subfolder, self.path.parent.name) if chosen.pictures and saved else None
        self.preview: Path | None = None
        if not chosen.browsers and self._pictures is None:
            self.preview, subfolder = _place("wan_vae_preview", temporary, ".mp4", taken)
            self._previewed = ui.SavedResult(self.preview.name, subfolder, io.FolderType.temp)
        self._together: Path | None = None
        if chosen.pictures:
            self._together, _ = _place("wan_vae_pictures", temporary, ".mkv", taken)

    @property
    def plays(self) -> bool:
        """Whether the node shows a video, and not pictures."""
        return self._pictures is None

    @property
    def paths(self) -> list[Path]:
        """All names that it will have."""
        return [path for path in (self.path, self.preview, self._together) if path is not None]

    def shown(self, files: Sequence[Path]) -> list[ui.SavedResult]:
        """What the node shows: first what browsers play, and of what was saved all ``files``."""
        if self._pictures is not None:
            return [ui.SavedResult(file.name, self._pictures, io.FolderType.output) for file in files]
        if self.preview is None:
            return [self._shown]
        # A preview that failed is not there, and the log has said why.
        previews = [self._previewed] if self.preview.is_file() else []
        return [*previews, self._shown] if self._saved else previews

    def video(self, settings: OutputSettings, *, alpha: bool) -> SavedVideo | ExecutionBlocker:
        """The VIDEO; of pictures a temporary one that holds them as they are, without which they stay what they are.

        Args:
            settings: what it was written with.
            alpha: whether there is alpha in it.
        """
        if self._together is None:
            return SavedVideo(str(self.path), format=self.format, alpha=alpha)
        try:
            pictures_as_video(
                self.path, self._together, settings, model_management.throw_exception_if_processing_interrupted
            )
        except OutputError as error:
            logger.warning("Wan VAE Parallel: the pictures in %s make no VIDEO: %s", self.path.parent, error)
            return ExecutionBlocker(f"the pictures in {self.path.parent} are whole, but make no VIDEO: {error}")
        return SavedVideo(str(self._together), format=self.format, alpha=alpha)


def _place(
    prefix: str, root: str, suffix: str, taken: Sequence[Path], size: tuple[int, int] = (0, 0)
) -> tuple[Path, str]:
    """A new file below ``root``, numbered as ComfyUI does, and the subfolder that it is in."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, *size)
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}") in taken:
        counter += 1
    return path, subfolder
