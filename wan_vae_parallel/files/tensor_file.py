"""Safetensors files of users, read so that no change of the file can hurt: it is never mapped.

A mapped file that gets shorter, as one that is downloaded anew over the same name, kills the process with SIGBUS where
a page is missing; one that is written to in place changes the tensors. So the bytes are copied to memory of this
process's own, and the safetensors library maps and checks the copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..anonymous import anonymous_file
from ..cancel import LOOK_SECONDS, check_cancelled
from ..errors import OutOfMemoryError, WanVAEError, about_file, is_out_of_memory
from .kinds import HEAD_BYTES, other_kind, unfinished_download

# The library refuses longer headers.
_LONGEST_HEADER = 100_000_000
# A block that stays in a core's cache between reading and writing; threads beyond which memory is the limit.
_BLOCK = 256 * 2**10
_THREADS = 4
# What tells two files of one size and time apart: as many pieces, so large, evenly spread.
_SAMPLES, _SAMPLE_BYTES = 16, 4096
# Less is copied by one thread.
_SMALL = 32 * 2**20


class FileVersion(NamedTuple):
    """What tells that a file is still the same one, also where it was written over and its times were set back."""

    modified: int
    size: int
    inode: int
    device: int
    # A checksum of some of its bytes.
    sample: int

    @classmethod
    def of(cls, file: io.FileIO) -> FileVersion:
        """The version of an open file, which is at its beginning then."""
        stat, sample = os.fstat(file.fileno()), 0
        for i in range(_SAMPLES):
            file.seek(stat.st_size * i // _SAMPLES)
            sample = zlib.crc32(file.read(_SAMPLE_BYTES) or b"", sample)
        file.seek(0)
        return cls(stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev, sample)


class TensorFile:
    """A safetensors file that is open: what is in it at once, its values when they are asked for.

    A context manager; tensors that were read outlive it.

    Attributes:
        path: where it is.
        version: of the file that was opened.

    Args:
        path: of a file.
        error_class: what is raised about the file.
        holds: what is wanted of it, such as ``"VAE"``.
        another: how to name another file, for one that is not there.
        again: what to do about a damaged one.

    Raises:
        error_class: there is no such file, it can't be opened, or it is a file of another kind.
    """

    def __init__(self, path: Path, error_class: type[WanVAEError], *, holds: str, another: str, again: str) -> None:
        self.path = path
        self._error_class = error_class
        self._again = again
        # Of the copy in memory, with the header alone until `read`.
        self._copy = -1
        try:
            if not path.is_file():  # a pipe would have opening it wait
                what = "is no file" if path.exists() else "does not exist"
                raise error_class(about_file(path, f"{what}; {another}"))
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            if isinstance(error, WanVAEError):
                raise
            raise error_class(about_file(path, f"can't be opened; {another}", error)) from error
        with self._closing_after_errors(), self._told():
            self.version = FileVersion.of(self._file)
            self._head = self._file.read(HEAD_BYTES) or b""
            if kind := unfinished_download(path) or other_kind(self._head, path, holds=holds):
                raise error_class(about_file(path, kind))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was read stays."""
        self._file.close()
        if self._copy >= 0:
            os.close(self._copy)
            self._copy = -1

    def described(self) -> dict[str, torch.Tensor]:
        """All tensors without their values, on the meta device. Only the header is read, where the system allows it.

        Raises:
            error_class: the file is damaged.
        """
        with self._told():
            copy = self._with_header()
            tensors = self._loaded() if copy is None else self._mapped(copy, None)
            return {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}

    def read(self, keys: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of these ``keys``, by default all, in memory that is not the file's.

        Raises:
            error_class: the file is damaged, or changed since it was opened.
            OutOfMemoryError: the host has no room for them.
        """
        with self._told():
            copy = self._with_header()
            if copy is None:
                tensors = self._loaded()
                return tensors if keys is None else {key: tensors[key] for key in keys}
            self._fill(copy, [(0, self.version.size)] if keys is None else self._spans(copy, keys))
            self._check_same()
            return self._mapped(copy, keys)

    def _loaded(self) -> dict[str, torch.Tensor]:
        """By way of bytes: where there are no files in memory."""
        self._file.seek(0)
        content = self._file.readall()
        self._check_same()
        if len(content) != self.version.size:
            raise self._changed()
        return _apart(lambda: safetensors.torch.load(content))

    def _mapped(self, descriptor: int, keys: Collection[str] | None) -> dict[str, torch.Tensor]:
        """The tensors of an open file that nobody can make shorter; all of them without ``keys``."""

        def get() -> dict[str, torch.Tensor]:
            with safe_open(f"/proc/self/fd/{descriptor}", framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}

        return _apart(get)

    def _spans(self, copy: int, keys: Collection[str]) -> list[tuple[int, int]]:
        """Where the values of ``keys`` lie, first and last byte (exclusive); neighbours are one span."""
        begin = 8 + int.from_bytes(self._head[:8], "little")
        header = json.loads(os.pread(copy, begin - 8, 8))  # which the library has checked
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(header[key]["data_offsets"] for key in keys):
            if spans and spans[-1][1] == begin + start:
                spans[-1] = (spans[-1][0], begin + stop)
            else:
                spans.append((begin + start, begin + stop))
        return spans

    def _with_header(self) -> int | None:
        """A file in memory of the same size, with the header alone: the library looks at no more to check it.

        None where there are no such files, or the process may have none of that size (ulimit -f).
        """
        if self._copy >= 0:
            return self._copy
        if sys.platform != "linux":
            return None
        size = self.version.size
        try:
            self._copy = anonymous_file("wan-vae-parallel-tensors", size)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            return None
        (length,) = struct.unpack("<Q", self._head[:8]) if len(self._head) >= 8 else (0,)
        # Of a length that can't be, the library tells from its first bytes.
        self._copy_span(self._copy, 0, 8 + length if length <= min(_LONGEST_HEADER, size - 8) else min(8, size))
        return self._copy

    def _fill(self, copy: int, spans: Sequence[tuple[int, int]]) -> None:
        """Copies the bytes of ``spans``."""
        size = sum(stop - start for start, stop in spans)
        threads = min(_THREADS, len(os.sched_getaffinity(0))) if size >= _SMALL else 1
        stop = threading.Event()
        if threads == 1:
            for start, end in spans:
                self._copy_span(copy, start, end)
            return
        length = max(_BLOCK, size // threads // _BLOCK * _BLOCK)
        pieces = [(at, min(at + length, end)) for start, end in spans for at in range(start, end, length)]
        with ThreadPoolExecutor(threads) as pool:
            copied = [pool.submit(self._copy_span, copy, start, end, stop) for start, end in pieces]
            try:
                while wait(copied, LOOK_SECONDS, return_when=FIRST_EXCEPTION).not_done:
                    check_cancelled()
                    if any(piece.done() and piece.exception() for piece in copied):
                        break
                for piece in copied:
                    if piece.done():
                        piece.result()
            finally:
                stop.set()

    def _copy_span(self, copy: int, start: int, stop: int, ended: threading.Event | None = None) -> None:
        """Copies the bytes from ``start`` to ``stop``, which all must be there."""
        block = memoryview(bytearray(min(_BLOCK, stop - start)))
        while start < stop and not (ended and ended.is_set()):
            check_cancelled()
            count = os.preadv(self._file.fileno(), [block[: stop - start]], start)
            if not count:
                raise self._changed()
            done = 0
            while done < count:
                done += os.pwrite(copy, block[done:count], start + done)
            start += count

    def _check_same(self) -> None:
        if FileVersion.of(self._file) != self.version:
            raise self._changed()

    def _changed(self) -> WanVAEError:
        return self._error_class(
            about_file(self.path, "changed while it was read; wait until it is written in full, then load it again")
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within it, what goes wrong is told as the file's damage, or as want of memory."""
        try:
            yield
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError) as error:
            if isinstance(error, WanVAEError):
                raise
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    about_file(
                        self.path,
                        f"takes {self.version.size / 2**20:.1f} MiB, and the host has no memory for it; free some",
                        error,
                    )
                ) from error
            raise self._error_class(
                about_file(
                    self.path, f"can't be read, as it is damaged or not downloaded in full: {self._again}", error
                )
            ) from error

    @contextlib.contextmanager
    def _closing_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def _apart(load: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What ``load`` returns, of a thread that signals do not reach.

    The main thread's handlers run in the middle of the library, and what they raise there, such as `KeyboardInterrupt`,
    it takes for a tensor that can't be read.
    """
    if threading.current_thread() is not threading.main_thread():
        return load()
    with ThreadPoolExecutor(1) as pool:
        try:
            loading = pool.submit(load)
        except RuntimeError:  # the system has no more threads
            return load()
        return loading.result()
