"""The nodes: what they are called, what they take, and a few lines of what they do."""

from __future__ import annotations

import inspect
import os
from typing import Any

import folder_paths
from comfy_api.latest import io

from .vaes import ParallelVAE, apply_parallel, load_parallel

_CATEGORY = "Wan VAE Parallel"
_DEVICES = (
    "Where to decode and encode: auto takes all GPUs, or the CPU where ComfyUI's own VAE runs on it, or the device "
    "that another node has put the VAE on; or cpu, cuda:0, or several with commas between them, which then work on one "
    "video together. Devices that this machine does not have are left out, and the log says which were taken."
)
_DTYPE = (
    "What to decode and encode in. auto does as ComfyUI's own VAE (bfloat16 where the GPU has it, float32 on the CPU). "
    "float32 is slower and takes twice the memory."
)
_ENCODE_DTYPE = (
    "What to encode in, if not in what dtype says. float32 is for those who find that bfloat16 latents change what "
    "their model makes of them."
)
_CHUNK = (
    "Latent frames decoded at once, or encoded, of four pictures each: larger is faster, smaller takes less memory, "
    "the result is the same. 0 chooses from the memory that is free."
)
_DTYPES = ["auto", "bfloat16", "float16", "float32"]


def _given(target: Any, **wanted: Any) -> dict[str, Any]:
    """Those of the arguments that ``target`` takes in the ComfyUI that runs: older schemas know fewer."""
    known = inspect.signature(target).parameters
    return {name: value for name, value in wanted.items() if name in known}


def _advanced(input_class: Any) -> dict[str, Any]:
    """Marks an input as advanced; schemas that don't know the word pass it on to the frontend, which does."""
    return _given(input_class.__init__, advanced=True) or {"extra_dict": {"advanced": True}}


# Optional, as all that has a default: headless prompts leave out what they don't set.
def _engine_inputs() -> list[io.Input]:
    return [
        io.String.Input("devices", optional=True, default="auto", tooltip=_DEVICES),
        _dtype_input("dtype", _DTYPE),
        _chunk_input(_CHUNK),
        # The last: the editor keeps values by their order.
        _dtype_input("encode_dtype", _ENCODE_DTYPE),
    ]


def _dtype_input(name: str, tooltip: str) -> io.Input:
    return io.Combo.Input(
        name, optional=True, options=_DTYPES, default="auto", tooltip=tooltip, **_advanced(io.Combo.Input)
    )


def _chunk_input(tooltip: str) -> io.Input:
    return io.Int.Input("chunk", optional=True, default=0, min=0, max=4096, tooltip=tooltip, **_advanced(io.Int.Input))


class WanVAEParallelLoader(io.ComfyNode):
    """Loads a Wan VAE that decodes and encodes with this pack's engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelLoader",
            display_name="Load Wan VAE (Parallel)",
            category=_CATEGORY,
            description=(
                "Loads a Wan 2.1 or 2.2 VAE (ComfyUI's or diffusers' safetensors) that decodes and encodes exactly, "
                "without tiles, in any length. Connect it wherever a VAE goes: VAE Decode, VAE Encode, image-to-video "
                "nodes."
            ),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=_safetensors(),
                    tooltip="A Wan VAE from models/vae, as safetensors. Pickles (.pt, .pth) are not opened.",
                ),
                *_engine_inputs(),
            ],
            outputs=[io.Vae.Output(tooltip="A VAE for any node that takes one.")],
            **_given(io.Schema, search_aliases=["wan vae loader", "load vae", "multi gpu vae", "video vae"]),
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        vae_name: str | None = None,
        devices: str | None = "auto",
        dtype: str | None = "auto",
        chunk: int | None = 0,
        encode_dtype: str | None = "auto",
    ) -> tuple[Any, ...]:
        """A file that was replaced is loaded anew. What another node gives is None here, and its file not known."""
        path = folder_paths.get_full_path("vae", vae_name) if vae_name else None
        return (vae_name, devices, dtype, chunk, encode_dtype, _version(path) if path else None)

    @classmethod
    def execute(
        cls, vae_name: str, devices: str = "auto", dtype: str = "auto", chunk: int = 0, encode_dtype: str = "auto"
    ) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("vae", vae_name)
        vae = load_parallel(path, devices=devices, dtype=dtype, chunk=chunk, encode_dtype=encode_dtype)
        return io.NodeOutput(vae)


class WanVAEParallelApply(io.ComfyNode):
    """Makes a loaded Wan VAE decode and encode with this pack's engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelApply",
            display_name="Apply Wan VAE Parallel",
            category=_CATEGORY,
            description=(
                "Takes a Wan VAE that any loader made and returns it decoding and encoding exactly, without tiles, in "
                "any length."
            ),
            inputs=[io.Vae.Input("vae", tooltip="A Wan 2.1 or 2.2 VAE; its weights are used."), *_engine_inputs()],
            outputs=[io.Vae.Output(tooltip="The same VAE, working with Wan VAE Parallel.")],
            **_given(io.Schema, search_aliases=["wan vae", "multi gpu vae", "patch vae", "parallel vae"]),
        )

    @classmethod
    def execute(
        cls, vae: Any, devices: str = "auto", dtype: str = "auto", chunk: int = 0, encode_dtype: str = "auto"
    ) -> io.NodeOutput:
        vae = apply_parallel(vae, devices=devices, dtype=dtype, chunk=chunk, encode_dtype=encode_dtype)
        return io.NodeOutput(vae)


class WanVAEParallelDecode(io.ComfyNode):
    """Decodes Wan latents to frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelDecode",
            display_name="Wan VAE Decode (Parallel)",
            category=_CATEGORY,
            description=(
                "Decodes Wan video latents to frames, exactly: no tiles, no seams, no flicker, any length. "
                "Takes the place of VAE Decode."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="Wan latents, as the sampler returns them."),
                io.Vae.Input("vae", tooltip="A Wan VAE; one that another loader made is made parallel on the way."),
                io.Boolean.Input(
                    "normalized_latents",
                    optional=True,
                    default=False,
                    tooltip=(
                        "Switch on for latents of WanVideoWrapper, which are still as the diffusion model made them. "
                        "ComfyUI's own samplers have applied mean and deviation already: leave it off for theirs."
                    ),
                    **_advanced(io.Boolean.Input),
                ),
            ],
            outputs=[io.Image.Output(tooltip="The frames, as VAE Decode returns them.")],
            **_given(io.Schema, search_aliases=["vae decode", "wan decode", "decode video", "latent to image"]),
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, normalized_latents: bool = False) -> io.NodeOutput:
        latents = samples["samples"]
        if getattr(latents, "is_nested", False):
            latents = latents.unbind()[0]
        if not isinstance(vae, ParallelVAE):
            vae = apply_parallel(vae)
        frames = vae.decode_latents(latents, normalized=normalized_latents)
        return io.NodeOutput(frames.flatten(0, 1))


class WanVAEParallelEncode(io.ComfyNode):
    """Encodes frames to Wan latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelEncode",
            display_name="Wan VAE Encode (Parallel)",
            category=_CATEGORY,
            description=(
                "Encodes frames to Wan video latents, exactly: no tiles, no seams, any length. "
                "Takes the place of VAE Encode."
            ),
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip=(
                        "The frames of one video. Encoded are one, five, nine and so on of them, and of their sides "
                        "multiples of 8 pixels (16 with Wan 2.2), the middle; what is beyond that is left out."
                    ),
                ),
                io.Vae.Input("vae", tooltip="A Wan VAE; one that another loader made is made parallel on the way."),
                _chunk_input(
                    "Latent frames encoded at once, of four pictures each. 0 does as the VAE's loader was told, which "
                    "may be to choose."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latents, as VAE Encode returns them.")],
            **_given(io.Schema, search_aliases=["vae encode", "wan encode", "encode video", "image to latent"]),
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any, chunk: int = 0) -> io.NodeOutput:
        if not isinstance(vae, ParallelVAE):
            vae = apply_parallel(vae)
        return io.NodeOutput({"samples": vae.encode_pixels(pixels, chunk=chunk)})


def _safetensors() -> list[str]:
    names = folder_paths.get_filename_list("vae")
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def _version(path: str) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev
