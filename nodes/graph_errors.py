"""Errors in the words of graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..wan_vae_parallel.errors import WanVAEError


@contextlib.contextmanager
def in_graph_words() -> Iterator[None]:
    """Within it, or in a function that it decorates, the package's errors lose what only helps in Python."""
    try:
        yield
    except WanVAEError as error:
        error.args = (error.text,)
        raise
