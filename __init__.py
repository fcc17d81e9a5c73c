"""Wan VAE Parallel: exact Wan video VAE decoding, as a ComfyUI custom node pack."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
