"""The nodes that go from latents straight to a video file, and from a file straight to latents."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..wan_vae_parallel.errors import LatentError
from ..wan_vae_parallel.files.audio import Audio
from ..wan_vae_parallel.files.formats import FORMATS, QUALITIES
from ..wan_vae_parallel.files.settings import OutputSettings
from ..wan_vae_parallel.to_video import VideoDecode
from .report import tell_work
from .saved_video import SavedVideo
from .schemas import _CATEGORY, _advanced, _chunk_input, _given, _parallel_vae, _vae_input
from .streams import decode_to_file, encode_file, latents_for_file, plan_file
from .video_output import VIDEO_FORMATS, VideoOutput

_OWN_FFMPEG = "imageio-ffmpeg"


class WanVAEParallelDecodeToVideo(io.ComfyNode):
    """Decodes Wan latents to a video file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelDecodeToVideo",
            display_name="Wan VAE Decode to Video (Parallel)",
            category=_CATEGORY,
            description=(
                "Decodes Wan video latents straight to a video file, exactly, a few frames in memory at a time, "
                "however long the video is. Takes the place of VAE Decode, Create Video and Save Video."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="Wan latents, as the sampler returns them; a list of them, too."),
                _vae_input("vae", "A Wan VAE; one that another loader made is made parallel on the way."),
                io.Float.Input(
                    "fps",
                    optional=True,
                    default=16.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames a second: Wan 2.1 has 16, Wan 2.2 5B 24.",
                ),
                io.Combo.Input(
                    "format",
                    optional=True,
                    options=list(VIDEO_FORMATS),
                    default="MP4 H.264 8 bit",
                    tooltip=(
                        "What to write. Colours are BT.709 and tagged so. MKV FFV1 and PNG keep every pixel; ProRes is "
                        "for editing programs. 10 and 16 bits are made from the decoder's floats, not from 8. Of a VAE "
                        "with alpha, or of two, VP9, ProRes (then 4444), FFV1 and PNG keep it."
                    ),
                ),
                io.Combo.Input(
                    "quality",
                    optional=True,
                    options=list(QUALITIES),
                    default="high",
                    tooltip="Of H.264, H.265 and VP9; ProRes, FFV1 and PNG have one quality only.",
                ),
                io.String.Input(
                    "filename_prefix",
                    optional=True,
                    default="video/wan",
                    tooltip="How files are named, as in Save Video, with %year%, %month%, %day%, %width% and the like.",
                ),
                io.Boolean.Input(
                    "save",
                    optional=True,
                    default=False,
                    tooltip=(
                        "On: the file goes to ComfyUI's output folder. Off: to its temporary one, which is emptied "
                        "when ComfyUI starts; connect Save Video to keep it."
                    ),
                ),
                io.Audio.Input(
                    "audio", optional=True, tooltip="Sound, which is cut or filled with silence to the video's length."
                ),
                _vae_input(
                    "vae_alpha",
                    "Of Wan-Alpha: the VAE of the transparency, and vae is the colours'. The format must be one that "
                    "keeps it: VP9, ProRes, FFV1 or PNG.",
                    optional=True,
                ),
                io.Boolean.Input(
                    "join",
                    optional=True,
                    default=False,
                    tooltip=(
                        "On: several latents, of a list or a batch, are consecutive parts of one video, and decoded "
                        "without a seam. Off: each becomes a video of its own; images, as PNG, become pictures of one "
                        "folder."
                    ),
                ),
                io.Int.Input(
                    "crf",
                    optional=True,
                    default=-1,
                    min=-1,
                    max=63,
                    tooltip="The encoder's own measure of quality, less is better; -1 for what quality says.",
                    **_advanced(io.Int.Input),
                ),
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
                io.Combo.Input(
                    "ffmpeg",
                    optional=True,
                    options=[_OWN_FFMPEG, "of the PATH"],
                    default=_OWN_FFMPEG,
                    tooltip="Which ffmpeg encodes: the one that was installed with this pack, or the computer's own.",
                    **_advanced(io.Combo.Input),
                ),
            ],
            outputs=[
                io.Video.Output(
                    is_output_list=True, tooltip="The video, for Save Video, Get Video Components and others."
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_input_list=True,
            is_output_node=True,
            **_given(
                io.Schema,
                search_aliases=[
                    *("vae decode video", "latent to video", "wan save video", "stream decode"),
                    *("wan alpha video", "transparent video"),
                ],
            ),
        )

    @classmethod
    def execute(
        cls,
        samples: list[dict[str, Any]],
        vae: list[Any],
        fps: Sequence[float] = (16.0,),
        format: Sequence[str] = ("MP4 H.264 8 bit",),
        quality: Sequence[str] = ("high",),
        filename_prefix: Sequence[str] = ("video/wan",),
        save: Sequence[bool] = (False,),
        audio: Sequence[Any] | None = None,
        vae_alpha: Sequence[Any] | None = None,
        join: Sequence[bool] = (False,),
        crf: Sequence[int] = (-1,),
        normalized_latents: Sequence[bool] = (False,),
        ffmpeg: Sequence[str] = (_OWN_FFMPEG,),
    ) -> io.NodeOutput:
        wan = _parallel_vae(vae[0])
        alpha = _parallel_vae(vae_alpha[0]) if vae_alpha else None
        # It is one latent: normalised for both if one of them is WanVideoWrapper's.
        told = normalized_latents[0] or (alpha is not None and alpha._normalized)
        read = [latents_for_file(wan, one, normalized=told) for one in samples]
        normalized = [one for latents, one in read for _ in latents]
        parts = [part for latents, _ in read for part in latents.split(1)]
        if join[0] and len(set(normalized)) > 1:
            raise LatentError(
                "some of the latents are normalised and some are not, so that they are no parts of one video; switch "
                "join off, or take them all from one kind of sampler"
            )
        videos = [parts] if join[0] else [[part] for part in parts]
        if not join[0] and format[0] in VIDEO_FORMATS and FORMATS[VIDEO_FORMATS[format[0]][0]].pictures:
            videos, normalized = _images_together(parts, normalized)
        sounds = _sounds(audio)
        since, frames, size = time.monotonic(), 0, (0, 0)
        # All of them before the first is decoded: nobody waits for some to hear of an error in another.
        planned: list[tuple[VideoOutput, OutputSettings, VideoDecode]] = []
        for number, latents in enumerate(videos):
            size = height, width = wan._engine.architecture.frame_size(*latents[0].shape[-2:])
            taken = [path for made, _, _ in planned for path in made.paths]
            made = VideoOutput(format[0], filename_prefix[0], saved=save[0], size=(width, height), taken=taken)
            settings = OutputSettings(
                fps=Fraction(fps[0]).limit_denominator(10**6) if math.isfinite(fps[0]) else fps[0],
                format=made.format,
                quality=quality[0] if crf[0] < 0 else crf[0],
                audio=sounds[min(number, len(sounds) - 1)] if sounds else None,
                metadata=cls._texts(),
                preview=made.preview,
                ffmpeg=None if ffmpeg[0] == _OWN_FFMPEG else "ffmpeg",
            )
            planned.append(
                (
                    made,
                    settings,
                    plan_file(wan, latents, made.path, settings, normalized=normalized[number], vae_alpha=alpha),
                )
            )
        results: list[SavedVideo | ExecutionBlocker] = []
        shown: list[ui.SavedResult] = []
        for number, (made, settings, decode) in enumerate(planned):
            files = decode_to_file(wan, decode, part=number, parts=len(planned), vae_alpha=alpha)
            results.append(made.video(settings, alpha=decode.alpha))
            shown += made.shown(files)
            frames += decode.shape[0] * wan._engine.architecture.frame_count(decode.shape[2])
        tell_work(frames, size, since, wan._engine.worked_on)
        return io.NodeOutput(results, ui={"images": shown, "animated": (planned[0][0].plays,)})

    @classmethod
    def _texts(cls) -> dict[str, str]:
        """Prompt and workflow, as Save Video puts them into a file."""
        if args.disable_metadata:
            return {}
        texts = {key: json.dumps(value) for key, value in (cls.hidden.extra_pnginfo or {}).items()}
        if cls.hidden.prompt is not None:
            texts["prompt"] = json.dumps(cls.hidden.prompt)
        return texts


class WanVAEParallelLoadVideoToLatent(io.ComfyNode):
    """Encodes a video file to Wan latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanVAEParallelLoadVideoToLatent",
            display_name="Load Video to Latent (Parallel)",
            category=_CATEGORY,
            description=(
                "Encodes a video file straight to Wan latents, exactly, a few frames in memory at a time, however long "
                "the video is. Takes the place of Load Video, Get Video Components and VAE Encode."
            ),
            inputs=[
                io.Combo.Input(
                    "file", options=_videos(), upload=io.UploadType.video, tooltip="From ComfyUI's input folder."
                ),
                _vae_input("vae", "A Wan VAE; one that another loader made is made parallel on the way."),
                io.Int.Input(
                    "width",
                    optional=True,
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Frames are stretched to it, bicubic; 0 for the video's own, or in proportion to height.",
                ),
                io.Int.Input("height", optional=True, default=0, min=0, max=16384, step=8, tooltip="As width."),
                io.Int.Input(
                    "frames",
                    optional=True,
                    default=0,
                    min=0,
                    max=10**6,
                    tooltip="The first so many; 0 for all. One, five, nine and so on are used.",
                ),
                _chunk_input(
                    "Latent frames encoded at once, of four pictures each. 0 does as the VAE's loader was told, which "
                    "may be to choose."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latents, as VAE Encode returns them.")],
            **_given(io.Schema, search_aliases=["video to latent", "encode video", "vae encode video", "load video"]),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> float | None:
        """A file that was replaced is encoded anew."""
        if not file or not isinstance(file, str):
            return None
        path = folder_paths.get_annotated_filepath(file)
        return os.path.getmtime(path) if os.path.isfile(path) else None

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """A file that is not there is told before the graph runs."""
        if file is None:  # of a link
            return True
        if not isinstance(file, str) or not file.strip():
            return f"file names no video ({file!r}); upload one, or choose one of the input folder"
        if os.path.isfile(folder_paths.get_annotated_filepath(file)):
            return True
        return f"there is no video {file} in the input folder; upload it, or choose another"

    @classmethod
    def execute(
        cls, file: str, vae: Any, width: int = 0, height: int = 0, frames: int = 0, chunk: int = 0
    ) -> io.NodeOutput:
        wan = _parallel_vae(vae)
        path = Path(folder_paths.get_annotated_filepath(file))
        return io.NodeOutput(
            {"samples": encode_file(wan, path, size=(width, height), most=frames or None, chunk=chunk)}
        )


def _images_together(
    parts: Sequence[torch.Tensor], normalized: Sequence[bool]
) -> tuple[list[list[torch.Tensor]], list[bool]]:
    """Videos ``[1, z, T, h, w]`` each by itself, and images of one kind that follow one another as one batch."""
    groups: list[list[torch.Tensor]] = []
    kinds: list[tuple[Any, ...]] = []
    for part, one in zip(parts, normalized, strict=True):
        kind = (one, part.shape, part.dtype, part.device)
        if part.shape[2] == 1 and kinds and kinds[-1] == kind:
            groups[-1].append(part)
        else:
            groups.append([part])
            kinds.append(kind)
    return [[torch.cat(group)] for group in groups], [kind[0] for kind in kinds]


def _sounds(audio: Sequence[Any] | None) -> list[Audio | None]:
    """One for each video; of no channels, as of a video without sound, none."""
    sounds: list[Audio | None] = []
    for one in audio or ():
        waveforms = () if one is None else one["waveform"]
        if not len(waveforms):
            sounds.append(None)
        for waveform in waveforms:
            samples = waveform.detach().cpu().float()
            sounds.append(Audio(samples, int(one["sample_rate"])) if len(samples) else None)
    return sounds


def _videos() -> list[str]:
    folder = folder_paths.get_input_directory()
    files = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
    return sorted(folder_paths.filter_files_content_types(files, ["video"]))
