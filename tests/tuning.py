"""What tests of measured settings share."""

from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.ops.kernels import tiles
from wan_vae_parallel.runtime import tuning


def start_anew(patch):
    """As a new process does, which knows no settings and has said nothing."""
    patch.setattr(tuning, "_known", {})
    patch.setattr(tiles, "_measured", {})
    dispatch.say_once.cache_clear()
