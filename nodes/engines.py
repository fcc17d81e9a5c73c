"""Engines for ComfyUI: one for each set of weights, devices and dtypes, shared by all nodes that ask for the same.

An engine asks ComfyUI's memory manager for room before it decodes or encodes, and stands in its list of loaded models,
so that other models can take the room back; its worker processes stay then. ``/free`` ends them.
"""

from __future__ import annotations

import collections
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as model_management
import comfy.model_patcher
import torch

from ..wan_vae_parallel import VAE, Architecture
from ..wan_vae_parallel.devices import parse_dtype
from ..wan_vae_parallel.errors import CheckpointError
from ..wan_vae_parallel.files.checkpoint import Checkpoint
from ..wan_vae_parallel.files.latents import largest_value, ordered_latents
from ..wan_vae_parallel.frames import check_frames
from ..wan_vae_parallel.memory import check_host_room, images_that_pay
from .choices import choose_devices, choose_dtype
from .progress import ChunkProgress

logger = logging.getLogger(__name__)

_engines: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
# The engines used last stay though no VAE is there that uses them: ComfyUI may keep no results between prompts.
_KEPT = 2
# How far up ``/free`` is looked for.
_MOST_WRAPPERS = 8
_kept: collections.OrderedDict[Hashable, Engine] = collections.OrderedDict()


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        key: what tells one set of weights from another; it begins with a weak reference if they are a model's.
        name: what to call them in messages.
        make: makes a VAE of them, given devices, the dtypes to decode and to encode in, and one whose worker processes
            it takes over.
        stored: the dtype that they are held in, where a loader may have rounded them to it; else None.
    """

    key: tuple[Hashable, ...]
    name: str
    make: Callable[[list[torch.device], torch.dtype, torch.dtype, VAE | None], VAE]
    stored: torch.dtype | None = None

    def superseded(self, by: Source) -> bool:
        """Whether nobody can want these weights any more: their model is gone, or their file is now ``by``'s."""
        if isinstance(self.key[0], weakref.ref):
            return self.key[0]() is None
        return self.key[0] == by.key[0] and self.key != by.key


def source_of_weights(
    weights: Callable[[], Checkpoint], name: str, key: tuple[Hashable, ...], stored: torch.dtype | None
) -> Source:
    """A source of what another loader holds in memory.

    Args:
        weights: called for them whenever they are wanted.
        name: as `Source`'s.
        key: as `Source`'s.
        stored: as `Source`'s.
    """

    def make(
        places: list[torch.device], decode_dtype: torch.dtype, encode_dtype: torch.dtype, predecessor: VAE | None
    ) -> VAE:
        return VAE(
            weights, devices=places, dtype=decode_dtype, chunk="auto", predecessor=predecessor,
            encode_dtype=encode_dtype,
        )  # fmt: skip

    return Source(key, name, make, stored)


class Engine:
    """A VAE of the engine's and its place in ComfyUI's memory manager."""

    def __init__(self, vae: VAE, source: Source) -> None:
        self._vae = vae
        self.source = source
        self.patcher = _EnginePatcher(self)

    @property
    def architecture(self) -> Architecture:
        """What the weights are."""
        return self._vae.architecture

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where it decodes and encodes."""
        return self._vae.devices

    @property
    def worked_on(self) -> tuple[torch.device, ...]:
        """Where the last decode or encode was done."""
        return self._vae.worked_on

    @property
    def loaded(self) -> bool:
        """Whether it holds memory on its devices."""
        return self._vae.loaded

    @property
    def vae(self) -> VAE:
        """What decodes and encodes; whoever uses it makes room before."""
        return self._vae

    def set_chunk(self, chunk: int) -> None:
        """Has the next call take so many (latent) frames at once; 0 chooses."""
        self._vae.chunk = chunk or "auto"

    def weights_size(self) -> int:
        """Bytes of the weights that are on each device; of the decoder's, while none are."""
        return self._vae.weights_size

    def memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that decoding latents of ``shape`` takes on each device."""
        return self._vae.memory_needed(shape)

    def encode_memory_needed(self, shape: Sequence[int]) -> int:
        """Bytes that encoding frames of ``shape`` ``[B, T, H, W, C]`` takes on each device."""
        return self._vae.encode_memory_needed(shape)

    @property
    def memory_held(self) -> int:
        """Bytes on each device that `park` gives back."""
        return self._vae.memory_held

    def park(self) -> bool:
        """Gives the devices' memory back; workers' processes stay. Whether it is back."""
        return self._vae.park()

    def release(self) -> None:
        """Gives the devices' memory back, and ends workers, until they are needed again."""
        self._vae.release()

    @property
    def dtype(self) -> torch.dtype:
        """What it decodes in."""
        return self._vae.dtype

    @property
    def encode_dtype(self) -> torch.dtype:
        """What it encodes in."""
        return self._vae.encode_dtype

    def take_workers(self, other: Engine) -> None:
        """Goes on with ``other``'s worker processes, if they are there, on the same devices and idle."""
        if other is not self:
            self._vae.take_over(other._vae)

    def decode(self, latents: torch.Tensor, *, normalized: bool, chunk: int) -> torch.Tensor:
        """Decodes to ``[B, T, H, W, C]`` on the host, with progress, previews and cancelling.

        Args:
            latents: ``[B, z, T, h, w]`` or ``[B, z, h, w]``.
            normalized: see `wan_vae_parallel.VAE.decode`.
            chunk: latent frames at once; 0 chooses.
        """
        self.set_chunk(chunk)
        # Checked as a whole, then one after the other: a batch takes no more memory than one, and can be cancelled.
        # Images, which are less work, as many together as pay.
        latents = ordered_latents(latents, self.architecture)
        together = 1 if latents.shape[2] > 1 else images_that_pay(self.architecture, *latents.shape[3:])
        parts = latents.split(together)
        if len(parts) > 1:
            largest_value(latents)
        self.make_room("decoder", self._vae.memory_needed(parts[0].shape))
        if len(parts) > 1:
            # The batch, and what is just being decoded.
            shape, dtype = self._vae.output_shape(parts[0].shape), torch.promote_types(self._vae.dtype, torch.float32)
            check_host_room(shape, dtype, videos=len(parts) + 1)
        progress = ChunkProgress(parts=len(parts))
        decoded = torch.empty(0)
        for i, part in enumerate(parts):
            video = self._vae.decode(
                part,
                normalized=normalized,
                on_chunk=progress.part(i),
                on_wait=model_management.throw_exception_if_processing_interrupted,
            )
            if len(parts) == 1:
                return video
            if i == 0:
                decoded = video.new_empty((len(latents), *video.shape[1:]))
            decoded[i * together : i * together + len(part)] = video
            del video  # while the next one is decoded, only the batch is there
        return decoded

    def encode(self, frames: torch.Tensor, *, chunk: int, normalized: bool = False) -> torch.Tensor:
        """Encodes to ``[B, z, T', h, w]`` on the host, with progress and cancelling.

        Args:
            frames: ``[B, T, H, W, C]``, or ``[T, H, W, C]`` for one video.
            chunk: as `decode`'s: so many latent frames' pictures at once.
            normalized: see `wan_vae_parallel.VAE.encode`.

        Raises:
            CheckpointError: the weights have no encoder.
        """
        if self.architecture.encoder_width is None:
            raise CheckpointError(
                f"{self.source.name} has no encoder, so that this VAE can only decode; encode with the whole Wan VAE"
            )
        frames = check_frames(frames, self.architecture)
        self.set_chunk(chunk * self.architecture.temporal_ratio)
        self.make_room("encoder", self._vae.encode_memory_needed(frames.shape))
        return self._vae.encode(
            frames,
            normalized=normalized,
            on_chunk=ChunkProgress(parts=1, previews=False).part(0),
            on_wait=model_management.throw_exception_if_processing_interrupted,
        )

    def make_room(self, part: str, needed: int) -> None:
        """Has ComfyUI free ``needed`` bytes on each device, less those of ``part``'s weights if they are there."""
        if part in self._vae.loaded_parts:
            needed -= self._vae.part_size(part)
        needed += self._vae.memory_to_start
        # ComfyUI adds what of this model it believes to be missing.
        missing = self.patcher.model_size() - self.patcher.loaded_size()
        model_management.load_models_gpu([self.patcher], memory_required=max(0, needed - missing))
        # Only where ComfyUI has something to free: asking how much is free would make this process a CUDA context
        # there, half a gigabyte that nothing gives back.
        held = {loaded.device for loaded in model_management.current_loaded_models}
        for device in self.devices:
            if device != self.patcher.load_device and device in held:
                model_management.free_memory(needed, device)


class WanVAEParallelEngine(torch.nn.Module):
    """ComfyUI's memory manager wants a module to name; the weights are the engine's."""


class _EnginePatcher(comfy.model_patcher.ModelPatcher):
    """Stands for an engine in ComfyUI's list of loaded models: all loaded, or nothing.

    Its device is always the one whose models ``/free`` unloads, whichever device the engine decodes on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        super().__init__(
            WanVAEParallelEngine(), load_device=model_management.get_torch_device(), offload_device=torch.device("cpu")
        )

    def clone(self, *_: Any, **__: Any) -> _EnginePatcher:
        return self

    def deepclone_multigpu(self, *_: Any, **__: Any) -> _EnginePatcher:
        return self  # a VAE that is put on another device gets another engine when it decodes

    def __deepcopy__(self, _: dict[int, Any]) -> _EnginePatcher:
        return self

    def model_size(self) -> int:
        engine = self._engine()
        return max(engine.weights_size(), engine.memory_held) if engine and self.load_device in engine.devices else 0

    def loaded_size(self) -> int:
        engine = self._engine()
        return engine.memory_held if engine and self.load_device in engine.devices else 0

    def model_dtype(self) -> None:
        return None

    def partially_load(self, *_: Any, **__: Any) -> int:
        return 0  # The engine loads its weights itself when it uses them.

    def partially_unload(self, *_: Any, **__: Any) -> int:
        freed = self.loaded_size()
        return freed if self._park() else 0

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        # Without that, the list only forgets this entry: it puts it to its front when it is loaded again.
        if unpatch_all:
            self._park()
        return self.model

    def _park(self) -> bool:
        engine = self._engine()
        return engine is not None and engine.park()


def _release_all() -> None:
    """Ends all engines' workers, which ComfyUI's list has forgotten when it asked for their memory."""
    _kept.clear()
    for engine in list(_engines.values()):
        engine.release()


def _hear_of_free() -> None:
    """Has ``/free`` end workers too; it reaches ComfyUI's models through the one function that unloads them all.

    Core calls that for other reasons as well, with ``--disable-smart-memory`` after each prompt: memory is enough then.
    """
    unload_all_models = model_management.unload_all_models
    if getattr(unload_all_models, "ends_wan_vae_workers", False):
        return

    @functools.wraps(unload_all_models)
    def unload_all(*args: Any, **kwargs: Any) -> Any:
        result = unload_all_models(*args, **kwargs)
        # The loop in which core looks for ``/free`` between prompts; other packs may have wrapped this function, too.
        frame = sys._getframe(1)
        for _ in range(_MOST_WRAPPERS):
            if frame.f_code.co_name == "prompt_worker":
                _release_all()
            if frame.f_globals.get("__name__") == "execution" or frame.f_back is None:
                break  # a prompt's
            frame = frame.f_back
        return result

    unload_all.ends_wan_vae_workers = True  # type: ignore[attr-defined]
    model_management.unload_all_models = unload_all


_hear_of_free()


def shared_engine(
    source: Source, devices: str, dtype: str, encode_dtype: str = "auto", put_on: torch.device | None = None
) -> Engine:
    """The engine for ``source`` on the devices and in the dtypes asked for, made if there is none.

    Args:
        source: the weights.
        devices: as a user wrote it; those that are not there are left out.
        dtype: ``"auto"`` for ComfyUI's own choice.
        encode_dtype: of encodes; ``"auto"`` for the same.
        put_on: the device that a node has put the VAE on, if one has: ``"auto"`` follows it.

    Raises:
        DeviceError: ``devices`` is no list of devices.
    """
    places = choose_devices(devices, put_on)
    chosen = choose_dtype(dtype, places[0])
    chosen_to_encode = chosen if encode_dtype == "auto" else parse_dtype(encode_dtype, places[0])
    key = (source.key, tuple(places), chosen, chosen_to_encode)
    engine = _engines.get(key)
    if engine is None:
        # Of weights that are no more, as when ComfyUI loads a model anew, the worker processes are as good for these.
        before = next(
            (k for k, one in _kept.items() if one.source.superseded(source) and one.devices == tuple(places)), None
        )
        predecessor = _kept.pop(before) if before is not None else None
        made = source.make(places, chosen, chosen_to_encode, predecessor and predecessor._vae)
        engine = Engine(made, source)
        _engines[key] = engine
    _kept[key] = engine
    _kept.move_to_end(key)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return engine
