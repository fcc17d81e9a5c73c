"""What a file is that is no safetensors file, by its first bytes and its name."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Any

from ..errors import WanVAEError

# Bytes of a file that are looked at.
HEAD_BYTES = 4096
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_BUILT_SUFFIXES = {".onnx": "an ONNX model", ".engine": "a TensorRT engine", ".plan": "a TensorRT engine"}
_ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
# By their first bytes, or those behind a length.
_OTHERS = (
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"\x89HDF", "an HDF5 file"),
)
# PyTorch's archives, protocols from 2 on, and those before of a dictionary, a list or a class.
_PICKLED = re.compile(rb"PK\x03\x04|\x80[\x00-\x05]|\([dl](p\d+)?\n|[}\]]q\x00|c[\w.]+\n\w+\n")
# Addresses on the web; of a drive of Windows there is one letter.
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+:/+[^/]", re.IGNORECASE)
_TAR_AT = 257
# Of a text; what is shorter may be what was fetched of a safetensors file.
_SHORTEST_TEXT, _MOST_SHOWN = 9, 40


def user_path(path: Any, error_class: type[WanVAEError], *, another: str) -> Path:
    """``path`` as a `Path`, with a ``~`` for the home folder written out.

    Raises:
        error_class: it is no path at all; ``another`` says what to name.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        advice = "os.fsdecode makes a str of it" if isinstance(path, bytes) else another
        raise error_class(
            f"the path is {path!r}, a {type(path).__name__}; it must be a str or a pathlib.Path: {advice}"
        )
    if not os.fspath(path):
        raise error_class(f"the path is empty; {another}")
    if _ADDRESS.match(os.fspath(path)) and not Path(path).exists():
        raise error_class(f"an address is no file on this machine: {path}; download the file and name that")
    found = Path(path)
    try:
        if found.parts[:1] and found.parts[0].startswith("~") and not found.exists():
            return found.expanduser()
    except (OSError, RuntimeError):  # too long a name, or nobody's home: opening it says so
        pass
    return found


def begins_as_safetensors(head: bytes) -> bool:
    """Whether ``head`` are the first bytes of a safetensors file: its header's length, and the header's brace."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def _text(head: bytes) -> str:
    """``head`` as one line, if it is text; empty if not."""
    try:
        # The last character may not be whole.
        words = " ".join(codecs.getincrementaldecoder("utf-8")().decode(head).split())
    except UnicodeDecodeError:
        return ""
    return words if len(head) >= _SHORTEST_TEXT and words.isprintable() else ""


def other_kind(head: bytes, path: Path, *, holds: str) -> str:
    """What ``path`` is instead of a safetensors file, and the way out; empty if that can't be told.

    Args:
        head: its first `HEAD_BYTES` bytes, or all.
        path: its name.
        holds: what is wanted of it, such as ``"VAE"``.
    """
    if begins_as_safetensors(head):
        return ""
    same = f"take the same {holds} as .safetensors"
    if head.startswith(b"GGUF"):
        return f"is a GGUF file, in which weights are quantised in blocks for programs of their own; {same}"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, a few lines of text in the place of the file; run `git lfs pull` in its repository, "
            "or download the file by the link that its page has for that"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:256].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return (
            "is a web page that was saved under the file's name, as where a link leads to a file's page or wants a "
            "login; download the file itself"
        )
    if text.startswith((b"{", b"[")) and head[:1].isascii():
        if b'"weight_map"' in head:
            return "is the index of files with tensors, and not named *.index.json; name their folder"
        if path.name in ("config.json", "model_index.json"):
            return f"is a configuration, and holds no tensors; name its folder, or {same}"
        return f"is JSON, and holds no tensors; {same}"
    if head.startswith(b"\x93NUMPY"):
        return f"is a NumPy array; {same}, as by safetensors.torch.save_file of torch.from_numpy(numpy.load(...))"
    for begin, what in _ARCHIVES.items():
        if head.startswith(begin):
            return f"is {what}; unpack it and name the file in it"
    if head[_TAR_AT:].startswith(b"ustar"):
        return "is a tar archive; unpack it and name the file in it"
    if head.startswith(b"PK\x03\x04") and b".npy" in head[: HEAD_BYTES // 4]:
        return f"is a NumPy archive; {same}, as by safetensors.torch.save_file of torch.from_numpy of its arrays"
    for pattern, what in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return f"is {what}; {same}"
    if head.startswith(b"PK\x03\x04") and b".pkl" not in head and path.suffix.lower() not in _PICKLE_SUFFIXES:
        return "is a zip archive; unpack it and name the file in it"
    pickled = _PICKLED.match(head)
    if pickled or path.suffix.lower() in _PICKLE_SUFFIXES:
        return (
            f"is a pickle, which can run any code when it is opened, so it is not opened; {same}, or convert it on a "
            f"machine where you trust the file"
        )
    if path.suffix.lower() in _BUILT_SUFFIXES:
        return f"is {_BUILT_SUFFIXES[path.suffix.lower()]}, built for a runtime of its own; {same}"
    if head and not head.strip(b"\0"):
        return "begins with zeros alone, as a file whose download was not finished; download it again"
    if words := _text(head):
        shown = words if len(words) <= _MOST_SHOWN else words[:_MOST_SHOWN] + "..."
        return (
            f'is a text, "{shown}", as sites answer with in place of a file that is not there or wants a login; '
            f"download the file itself"
        )
    return ""
