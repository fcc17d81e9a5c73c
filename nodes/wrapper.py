"""WanVideoWrapper's VAE (WANVAE): a module that holds Wan's, and the latents' mean and deviation beside it."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..wan_vae_parallel.errors import CheckpointError
from ..wan_vae_parallel.files.checkpoint import Checkpoint, checkpoint_from_state_dict, with_statistics
from .engines import Source, source_of_weights

# What messages call it.
_SOURCE = "WanVideoWrapper's VAE"
# The wrapper's small networks for previews, which come through the same socket.
_PREVIEWS = ("TAEHV", "TAEW2_1DiffusersWrapper")


def wrapper_source(vae: Any) -> tuple[Source, torch.nn.Module]:
    """The weights of a WANVAE, and the module that has them.

    Raises:
        CheckpointError: ``vae`` is none, or one of another kind.
    """
    model = getattr(vae, "model", None)
    if isinstance(vae, (list, tuple)) and len(vae) == 1:  # as packs for several GPUs pass it on
        return wrapper_source(vae[0])
    if type(vae).__name__ in _PREVIEWS:
        raise CheckpointError(
            f"the connected VAE is a {type(vae).__name__}, a small network for previews of another architecture; "
            f"decode it with WanVideoWrapper's own node, or connect a Wan VAE"
        )
    if not isinstance(vae, torch.nn.Module) or not isinstance(model, torch.nn.Module):
        raise CheckpointError(
            f"the connected VAE is a {type(vae).__name__}, neither one of ComfyUI's own nor WanVideoWrapper's; take it "
            f"from Load VAE, or from Load Wan VAE (Parallel)"
        )
    weights = _WrapperWeights(vae, model)
    stored = next((parameter.dtype for parameter in model.parameters()), None)
    return source_of_weights(weights, _SOURCE, (weakref.ref(model), "wrapper"), stored), vae


class _WrapperWeights:
    """Reads the weights whenever it is called, without keeping the VAE alive."""

    def __init__(self, vae: torch.nn.Module, model: torch.nn.Module) -> None:
        self._vae, self._model = weakref.ref(vae), weakref.ref(model)

    def __call__(self) -> Checkpoint:
        """The weights, checked.

        Raises:
            CheckpointError: they are no Wan VAE's, or the VAE is gone.
        """
        vae, model = self._vae(), self._model()
        if vae is None or model is None:
            raise CheckpointError("the VAE that was connected is no longer loaded; queue the graph again")
        checkpoint = checkpoint_from_state_dict(dict(model.state_dict()), source=_SOURCE)
        found = {f"latents_{name}": _numbers(getattr(vae, name, None)) for name in ("mean", "std")}
        architecture = with_statistics(checkpoint.architecture, found, _SOURCE)
        return Checkpoint(
            architecture=architecture,
            decoder=checkpoint.decoder,
            encoder=checkpoint.encoder,
            layout=checkpoint.layout,
            source=checkpoint.source,
        )


def _numbers(values: Any) -> list[float] | None:
    """``values`` of a tensor in full; what was rounded is the published ones rounded."""
    if isinstance(values, torch.Tensor) and values.dtype in (torch.float32, torch.float64) and not values.is_meta:
        numbers: list[float] = values.detach().flatten().tolist()
        return numbers
    return None
