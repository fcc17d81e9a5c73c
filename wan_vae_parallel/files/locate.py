"""Which files a VAE's weights lie in: one, or the shards of one, by the path that a user names.

Folders in diffusers' format have ``diffusion_pytorch_model.safetensors``, or a variant of it such as
``diffusion_pytorch_model.fp16.safetensors``, or shards ``diffusion_pytorch_model-00001-of-00002.safetensors`` with an
index; a pipeline's have the VAE's in ``vae/``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, about_file

logger = logging.getLogger(__name__)

_STEM = "diffusion_pytorch_model"
_WHOLE, _CONFIG = f"{_STEM}.safetensors", "config.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})((?:\.[^.]+)?\.safetensors)", re.IGNORECASE)
_INDEX = re.compile(r".*\.index(?:\.[^.]+)?\.json", re.IGNORECASE)
# What diffusers calls its VAEs.
_CLASSES = "AutoencoderKL"
_MOST_NAMED = 5
ANOTHER = "name a Wan VAE's safetensors file"


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where weights are.

    Attributes:
        name: what messages call them.
        files: one, or all shards.
        config: diffusers' configuration of them, if there is one.
    """

    name: str
    files: tuple[Path, ...]
    config: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What the configuration says; nothing without one.

        Raises:
            CheckpointError: it is there and can't be read.
        """
        return {} if self.config is None else _json(self.config)


def locate_weights(path: Path) -> Located:
    """The files that ``path`` means: a file, a shard of one, an index of shards, or a folder.

    Raises:
        CheckpointError: it is a folder without such files or with several that may be meant, an index that can't be
            read, or shards are missing.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if _INDEX.fullmatch(path.name) and path.is_file():
            return _of_index(path)
        if (match := _SHARD.fullmatch(path.name)) and path.is_file():
            return _of_shard(path, match)
        return Located(name=path.name, files=(path,), config=_config_beside(path))
    except OSError as error:
        raise CheckpointError(about_file(path, f"can't be opened; {ANOTHER}", error)) from error


def _in_folder(folder: Path) -> Located:
    if (folder / "vae").is_dir():  # a whole pipeline's
        return _in_folder(folder / "vae")
    if (folder / _WHOLE).exists():
        return Located(name=_WHOLE, files=(folder / _WHOLE,), config=_config_beside(folder / _WHOLE))
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    indices = [name for name in names if _INDEX.fullmatch(name)]
    files = [name for name in names if name.lower().endswith((".safetensors", ".sft"))]
    single = [name for name in files if not _SHARD.fullmatch(name)]
    named = [name for name in single if "vae" in name.lower()]
    for found in (named, [*single, *indices]):
        if len(found) == 1:
            return locate_weights(folder / found[0])
        if found:
            raise CheckpointError(
                about_file(folder, f"is a folder with several files of weights: {_listed(found)}; name one")
            )
    if files:
        return locate_weights(folder / files[0])
    pickles = [name for name in names if name.lower().endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if pickles:
        raise CheckpointError(
            about_file(
                folder,
                f"is a folder without safetensors, and {_listed(pickles)} can run any code when opened; take the "
                f"same VAE as .safetensors",
            )
        )
    raise CheckpointError(about_file(folder, f"is a folder without {_WHOLE}; name the safetensors file itself"))


def _of_index(index: Path) -> Located:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(about_file(index, f"has no weight_map that names files with tensors; {ANOTHER}"))
    names = sorted(set(places.values()))
    if strange := [name for name in names if Path(name).name != name]:
        raise CheckpointError(
            about_file(index, f"names files outside its folder: {_listed(strange)}; name a folder of shards")
        )
    return _whole(index.name, index, names, what=f"names {len(names)} files")


def _of_shard(path: Path, match: re.Match[str]) -> Located:
    stem, number, count, ending = match.groups()
    names = [f"{stem}-{i:05d}-of-{count}{ending}" for i in range(1, int(count) + 1)]
    located = _whole(f"{stem}{ending}", path, names, what=f"is shard {int(number)} of {int(count)}")
    if len(names) > 1:
        logger.info("%s is shard %d of %d; taking all of them", path.name, int(number), int(count))
    return located


def _whole(name: str, asked: Path, names: Sequence[str], *, what: str) -> Located:
    """All of ``names`` beside ``asked``, which is one of them or their index: ``what`` it is."""
    folder = asked.parent
    if missing := [one for one in names if not (folder / one).is_file()]:
        advice = "fetch all of them, or take the VAE as one file"
        raise CheckpointError(about_file(asked, f"{what}, and {_listed(missing)} is not beside it; {advice}"))
    files = tuple(folder / one for one in names)
    return Located(name=name, files=files, config=_config_beside(files[0]))


def _config_beside(file: Path) -> Path | None:
    """The configuration of diffusers for the weights in ``file``, if it can be told that it is theirs."""
    config = file.parent / _CONFIG
    if not config.is_file():
        return None
    if file.name.startswith(_STEM):
        return config
    # Of another name: a VAE's, and there are no other weights whose it may be.
    names = [name for entry in file.parent.iterdir() if (name := entry.name).lower().endswith((".safetensors", ".sft"))]
    with contextlib.suppress(CheckpointError):
        if (
            str(_json(config).get("_class_name")).startswith(_CLASSES)
            and len({_whole_name(name) for name in names}) == 1
        ):
            return config
    return None


def _whole_name(name: str) -> str:
    """The name of the file that a shard is one of, or of a file that is none."""
    match = _SHARD.fullmatch(name)
    return match[1] + match[4] if match else name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(about_file(path, f"is no JSON ({error}); fetch it again")) from error
    if not isinstance(content, dict):
        raise CheckpointError(about_file(path, f"is no table but a {type(content).__name__}; fetch it again"))
    return content


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
