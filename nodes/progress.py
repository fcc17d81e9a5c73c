"""ComfyUI's progress bar, previews and cancelling, fed by the engine's chunks; errors in words for a graph."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import comfy.model_management as model_management
import comfy.utils
import torch
from comfy.cli_args import args
from PIL import Image

from ..wan_vae_parallel.errors import WanVAEError
from ..wan_vae_parallel.files.pictures import to_picture

# Between two previews: nobody sees more, and several devices have a chunk ready every few hundredths of a second.
_PREVIEW_SECONDS = 0.25
# Every so many rows and columns of a frame, [H, W, C].
_Picture = Callable[[int], torch.Tensor]


@contextlib.contextmanager
def without_python() -> Iterator[None]:
    """Within it errors lose advice that only helps who calls from Python: a graph is none."""
    try:
        yield
    except WanVAEError as error:
        error.args = (error.text,)
        raise


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
            frame = newest[0, -1]
            self._show(index, done, total, frame.shape[:2], lambda step: frame[::step, ::step])

        return on_chunk

    def pictures_of(self, index: int, size: Sequence[int]) -> Callable[[int, int, _Picture], None]:
        """The same for a decode of ``size`` (rows, columns) that goes to a file, and makes a picture if it is asked."""

        def on_chunk(done: int, total: int, picture: _Picture) -> None:
            self._show(index, done, total, size, picture)

        return on_chunk

    def _show(self, index: int, done: int, total: int, size: Sequence[int], picture: _Picture) -> None:
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(self._parts * total)
        preview = None
        if self._previews and done < total and time.monotonic() >= self._next_preview:
            preview = ("JPEG", _preview(size, picture), args.preview_size)
            self._next_preview = time.monotonic() + _PREVIEW_SECONDS
        self._bar.update_absolute(index * total + done, preview=preview)
        # Without a server there is no hook in the bar that looks.
        model_management.throw_exception_if_processing_interrupted()


def _preview(size: Sequence[int], picture: _Picture) -> Image.Image:
    """A frame, thinned out to about the size that ComfyUI shows."""
    return to_picture(picture(-(-max(size) // args.preview_size))[..., :3])
