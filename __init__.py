"""Wan VAE Parallel: exact Wan video VAE decoding and encoding, as a ComfyUI custom node pack."""

from .nodes import comfy_entrypoint

# ComfyUI serves what is in it; the nodes' help pages are.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
