"""ComfyUI's progress bar, previews and cancelling, fed by the engine's chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.model_management as model_management
import comfy.utils
import torch
from comfy.cli_args import args
from PIL import Image

from ..wan_vae_parallel.files.pictures import to_picture

# Between two previews: nobody sees more, and several devices have a chunk ready every few hundredths of a second.
_PREVIEW_SECONDS = 0.25


class ChunkProgress:
    """One bar for the ``parts`` that a decode or an encode is done in; ``previews`` for what shows frames."""

    def __init__(self, *, parts: int, previews: bool = True) -> None:
        self._parts = parts
        self._previews = previews
        self._bar: comfy.utils.ProgressBar | None = None
        self._next_preview = 0.0
        model_management.throw_exception_if_processing_interrupted()

    def part(self, index: int) -> Callable[[int, int, torch.Tensor], None]:
        """What the engine is to call with each chunk of part ``index``."""

        def on_chunk(done: int, total: int, newest: torch.Tensor) -> None:
            self._show(index, done, total, lambda: newest[0, -1])

        return on_chunk

    def pictures_of(self, index: int) -> Callable[[int, int, Callable[[], torch.Tensor]], None]:
        """The same for a decode that goes to a file, and makes a picture if it is asked."""

        def on_chunk(done: int, total: int, picture: Callable[[], torch.Tensor]) -> None:
            self._show(index, done, total, picture)

        return on_chunk

    def _show(self, index: int, done: int, total: int, picture: Callable[[], torch.Tensor]) -> None:
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(self._parts * total)
        preview = None
        if self._previews and done < total and time.monotonic() >= self._next_preview:
            preview = ("JPEG", _preview(picture()), args.preview_size)
            self._next_preview = time.monotonic() + _PREVIEW_SECONDS
        self._bar.update_absolute(index * total + done, preview=preview)
        # Without a server there is no hook in the bar that looks.
        model_management.throw_exception_if_processing_interrupted()


def _preview(frame: torch.Tensor) -> Image.Image:
    """A frame, thinned out to about the size that ComfyUI shows."""
    newest = frame[..., :3]
    step = -(-max(newest.shape[:2]) // args.preview_size)
    return to_picture(newest[::step, ::step])
