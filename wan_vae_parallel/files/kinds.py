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
# GGUF and what was before it: ggml, ggmf, ggjt and ggla, whose letters are a number's bytes.
_GGML = re.compile(rb"GGUF|lmgg|fmgg|tjgg|algg")
# Of aria2's control file (its manual, "Control file format"): version 1, no extension or that of torrents, a hash of 20
# bytes or none, and a length of pieces.
_ARIA2 = re.compile(rb"\x00\x01\x00\x00\x00[\x00\x01]\x00\x00\x00(\x14.{20}|\x00)(?!\x00{4})", re.DOTALL)
_ARIA2_SUFFIX = ".aria2"
# Names that browsers and others give a file until all of it is there.
_UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".opdownload", ".tmp")
# By their first bytes, or those behind a length.
_OTHERS = (
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"%PDF", "a PDF"),
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
    if "\0" in os.fspath(path):
        raise error_class(f"the path is {path!r}, and no name has a NUL; {another}")
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
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        # Of an older system's encoding, whose letters beyond ASCII are few.
        text = head.decode("latin-1") if sum(byte < 128 for byte in head) > 0.8 * len(head) else "\0"
    words = " ".join(text.split())
    return words if len(head) >= _SHORTEST_TEXT and words.isprintable() else ""


def _in_utf8(head: bytes) -> bytes:
    """``head`` as UTF-8, if it is text in UTF-16 or UTF-32, as PowerShell and Notepad write it; else as it is."""
    marks = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    encoding = next((name for mark, name in marks if head.startswith(mark)), None)
    if encoding is None and len(head) >= _SHORTEST_TEXT:  # without a mark: every other byte of ASCII's letters is 0
        first, second = head[::2], head[1::2]
        encoding = (
            "utf-16-le" if not any(second) and all(first) else "utf-16-be" if not any(first) and all(second) else None
        )
    if encoding is None:
        return head
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head).encode()
    except UnicodeError:
        return head


def unfinished_download(path: Path) -> str:
    """What tells that ``path`` has not been downloaded in full, and the way out; empty if nothing does."""
    control = path.with_name(path.name + _ARIA2_SUFFIX)
    if control.is_file():
        return (
            f"is not downloaded in full, as {control.name} is beside it, which aria2 removes at the end; run the same "
            f"download again, which goes on, or remove {control.name} if you know that the file is whole"
        )
    return ""


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
    if _GGML.match(head):
        kind = "GGUF" if head.startswith(b"GGUF") else "GGML"
        return f"is a {kind} file, in which weights are quantised in blocks for programs of their own; {same}"
    if path.suffix.lower() == _ARIA2_SUFFIX or _ARIA2.match(head):
        return (
            "is aria2's control file, which it keeps of a download until that is done; let aria2 finish it (run the "
            "same download again), and name the file itself"
        )
    if path.suffix.lower() in _UNFINISHED_SUFFIXES:
        return f"is not downloaded in full, as its name ends in {path.suffix}; download it again"
    if re.match(rb"d\d+:(announce|comment|created by|creation date|info)", head):
        return "is a torrent, and not the file that it leads to; download that"
    head = _in_utf8(head)
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
