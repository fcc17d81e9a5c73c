"""The nodes: what they are called, what they take, and a few lines of what they do."""

from __future__ import annotations

import inspect
import os
import time
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.validation import validate_node_input

from .choices import listed_devices
from .report import tell_decoded
from .vaes import ParallelVAE, apply_parallel, check_alike, load_parallel

_CATEGORY = "Wan VAE Parallel"
_DEVICES = (
    "Where to decode and encode: auto takes all GPUs, which work on one video together, or the CPU where ComfyUI's own "
    "VAE runs on it, or the device that another node has put the VAE on; else one GPU, all but the first, or the CPU. "
    "Workflows may say others, as cuda:0,cuda:2. Devices that this machine does not have are left out, and the log "
    "says which were taken."
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
# Under which names people look for a node: the models that these VAEs belong to.
_MODELS = ["qwen image vae", "krea vae", "anima vae", "wan alpha vae", "upscale2x vae", "wanvideowrapper vae"]
_LOADER_ALIASES = ["wan vae loader", "load vae", "multi gpu vae", "video vae", *_MODELS]
_APPLY_ALIASES = ["wan vae", "multi gpu vae", "patch vae", "parallel vae", *_MODELS]
_DECODE_ALIASES = ["vae decode", "wan decode", "decode video", "latent to image", "qwen image decode"]
_ENCODE_ALIASES = ["vae encode", "wan encode", "encode video", "image to latent", "qwen image encode"]
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
    devices = listed_devices()
    return [
        io.Combo.Input(
            "devices",
            optional=True,
            options=list(devices),
            default="auto",
            tooltip=_DEVICES,
            # For web/devices.js, which shows them in the list.
            extra_dict={"device_names": {device: name for device, name in devices.items() if name}},
        ),
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


def _vae_input(name: str, tooltip: str, *, optional: bool = False) -> io.Input:
    """A VAE of ComfyUI's, or WanVideoWrapper's."""
    return io.MultiType.Input(name, types=[io.Vae, io.Custom("WANVAE")], tooltip=tooltip, optional=optional)


class _OnDevices(io.ComfyNode):
    """A node with a list of devices, beside whose choices any text is taken: other machines', older workflows'."""

    @classmethod
    def validate_inputs(cls, devices: Any = None, input_types: dict[str, Any] | None = None) -> bool | str:  # noqa: ARG003
        """Takes ``devices`` out of ComfyUI's hands, and lets a STRING be connected to it; other types are as ever."""
        inputs = cls.INPUT_TYPES()
        takes = {key: spec[0] for kind in ("required", "optional") for key, spec in inputs.get(kind, {}).items()}
        for name, received in (input_types or {}).items():
            if name != "devices" and not validate_node_input(received, takes[name]):
                return f"{name} takes {takes[name]}, and {received} is connected to it; connect a {takes[name]}"
            if name == "devices" and not validate_node_input(received, "COMBO,STRING"):
                return f"devices takes a text, and {received} is connected to it; connect a STRING, or choose one"
        return True


def _parallel_vae(vae: Any) -> Any:
    return vae if isinstance(vae, ParallelVAE) else apply_parallel(vae)


class WanVAEParallelLoader(_OnDevices):
    """Loads a Wan VAE that decodes and encodes with this pack's engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelLoader",
            display_name="Load Wan VAE (Parallel)",
            category=_CATEGORY,
            description=(
                "Loads a Wan 2.1 or 2.2 VAE, Qwen-Image's or another relative's (ComfyUI's or diffusers' safetensors) "
                "that decodes and encodes videos and images exactly, without tiles, in any length and size. Connect it "
                "wherever a VAE goes: VAE Decode, VAE Encode, image-to-video nodes."
            ),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=_safetensors(),
                    tooltip=(
                        "A Wan VAE from models/vae, as safetensors, or that of Qwen-Image, Krea, Anima, Wan-Alpha, "
                        "upscale2x or a pruned one. Pickles (.pt, .pth) are not opened."
                    ),
                ),
                *_engine_inputs(),
            ],
            outputs=[io.Vae.Output(tooltip="A VAE for any node that takes one.")],
            **_given(io.Schema, search_aliases=_LOADER_ALIASES),
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


class WanVAEParallelApply(_OnDevices):
    """Makes a loaded Wan VAE decode and encode with this pack's engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelApply",
            display_name="Apply Wan VAE Parallel",
            category=_CATEGORY,
            description=(
                "Takes a Wan VAE that any loader made, or Qwen-Image's or another relative's, and returns it decoding "
                "and encoding videos and images exactly, without tiles, in any length and size. WanVideoWrapper's VAE "
                "(WANVAE) becomes one of ComfyUI's whose latents are the wrapper's, normalised: nothing has to be "
                "switched. Of the wrapper's decode node the end picture's frame is left out as there; its tiling, and "
                "its minmax normalization, which change pixels, are not followed."
            ),
            inputs=[
                _vae_input("vae", "A Wan 2.1 or 2.2 VAE, a relative's, or WanVideoWrapper's; its weights are used."),
                *_engine_inputs(),
            ],
            outputs=[io.Vae.Output(tooltip="The same VAE, working with Wan VAE Parallel.")],
            **_given(io.Schema, search_aliases=_APPLY_ALIASES),
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
                "Decodes Wan video latents to frames, and Qwen-Image's and other relatives' to images, exactly: no "
                "tiles, no seams, no flicker, any length and size. Takes the place of VAE Decode."
            ),
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip=(
                        "Wan latents, as the sampler returns them. What WanVideoWrapper's says beside them is "
                        "followed: a reference frame or an end picture is left out, a loop is closed."
                    ),
                ),
                _vae_input("vae", "A Wan VAE; one that another loader made is made parallel on the way."),
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
            **_given(io.Schema, search_aliases=_DECODE_ALIASES),
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, normalized_latents: bool = False) -> io.NodeOutput:
        return io.NodeOutput(_parallel_vae(vae).decode_samples(samples, normalized=normalized_latents))


class WanVAEParallelDecodeRGBA(io.ComfyNode):
    """Decodes one latent with two VAEs, of colours and of alpha, to frames with both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelDecodeRGBA",
            display_name="Wan VAE Decode RGBA (Parallel)",
            category=_CATEGORY,
            description=(
                "Decodes Wan-Alpha's latents with both of its VAEs, exactly and without tiles, to frames with "
                "transparency: colours of the one, as alpha the red of the other. Save WEBM and Save Animated WEBP "
                "take them; straight to a file goes Wan VAE Decode to Video (Parallel)."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="Wan-Alpha's latents, as the sampler returns them."),
                _vae_input("vae_rgb", "The VAE of the colours: wan_alpha_2.1_vae_rgb_channel."),
                _vae_input("vae_alpha", "The VAE of the transparency: wan_alpha_2.1_vae_alpha_channel."),
            ],
            outputs=[io.Image.Output(tooltip="The frames, with alpha.")],
            **_given(io.Schema, search_aliases=["wan alpha", "decode rgba", "transparent video", "decode alpha"]),
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae_rgb: Any, vae_alpha: Any) -> io.NodeOutput:
        rgb, alpha = _parallel_vae(vae_rgb), _parallel_vae(vae_alpha)
        check_alike(samples, rgb, alpha)
        since = time.monotonic()
        # It is one latent: normalised for both if one of them is WanVideoWrapper's.
        normalized = rgb._normalized or alpha._normalized
        # One set of worker processes for both, which whoever decoded last has.
        colours = rgb.decode_samples(samples, normalized=normalized, workers_of=alpha)
        opacity = alpha.decode_samples(samples, normalized=normalized, workers_of=rgb)
        frames = torch.cat([colours[..., :3], opacity[..., :1].to(colours)], dim=-1)
        tell_decoded(frames, since, rgb._engine.worked_on)  # both in one line
        return io.NodeOutput(frames)


class WanVAEParallelEncode(io.ComfyNode):
    """Encodes frames to Wan latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelEncode",
            display_name="Wan VAE Encode (Parallel)",
            category=_CATEGORY,
            description=(
                "Encodes frames to Wan video latents, or images to Qwen-Image's and other relatives', exactly: no "
                "tiles, no seams, any length and size. Takes the place of VAE Encode."
            ),
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip=(
                        "The frames of one video. Encoded are one, five, nine and so on of them, and of their sides "
                        "multiples of 8 pixels (16 with Wan 2.2), the middle; what is beyond that is left out."
                    ),
                ),
                _vae_input("vae", "A Wan VAE; one that another loader made is made parallel on the way."),
                _chunk_input(
                    "Latent frames encoded at once, of four pictures each. 0 does as the VAE's loader was told, which "
                    "may be to choose."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latents, as VAE Encode returns them.")],
            **_given(io.Schema, search_aliases=_ENCODE_ALIASES),
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any, chunk: int = 0) -> io.NodeOutput:
        return io.NodeOutput({"samples": _parallel_vae(vae).encode_pixels(pixels, chunk=chunk)})


def _safetensors() -> list[str]:
    names = folder_paths.get_filename_list("vae")
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def _version(path: str) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev
