"""The workflows that come with the pack, and its subgraphs: writes ``workflows/`` and ``subgraphs/`` anew.

    python -m tools.templates http://127.0.0.1:8188

against a running ComfyUI of the oldest version that the pack takes, with this pack in it: what a newer one has besides
is left at its default. Each graph is ComfyUI's own template of that model, with its settings, and nodes of this pack
where it has others for the VAE. A column is 400 wide; no link may pass behind a node (tests/comfyui/test_templates.py).
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wan_vae_parallel import __version__

from .graphs import BYPASSED, Graph, Json, Node, Promoted

_ROOT = Path(__file__).resolve().parents[1]
# The oldest that pyproject.toml takes.
_COMFYUI = "0.8.0"
_WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
_WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
_QWEN = "https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/"
_PLACES = [
    (_WAN21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled"),
    (_WAN21, "vae", "wan_2.1_vae"),
    (_WAN21, "diffusion_models", "wan2.1_t2v_1.3B_fp16"),
    (_WAN21, "diffusion_models", "wan2.1_vace_14B_fp16"),
    (_WAN22, "vae", "wan2.2_vae"),
    (_WAN22, "diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled"),
    (_WAN22, "diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled"),
    (_WAN22, "diffusion_models", "wan2.2_i2v_high_noise_14B_fp8_scaled"),
    (_WAN22, "diffusion_models", "wan2.2_i2v_low_noise_14B_fp8_scaled"),
    (_WAN22, "diffusion_models", "wan2.2_ti2v_5B_fp16"),
    (_QWEN, "text_encoders", "qwen_2.5_vl_7b_fp8_scaled"),
    (_QWEN, "vae", "qwen_image_vae"),
    (_QWEN, "diffusion_models", "qwen_image_fp8_e4m3fn"),
]
MODELS = {f"{name}.safetensors": (f"{base}{folder}/{name}.safetensors", folder) for base, folder, name in _PLACES}
_FOX = "a fox running through fresh snow at sunrise, the camera follows it, cinematic, slow motion"
_NEGATIVE = "blurry, overexposed, static, subtitles, worst quality"
_MISSING = (
    "Models that you lack are listed when the workflow opens, with a button each that downloads them. Nodes of this "
    "pack come from *Wan VAE Parallel* in ComfyUI Manager."
)
_DEMO = (
    "It runs without a GPU on what `wan-vae-parallel demo` makes: copy `demo_vae.safetensors` to `models/vae/` and "
    "`{}` to `input/`."
)
At = tuple[int, int]
_FURTHER = "Click a node, then **Node Info** above it, for what its inputs mean."


def _about(graph: Graph, *paragraphs: str, demo: str = "", tall: int = 330) -> None:
    """The note beside a graph; ``demo`` is the file of the demo's that it runs with."""
    text = [*paragraphs, _DEMO.format(demo) if demo else _MISSING, _FURTHER]
    graph.note((-480, 0), (400, tall), "\n\n".join(text), "About this workflow")


def _prompts(
    graph: Graph, clip: Node, column: int, positive: str, *, negative: str = _NEGATIVE, top: int = 180
) -> dict[str, Node]:
    texts = {"positive": positive, "negative": negative}
    return {
        name: graph.node(
            "CLIPTextEncode", (column, top + row), title=f"{name.title()} prompt", tall=140, clip=clip, text=text
        )
        for row, (name, text) in zip((0, 230), texts.items(), strict=True)
    }


def _model(graph: Graph, name: str, at: At, title: str = "Load diffusion model") -> Node:
    return graph.node("UNETLoader", at, title=title, unet_name=f"{name}.safetensors", weight_dtype="default")


def _clip(graph: Graph, at: At, name: str = "umt5_xxl_fp8_e4m3fn_scaled", type_: str = "wan") -> Node:
    file = f"{name}.safetensors"
    return graph.node("CLIPLoader", at, title="Load text encoder", clip_name=file, type=type_, device="default")


def _shift(graph: Graph, model: Node, at: At, shift: float, noise: str = "", type_: str = "ModelSamplingSD3") -> Node:
    title = f"Shift, {noise} noise" if noise else "Shift"
    return graph.node(type_, at, title=title, model=model, shift=shift)


def _vae(graph: Graph, name: str, at: At) -> Node:
    return graph.node("WanVAEParallelLoader", at, vae_name=f"{name}.safetensors")


def _image(graph: Graph, title: str, at: At, mode: int = 0) -> Node:
    return graph.node("LoadImage", at, title=title, tall=314, mode=mode, image="example.png")


def _conditioned(latent: Node) -> Json:
    """What a sampler takes of a node that has conditioning and a latent."""
    return {"positive": latent["positive"], "negative": latent["negative"], "latent_image": latent["latent"]}


def _sampler(graph: Graph, at: At, *, steps: int = 20, sampler_name: str = "uni_pc", **given: Any) -> Node:
    return graph.node(
        "KSampler", at, title="Sampler", steps=steps, sampler_name=sampler_name, scheduler="simple", **given
    )


def _two_samplers(graph: Graph, high: tuple[At, Node], low: tuple[At, Node], conditioning: Json, cfg: float) -> Node:
    """Wan 2.2 14B's: the high-noise model does the first ten steps of twenty, the low-noise model the rest."""
    given = {**conditioning, "steps": 20, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    for noise, (at, model), begin, end in (("high", high, 0, 10), ("low", low, 10, 10000)):
        does = "enable" if noise == "high" else "disable"
        given["latent_image"] = graph.node(
            "KSamplerAdvanced",
            at,
            title=f"Sampler, {noise} noise",
            model=model,
            **given,
            start_at_step=begin,
            end_at_step=end,
            add_noise=does,
            return_with_leftover_noise=does,
        )
    return given["latent_image"]


def _saved(graph: Graph, frames: Node, at: At) -> None:
    video = graph.node("CreateVideo", at, images=frames, fps=16.0)
    graph.node("SaveVideo", (at[0] + 400, at[1]), video=video, filename_prefix="video/wan_vae_parallel")


def _to_video(graph: Graph, samples: Node, vae: Node, at: At, fps: float = 16.0) -> None:
    names = {"fps": fps, "filename_prefix": "video/wan_vae_parallel", "save": True}
    graph.node("WanVAEParallelDecodeToVideo", at, tall=560, samples=samples, vae=vae, **names)


def _latents_saved(graph: Graph, latents: Node, at: At) -> None:
    graph.node("SaveLatent", at, title="Save latent", samples=latents, filename_prefix="latents/wan_vae_parallel")


def wan21_text_to_video(graph: Graph) -> None:
    """Shows Apply, with all else as ComfyUI's own."""
    model = _model(graph, "wan2.1_t2v_1.3B_fp16", (0, 0))
    clip = _clip(graph, (0, 200))
    vae = graph.node("VAELoader", (0, 680), vae_name="wan_2.1_vae.safetensors")
    model = _shift(graph, model, (400, 0), 8)
    prompts = _prompts(graph, clip, 400, _FOX)
    vae = graph.node("WanVAEParallelApply", (400, 680), vae=vae)
    size = {"width": 832, "height": 480, "length": 33}
    empty = graph.node("EmptyHunyuanLatentVideo", (400, 920), title="Empty latent video", **size)
    samples = _sampler(graph, (800, 240), model=model, **prompts, latent_image=empty, steps=30, cfg=6)
    _saved(graph, graph.node("VAEDecode", (1200, 660), samples=samples, vae=vae), (1600, 660))
    _about(
        graph,
        "## Wan 2.1 1.3B, text to video",
        "ComfyUI's own graph with one node more: **Apply Wan VAE Parallel** behind **Load VAE**. **VAE Decode** stays, "
        "and decodes the frames exactly, without tiles, on all GPUs.",
        "The same node goes behind any other VAE loader.",
    )


def wan22_text_to_video(graph: Graph) -> None:
    """Shows the loader and Decode to Video."""
    high = _model(graph, "wan2.2_t2v_high_noise_14B_fp8_scaled", (0, 0), "Load high-noise model")
    clip = _clip(graph, (0, 400))
    low = _model(graph, "wan2.2_t2v_low_noise_14B_fp8_scaled", (0, 860), "Load low-noise model")
    high = _shift(graph, high, (400, 0), 5, "high")
    size = {"width": 640, "height": 640, "length": 81}
    empty = graph.node("EmptyHunyuanLatentVideo", (400, 150), title="Empty latent video", **size)
    prompts = _prompts(graph, clip, 400, _FOX, top=400)
    low = _shift(graph, low, (400, 860), 5, "low")
    samples = _two_samplers(graph, ((800, -60), high), ((1200, 400), low), {**prompts, "latent_image": empty}, cfg=3.5)
    vae = _vae(graph, "wan_2.1_vae", (1200, 120))
    _to_video(graph, samples, vae, (1600, 120))
    _about(
        graph,
        "## Wan 2.2 14B, text to video",
        "Two samplers, and one node for the rest: **Wan VAE Decode to Video** stands for VAE Decode, Create Video and "
        "Save Video. It encodes the file while it decodes, so a long video takes no more memory than a short one.",
        "Its VAE is the one of Wan 2.1.",
    )


def wan22_image_to_video(graph: Graph) -> None:
    """Shows the loader, whose VAE encodes as well."""
    high = _model(graph, "wan2.2_i2v_high_noise_14B_fp8_scaled", (0, 0), "Load high-noise model")
    clip = _clip(graph, (0, 260))
    high = _shift(graph, high, (400, 0), 5, "high")
    prompts = _prompts(graph, clip, 400, "the camera moves slowly around the subject, soft light")
    vae = _vae(graph, "wan_2.1_vae", (400, 680))
    image = _image(graph, "First frame", (400, 940))
    size = {"width": 640, "height": 640, "length": 81}
    latent = graph.node(
        "WanImageToVideo", (800, 320), title="Image to video", **prompts, vae=vae, start_image=image, **size
    )
    low = _model(graph, "wan2.2_i2v_low_noise_14B_fp8_scaled", (800, 1060), "Load low-noise model")
    low = _shift(graph, low, (1200, 1060), 5, "low")
    samples = _two_samplers(graph, ((1200, -80), high), ((1600, 340), low), _conditioned(latent), cfg=3.5)
    _to_video(graph, samples, vae, (2000, 780))
    _about(
        graph,
        "## Wan 2.2 14B, image to video",
        "**Load Wan VAE (Parallel)** stands for Load VAE. Its VAE encodes the picture for **WanImageToVideo**, and "
        "decodes the video, both exactly and on all GPUs.",
        "Of the grey frames behind the picture, which are all alike, only the first few are encoded: what the rest "
        "would give is known then.",
    )


def wan22_first_last_frame(graph: Graph) -> None:
    """Shows the loader with all else as ComfyUI's own."""
    high = _model(graph, "wan2.2_i2v_high_noise_14B_fp8_scaled", (0, 0), "Load high-noise model")
    clip = _clip(graph, (0, 260))
    high = _shift(graph, high, (400, 0), 8, "high")
    prompts = _prompts(graph, clip, 400, "the scene changes smoothly from the first picture to the last")
    vae = _vae(graph, "wan_2.1_vae", (400, 720))
    first = _image(graph, "First frame", (400, 980))
    last = _image(graph, "Last frame", (400, 1450))
    latent = graph.node(
        "WanFirstLastFrameToVideo",
        (800, 440),
        title="First and last frame to video",
        **prompts,
        vae=vae,
        start_image=first,
        end_image=last,
        width=640,
        height=640,
        length=81,
    )
    low = _model(graph, "wan2.2_i2v_low_noise_14B_fp8_scaled", (800, 1100), "Load low-noise model")
    low = _shift(graph, low, (1200, 1100), 8, "low")
    samples = _two_samplers(graph, ((1200, -80), high), ((1600, 340), low), _conditioned(latent), cfg=4)
    _saved(graph, graph.node("VAEDecode", (2000, 800), samples=samples, vae=vae), (2400, 800))
    _about(
        graph,
        "## Wan 2.2 14B, from a first frame to a last one",
        "**Load Wan VAE (Parallel)** stands for Load VAE, and nothing else has changed: **WanFirstLastFrameToVideo** "
        "and **VAE Decode** take its VAE as any other.",
        "Choose two pictures of the same proportions.",
    )


def wan22_5b(graph: Graph) -> None:
    """Shows the loader with Wan 2.2's own VAE."""
    model = _model(graph, "wan2.2_ti2v_5B_fp16", (0, 0))
    clip = _clip(graph, (0, 200))
    vae = _vae(graph, "wan2.2_vae", (0, 680))
    image = _image(graph, "First frame, bypassed", (0, 940), BYPASSED)
    model = _shift(graph, model, (400, 0), 8)
    prompts = _prompts(graph, clip, 400, _FOX)
    size = {"width": 1280, "height": 704, "length": 121}
    latent = graph.node("Wan22ImageToVideoLatent", (400, 800), title="Latent video", vae=vae, start_image=image, **size)
    samples = _sampler(graph, (800, 240), model=model, **prompts, latent_image=latent, cfg=5)
    _to_video(graph, samples, vae, (1200, 640), fps=24.0)
    _about(
        graph,
        "## Wan 2.2 5B, text or image to video",
        "This model has a VAE of its own, **wan2.2_vae**, of 48 channels. For a video that begins with a picture, "
        "choose one in **First frame** and take its bypass away (Ctrl + B).",
    )


def wan21_vace(graph: Graph) -> None:
    """Shows the loader and our decode node."""
    model = _model(graph, "wan2.1_vace_14B_fp16", (0, 0))
    clip = _clip(graph, (0, 260))
    file = graph.node("LoadVideo", (0, 960), title="Control video", tall=340, file="demo.mp4")
    model = _shift(graph, model, (400, 0), 8)
    prompts = _prompts(graph, clip, 400, "the subject of the picture, moving as in the video, soft light")
    vae = _vae(graph, "wan_2.1_vae", (400, 720))
    reference = _image(graph, "Reference picture", (400, 1160))
    control = graph.node("GetVideoComponents", (400, 960), video=file)
    latent = graph.node(
        "WanVaceToVideo",
        (800, 320),
        title="VACE to video",
        **prompts,
        vae=vae,
        control_video=control["images"],
        reference_image=reference,
        width=720,
        height=720,
        length=81,
    )
    samples = _sampler(graph, (1200, -20), model=model, **_conditioned(latent), cfg=6)
    trimmed = {"samples": samples, "trim_amount": latent["trim_latent"]}
    samples = graph.node("TrimVideoLatent", (1600, 320), title="Trim the reference off", **trimmed)
    _saved(graph, graph.node("WanVAEParallelDecode", (2000, 680), samples=samples, vae=vae), (2400, 680))
    _about(
        graph,
        "## Wan 2.1 VACE 14B, a picture moved by a video",
        "**WanVaceToVideo** encodes the control video twice and the picture: with the VAE of **Load Wan VAE "
        "(Parallel)** exactly and on all GPUs. **Wan VAE Decode (Parallel)** stands for VAE Decode.",
        "The control video is usually one of edges, depth or poses; the one of `wan-vae-parallel demo` will do to try.",
        tall=400,
    )


def qwen_image(graph: Graph) -> None:
    """Shows that images have the same VAE."""
    model = _model(graph, "qwen_image_fp8_e4m3fn", (0, 0))
    clip = _clip(graph, (0, 200), "qwen_2.5_vl_7b_fp8_scaled", "qwen_image")
    model = _shift(graph, model, (400, 0), 3.1, type_="ModelSamplingAuraFlow")
    text = 'a small bookshop at night, its sign reads "EVERY ROW IN ITS PLACE", rain on the pavement, warm light'
    prompts = _prompts(graph, clip, 400, text, negative="")
    vae = _vae(graph, "qwen_image_vae", (400, 680))
    empty = graph.node("EmptySD3LatentImage", (400, 940), title="Empty latent image", width=1328, height=1328)
    samples = _sampler(graph, (800, 240), model=model, **prompts, latent_image=empty, cfg=4, sampler_name="euler")
    images = graph.node("WanVAEParallelDecode", (1200, 660), samples=samples, vae=vae)
    graph.node("SaveImage", (1600, 660), tall=360, images=images, filename_prefix="wan_vae_parallel")
    _about(
        graph,
        "## Qwen-Image, text to image",
        "Qwen-Image's VAE is built as Wan's, so it loads and decodes the same way: exactly, without tiles, in any "
        "size. The VAEs of Krea, Anima and Qwen-Image Edit do so too.",
    )


def decode_latent(graph: Graph) -> None:
    """Shows our decode node; runs with the demo's files."""
    samples = graph.node("LoadLatent", (0, 0), title="Load latent", latent="demo.latent")
    vae = _vae(graph, "demo_vae", (0, 140))
    _saved(graph, graph.node("WanVAEParallelDecode", (400, 0), samples=samples, vae=vae), (800, 0))
    _about(
        graph,
        "## Decode a saved latent",
        "**Wan VAE Decode (Parallel)** stands for VAE Decode: the frames of a latent, which **Save Latent** has "
        "written or the pack's command line.",
        demo="demo.latent",
    )


def decode_to_video(graph: Graph) -> None:
    """Shows Decode to Video; runs with the demo's files."""
    samples = graph.node("LoadLatent", (0, 0), title="Load latent", latent="demo.latent")
    _to_video(graph, samples, _vae(graph, "demo_vae", (0, 140)), (400, 0))
    _about(
        graph,
        "## Decode a saved latent to a video",
        "One node decodes, encodes and saves, a few frames in memory at a time however long the video: to H.264, "
        "H.265, VP9, ProRes, lossless FFV1 or PNG.",
        demo="demo.latent",
    )


def encode_video(graph: Graph) -> None:
    """Shows our encode node; runs with the demo's files."""
    file = graph.node("LoadVideo", (0, 0), tall=340, file="demo.mp4")
    vae = _vae(graph, "demo_vae", (400, 200))
    frames = graph.node("GetVideoComponents", (400, 0), video=file)
    _latents_saved(graph, graph.node("WanVAEParallelEncode", (800, 0), pixels=frames["images"], vae=vae), (1200, 0))
    _about(
        graph,
        "## Encode a video",
        "**Wan VAE Encode (Parallel)** stands for VAE Encode: from frames to a latent, which **Load Latent** reads "
        "once it is copied to `input/`.",
        demo="demo.mp4",
    )


def video_to_latent(graph: Graph) -> None:
    """Shows Load Video to Latent; runs with the demo's files."""
    vae = _vae(graph, "demo_vae", (0, 0))
    _latents_saved(graph, graph.node("WanVAEParallelLoadVideoToLatent", (400, 0), file="demo.mp4", vae=vae), (800, 0))
    _about(
        graph,
        "## Encode a video's file",
        "One node reads a file and encodes it, a few frames in memory at a time however long the video.",
        demo="demo.mp4",
    )


# By the names under which the template browser lists them, and those of the same for the API.
TEMPLATES: dict[str, tuple[str, Callable[[Graph], None]]] = {
    "Decode a Saved Latent": ("decode_latent", decode_latent),
    "Decode a Saved Latent to Video": ("decode_to_video", decode_to_video),
    "Encode a Video": ("encode_video", encode_video),
    "Encode a Video File to Latent": ("video_to_latent", video_to_latent),
    "Qwen-Image Text to Image": ("qwen_image", qwen_image),
    "Wan 2.1 1.3B Text to Video": ("text_to_video", wan21_text_to_video),
    "Wan 2.1 VACE 14B Video to Video": ("vace", wan21_vace),
    "Wan 2.2 14B First-Last Frame": ("first_last_frame", wan22_first_last_frame),
    "Wan 2.2 14B Image to Video": ("image_to_video", wan22_image_to_video),
    "Wan 2.2 14B Text to Video": ("text_to_video_14b", wan22_text_to_video),
    "Wan 2.2 5B Text or Image to Video": ("text_to_video_5b", wan22_5b),
}


def decode_blueprint(graph: Graph) -> Json:
    """Loader and decode node."""
    vae = _promoted_vae(graph)
    frames = graph.node("WanVAEParallelDecode", (400, 0), samples=Promoted("samples"), vae=vae)
    text = "Decodes Wan latents to frames exactly, without tiles, on all GPUs."
    return graph.blueprint("Decode (Wan VAE Parallel)", text, {"IMAGE": frames["IMAGE"]})


def encode_blueprint(graph: Graph) -> Json:
    """Loader and encode node."""
    vae = _promoted_vae(graph)
    latents = graph.node("WanVAEParallelEncode", (400, 0), pixels=Promoted("pixels"), vae=vae)
    text = "Encodes frames to Wan latents exactly, without tiles, on all GPUs."
    return graph.blueprint("Encode (Wan VAE Parallel)", text, {"LATENT": latents["LATENT"]})


def decode_to_video_blueprint(graph: Graph) -> Json:
    """Loader and Decode to Video."""
    vae = _promoted_vae(graph)
    video = graph.node(
        "WanVAEParallelDecodeToVideo",
        (400, 0),
        tall=560,
        samples=Promoted("samples"),
        audio=Promoted("audio"),
        vae=vae,
        fps=Promoted("fps", 16.0),
        format=Promoted("format", "MP4 H.264 8 bit"),
        quality=Promoted("quality", "high"),
        filename_prefix=Promoted("filename_prefix", "video/wan_vae_parallel"),
        save=Promoted("save", True),
    )
    text = "Decodes Wan latents straight to a video file, exactly, a few frames in memory at a time."
    return graph.blueprint("Decode to Video (Wan VAE Parallel)", text, {"VIDEO": video["VIDEO"]})


BLUEPRINTS = [decode_blueprint, encode_blueprint, decode_to_video_blueprint]


def _promoted_vae(graph: Graph) -> Node:
    return graph.node(
        "WanVAEParallelLoader",
        (0, -260),  # above the links that go from the subgraph's inputs to the next node
        vae_name=Promoted("vae_name", "wan_2.1_vae.safetensors"),
        devices=Promoted("devices", "auto"),
    )


def main(server: str) -> None:
    """Writes all files."""
    with urllib.request.urlopen(f"{server.rstrip('/')}/object_info", timeout=60) as response:
        nodes = json.load(response)

    def graph() -> Graph:
        return Graph(nodes, MODELS, (_COMFYUI, __version__))

    for name, (api_name, build) in TEMPLATES.items():
        built = graph()
        build(built)
        _write(_ROOT / "workflows" / f"{name}.json", built.editor(name))
        _write(_ROOT / "workflows" / "api" / f"{api_name}.json", built.api())
    for build_blueprint in BLUEPRINTS:
        blueprint = build_blueprint(graph())
        _write(_ROOT / "subgraphs" / f"{blueprint['nodes'][0]['title']}.json", blueprint)


def _write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
