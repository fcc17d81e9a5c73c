"""Every error that a user can cause; each message names the value, the limit and the way out."""


class WanVAEError(Exception):
    """Base of all errors that this package raises on purpose."""


class ArgumentError(WanVAEError, ValueError):
    """An argument that is out of its range."""


class CheckpointError(WanVAEError, ValueError):
    """The file or state dict is not a Wan VAE that can be decoded with."""


class LatentError(WanVAEError, ValueError):
    """The latents can't be decoded with this VAE."""


class DeviceError(WanVAEError, ValueError):
    """A device or dtype that is not there, or can't be used."""


class OutOfMemoryError(WanVAEError, MemoryError):
    """The decode does not fit, not even one latent frame at a time."""


class WorkerError(WanVAEError, RuntimeError):
    """A worker process died, failed or does not answer; the next decode starts new ones."""


class OutputError(WanVAEError, OSError):
    """The frames can't be written where they were asked to go."""
