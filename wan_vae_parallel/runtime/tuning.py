"""Choice by measurement: the settings of our convolutions' kernels, and the kinds of layers that are cuDNN's.

Each kind of layer is measured once for a GPU model, a dtype and the versions of what runs there, and kept in the user's
cache folder. Settings change no bit. cuDNN gets a kind only where our kernels don't run or lose by over 10%: then for
all its layers, chunks and shards on all ranks, and it is said, since equal bits are given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .._version import __version__
from ..architecture import Architecture
from ..files.user_cache import CachedFacts
from ..memory import decoder_kinds, encoder_kinds, kernels_take_decoder, kernels_take_encoder
from ..ops.dispatch import kernels_expected, kernels_multiply, say_once
from ..ops.layer_kinds import LayerKind, Measured
from ..parallel.coordination import WORK_SECONDS, Coordinator

logger = logging.getLogger(__name__)

# Counts changes to kernels, candidates or the way of measuring that make old figures wrong.
_FORMAT = "4"

_Key = dict[str, str]

# One measures at a time; plans don't wait for it.
_measuring = threading.Lock()
_lock = threading.Lock()
# Of this process, by key.
_known: dict[str, dict[LayerKind, Measured]] = {}


def tune(
    kinds: Iterable[LayerKind], device: torch.device, dtype: torch.dtype, coordinator: Coordinator | None = None
) -> frozenset[LayerKind]:
    """Has our kernels on ``device`` use what is fastest there; measures what was never measured.

    The first rank of each GPU model does it for all of its model. A kind that is cuDNN's on one model is so on all.

    Args:
        kinds: of layers, the same on all ranks.
        device: this rank's.
        dtype: in what they compute.
        coordinator: the ranks', all of whom call; None for a device that decodes alone.

    Returns:
        The kinds that are cuDNN's.
    """
    kinds = list(dict.fromkeys(kinds))
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    key = _key(device, dtype)
    keys = coordinator.exchange(key) if coordinator else [key]
    rank = coordinator.rank if coordinator else 0

    def find() -> dict[str, Any]:
        return _to_plain(_find(kinds, key, device, dtype)) if key and keys.index(key) == rank else {}

    words = coordinator.gather(find, WORK_SECONDS) if coordinator else [find()]
    found = [_from_plain(word, kinds) for word in words]
    if key and (own := found[keys.index(key)]):
        from ..ops.kernels import tiles

        tiles.use(own, device, dtype)
    losses = {kind: (keys[i]["GPU"], one) for i, part in enumerate(found) for kind, one in part.items() if one.lost}
    if rank == 0:
        for kind, (model, one) in losses.items():
            ours = f"our kernel does {one.ours:.0f}" if one.ours else "our kernel does not run"
            say_once(
                f"{kind} runs on cuDNN: {one.cudnn:.0f} TFLOP/s on {model}, where {ours}; the last bits of frames then "
                f"depend on the chunk and on the number of devices"
            )
    return frozenset(losses)


def kernels_planned(kinds: Iterable[LayerKind], devices: Iterable[torch.device], dtype: torch.dtype) -> bool:
    """Whether our kernels will do all of the work on ``devices``, for plans of memory: PyTorch's take more.

    Nothing is tried or measured; what was found out here before counts, such as which kinds of layers are cuDNN's.
    """
    kinds = list(dict.fromkeys(kinds))
    for device in devices:
        if not kernels_expected(device, dtype):
            return False
        if any(one.lost for one in _known_of(kinds, _circumstances(device, dtype), device)[0].values()):
            return False
    return True


def decode_kernels_planned(architecture: Architecture, devices: Iterable[torch.device], dtype: torch.dtype) -> bool:
    """`kernels_planned` of a decode, all of whose widths our kernels take."""
    return kernels_take_decoder(architecture) and kernels_planned(decoder_kinds(architecture), devices, dtype)


def encode_kernels_planned(architecture: Architecture, devices: Iterable[torch.device], dtype: torch.dtype) -> bool:
    """The same of an encode."""
    return kernels_take_encoder(architecture) and kernels_planned(encoder_kinds(architecture), devices, dtype)


def _find(kinds: list[LayerKind], key: _Key, device: torch.device, dtype: torch.dtype) -> dict[LayerKind, Measured]:
    """What is known of ``kinds``; nothing if measuring failed."""
    with _measuring:
        known, settings = _known_of(kinds, key, device)
        missing = [kind for kind in kinds if kind not in known]
        if missing:
            fresh = _measure(missing, key, device, dtype)
            known.update(fresh)
            with _lock:
                _known[repr(key)].update(fresh)
            # Where none of our settings ran, what kept them from it may be gone the next time.
            lasting = {str(kind): _to_fact(one, settings[kind]) for kind, one in fresh.items() if one.ours}
            if lasting:
                _keep(_facts(key), lasting)
        return known


def _known_of(
    kinds: list[LayerKind], key: _Key, device: torch.device
) -> tuple[dict[LayerKind, Measured], dict[LayerKind, list[str]]]:
    """What this process or the user's cache folder knows of ``kinds``; and the settings that each has."""
    from ..ops.kernels.tiles import candidates

    settings = {kind: [str(tile) for tile in candidates(kind, device)] for kind in kinds}
    facts = _facts(key)
    with _lock:
        known = _known.setdefault(repr(key), {})
        for kind in kinds:
            if kind not in known and (one := _of_fact(facts.read(str(kind)), settings[kind])):
                known[kind] = one
        return {kind: known[kind] for kind in kinds if kind in known}, settings


def _facts(key: _Key) -> CachedFacts:
    return CachedFacts(f"{key['GPU']} {key['dtype']}", key)


def _measure(kinds: list[LayerKind], key: _Key, device: torch.device, dtype: torch.dtype) -> dict[LayerKind, Measured]:
    """All of ``kinds``, or none if that fails, which is said."""
    from ..ops.kernels.measure import measure

    logger.info("measuring settings for %d kinds of layers on %s, which is done once", len(kinds), key["GPU"])
    started = time.monotonic()
    try:
        found = measure(kinds, dtype, device)
    except Exception as error:  # noqa: BLE001 (whatever it is: the shipped settings are right, too)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        say_once(f"settings for {key['GPU']} could not be measured, so the usual ones are taken ({reason})")
        return {}
    seconds = time.monotonic() - started
    logger.info("measured settings for %d kinds of layers on %s in %.0f s", len(kinds), key["GPU"], seconds)
    return found


def _keep(facts: CachedFacts, values: Mapping[str, Any]) -> None:
    try:
        facts.write(values)
        logger.info("kept them in %s", facts.folder)
    except (OSError, RuntimeError) as error:
        say_once(f"measured settings can't be kept, so the next process measures again ({error})")


def _key(device: torch.device, dtype: torch.dtype) -> _Key:
    """All that speeds depend on; nothing where no kernels of ours run."""
    return _circumstances(device, dtype) if kernels_multiply(device, dtype) else {}


def _circumstances(device: torch.device, dtype: torch.dtype) -> _Key:
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "capability": f"{properties.major}.{properties.minor}",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "Triton": triton.__version__,
        "cuDNN": str(torch.backends.cudnn.version()),
        "Wan VAE Parallel": __version__,
        "format": _FORMAT,
    }


def _to_plain(found: Mapping[LayerKind, Measured]) -> dict[str, Any]:
    return {str(kind): (one.tiles, one.cudnn) for kind, one in found.items()}


def _from_plain(word: Mapping[str, Any], kinds: list[LayerKind]) -> dict[LayerKind, Measured]:
    named = {str(kind): kind for kind in kinds}
    return {named[name]: Measured(tuple(tiles), cudnn) for name, (tiles, cudnn) in word.items()}


def _to_fact(one: Measured, settings: list[str]) -> dict[str, Any]:
    return {"TFLOP/s": dict(zip(settings, one.tiles, strict=True)), "cuDNN TFLOP/s": one.cudnn}


def _of_fact(fact: Any, settings: list[str]) -> Measured | None:
    """What a file said, if it can be right: a figure for each of ``settings``, of which one ran, and cuDNN's."""
    if not isinstance(fact, dict) or not isinstance(fact.get("TFLOP/s"), dict) or list(fact["TFLOP/s"]) != settings:
        return None
    figures = [*fact["TFLOP/s"].values(), fact.get("cuDNN TFLOP/s")]
    if not all(isinstance(one, (int, float)) and 0 <= one < 1e6 for one in figures) or not any(figures[:-1]):
        return None
    return Measured(tuple(figures[:-1]), figures[-1])
