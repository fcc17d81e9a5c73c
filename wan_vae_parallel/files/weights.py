"""Weights that are read when they are wanted, and must be the same each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Version, describe_checkpoint, read_checkpoint


class FileWeights:
    """Reads a checkpoint's file whenever it is called, and sees to it that it is the same file each time.

    Args:
        path: as `read_checkpoint` takes it.
        version: of the files, where they were read before.
    """

    def __init__(self, path: Path, version: Version | None = None) -> None:
        self.path = path
        self._version = version

    def __call__(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            CheckpointError: it can't be read, or it is another file than the first time.
        """
        return self._remembered(read_checkpoint(self.path, self._version))

    def describe(self) -> Checkpoint:
        """The checkpoint without values, at the cost of reading the file's header; raises as a call does."""
        return self._remembered(describe_checkpoint(self.path, self._version))

    def _remembered(self, checkpoint: Checkpoint) -> Checkpoint:
        self._version = checkpoint.version
        return checkpoint


class SameWeights:
    """Gives the weights that were there first, again and again; other ones are an error."""

    def __init__(self, weights: Callable[[], Checkpoint]) -> None:
        self._weights = weights
        # Of a file, its values are read when they are wanted.
        first = weights.describe() if isinstance(weights, FileWeights) else weights()
        self.architecture = first.architecture
        # What messages call them.
        self.source = first.source

    def __call__(self) -> Checkpoint:
        checkpoint = self._weights()
        if checkpoint.architecture != self.architecture:
            raise CheckpointError(
                f"{checkpoint.source} was {self.architecture} when it was loaded and is {checkpoint.architecture} now; "
                f"load it again"
            )
        return checkpoint
