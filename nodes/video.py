"""The nodes that go from latents straight to a video file, and from a file straight to latents."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types, io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..wan_vae_parallel.errors import ArgumentError, LatentError, OutputError
from ..wan_vae_parallel.files.audio import Audio
from ..wan_vae_parallel.files.formats import FORMATS, QUALITIES
from ..wan_vae_parallel.files.settings import OutputSettings
from ..wan_vae_parallel.files.video_out import encode_again, pictures_as_video, tag_as_hvc1
from ..wan_vae_parallel.to_video import VideoDecode
from .report import tell_work
from .schemas import _CATEGORY, _advanced, _chunk_input, _given, _parallel_vae, _vae_input
from .streams import decode_to_file, encode_file, latents_for_file, plan_file

logger = logging.getLogger(__name__)

# What the node calls the engine's formats, and the suffix of their files.
_FORMATS = {
    "MP4 H.264 8 bit": ("h264", ".mp4"),
    "MP4 H.265 10 bit": ("h265", ".mp4"),
    "WebM VP9 8 bit": ("vp9", ".webm"),
    "MOV ProRes 422 HQ 10 bit": ("prores", ".mov"),
    "MKV FFV1 lossless 16 bit": ("ffv1", ".mkv"),
    "PNG pictures 8 bit": ("png8", ""),
    "PNG pictures 16 bit": ("png16", ""),
}
# The names of pictures, in a folder of their own.
_PICTURE = "%05d.png"
_OWN_FFMPEG = "imageio-ffmpeg"
# Where core's VIDEO keeps the name of its file.
_CORES_FILE = "_VideoFromFile__file"
# What MP4 holds, which core's Save Video writes by default.
_IN_MP4 = ("h264", "h265", "vp9")


def _temporary() -> str:
    folder: str = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    return folder


class SavedVideo(InputImpl.VideoFromFile):
    """A file as core's VIDEO; what core's copies lack of it is added when it is saved.

    - Streams that MP4 can't hold are encoded again, as H.264.
    - H.265 in MP4 keeps the tag hvc1, without which Apple's players refuse it.

    Args:
        file: where it is.
        format: the engine's name of what is in it.
        options: core's.
    """

    def __init__(self, file: str, *, format: str, **options: Any) -> None:
        super().__init__(file, **options)
        self._format = format

    def save_to(
        self, path: Any, format: Any = Types.VideoContainer.AUTO, codec: Any = Types.VideoCodec.AUTO, **rest: Any
    ) -> Any:
        """As core's, and as the class says."""
        named = isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(".mp4")
        to_mp4 = named or format == Types.VideoContainer.MP4
        if not to_mp4 or self._format in _IN_MP4 or codec not in (Types.VideoCodec.AUTO, Types.VideoCodec.H264):
            result = super().save_to(path, format=format, codec=codec, **rest)
            if self._format == "h265":
                _tag_as_hvc1(path)
            return result
        # Not by core, whose colours would be those of other tags than it writes.
        with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
            encoded = Path(folder) / "encoded.mp4"
            encode_again(Path(self.get_stream_source()), encoded)
            copied = copy.copy(self)
            copied._format = "h264"
            setattr(copied, _CORES_FILE, str(encoded))
            return copied.save_to(path, format=format, codec=codec, **rest)

    def as_trimmed(self, *args: Any, **options: Any) -> Any:
        """As core's, of those versions that trim; a part of the file stays one of ours."""
        trimmed = super().as_trimmed(*args, **options)
        if type(trimmed) is InputImpl.VideoFromFile:
            trimmed.__class__, trimmed._format = SavedVideo, self._format
        return trimmed


def _tag_as_hvc1(path: Any) -> None:
    """`video_out.tag_as_hvc1` of what core has written, to a file or a buffer; what it can't do is only said."""
    try:
        _tag(path)
    except OutputError as error:
        logger.warning("Wan VAE Parallel: Apple's players may refuse this H.265 video: %s", error)


def _tag(path: Any) -> None:
    if isinstance(path, (str, os.PathLike)):
        tag_as_hvc1(Path(path))
        return
    with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
        copy_of_it = Path(folder) / "video"
        copy_of_it.write_bytes(path.getvalue())
        if tag_as_hvc1(copy_of_it):
            path.seek(0)
            path.truncate()
            path.write(copy_of_it.read_bytes())


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
                    options=list(_FORMATS),
                    default="MP4 H.264 8 bit",
                    tooltip=(
                        "What to write. Colours are BT.709 and tagged so. MKV FFV1 and PNG keep every pixel; ProRes is "
                        "for editing programs. 10 and 16 bits are made from the decoder's floats, not from 8."
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
                io.Schema, search_aliases=["vae decode video", "latent to video", "wan save video", "stream decode"]
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
        join: Sequence[bool] = (False,),
        crf: Sequence[int] = (-1,),
        normalized_latents: Sequence[bool] = (False,),
        ffmpeg: Sequence[str] = (_OWN_FFMPEG,),
    ) -> io.NodeOutput:
        wan = _parallel_vae(vae[0])
        read = [latents_for_file(wan, one, normalized=normalized_latents[0]) for one in samples]
        normalized = [one for latents, one in read for _ in latents]
        parts = [part for latents, _ in read for part in latents.split(1)]
        if join[0] and len(set(normalized)) > 1:
            raise LatentError(
                "some of the latents are normalised and some are not, so that they are no parts of one video; switch "
                "join off, or take them all from one kind of sampler"
            )
        videos = [parts] if join[0] else [[part] for part in parts]
        if not join[0] and format[0] in _FORMATS and FORMATS[_FORMATS[format[0]][0]].pictures:
            videos, normalized = _images_together(parts, normalized)
        sounds = _sounds(audio)
        since, frames, size = time.monotonic(), 0, (0, 0)
        # All of them before the first is decoded: nobody waits for some to hear of an error in another.
        planned: list[tuple[_Video, OutputSettings, VideoDecode]] = []
        for number, latents in enumerate(videos):
            size = height, width = wan._engine.architecture.frame_size(*latents[0].shape[-2:])
            taken = [path for made, _, _ in planned for path in made.paths]
            made = _Video(format[0], filename_prefix[0], saved=save[0], size=(width, height), taken=taken)
            settings = OutputSettings(
                fps=Fraction(fps[0]).limit_denominator(10**6),
                format=made.format,
                quality=quality[0] if crf[0] < 0 else crf[0],
                audio=sounds[min(number, len(sounds) - 1)] if sounds else None,
                metadata=cls._texts(),
                preview=made.preview,
                ffmpeg=None if ffmpeg[0] == _OWN_FFMPEG else "ffmpeg",
            )
            planned.append(
                (made, settings, plan_file(wan, latents, made.path, settings, normalized=normalized[number]))
            )
        results: list[SavedVideo | ExecutionBlocker] = []
        shown: list[ui.SavedResult] = []
        for number, (made, settings, decode) in enumerate(planned):
            files = decode_to_file(wan, decode, part=number, parts=len(planned))
            results.append(made.video(settings))
            shown += made.shown(files)
            frames += decode.shape[0] * wan._engine.architecture.frame_count(decode.shape[2])
        tell_work(frames, size, since, wan._engine.devices)
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


class _Video:
    """Where a video goes, and what ComfyUI hears of it.

    Args:
        title: of the format.
        prefix: of its name, as the user wrote it.
        saved: in the output folder; else in the temporary one.
        size: width and height.
        taken: names that other videos will have, which are not there yet.
    """

    def __init__(self, title: str, prefix: str, *, saved: bool, size: tuple[int, int], taken: Sequence[Path]) -> None:
        if title not in _FORMATS:
            raise ArgumentError(f"format is {title!r}; it must be one of {', '.join(_FORMATS)}")
        self.format, suffix = _FORMATS[title]
        kind = io.FolderType.output if saved else io.FolderType.temp
        root = folder_paths.get_output_directory() if saved else folder_paths.get_temp_directory()
        temporary = folder_paths.get_temp_directory()
        chosen = FORMATS[self.format]
        self.path, subfolder = _place(prefix, root, suffix or f"/{_PICTURE}", taken, size)
        self._saved = saved
        self._shown = ui.SavedResult(self.path.name, subfolder, kind)
        # Pictures that were saved are shown as Save Image does, by themselves.
        self._pictures = os.path.join(subfolder, self.path.parent.name) if chosen.pictures and saved else None
        self.preview: Path | None = None
        if not chosen.browsers and self._pictures is None:
            self.preview, subfolder = _place("wan_vae_preview", temporary, ".mp4", taken)
            self._previewed = ui.SavedResult(self.preview.name, subfolder, io.FolderType.temp)
        self._together: Path | None = None
        if chosen.pictures:
            self._together, _ = _place("wan_vae_pictures", temporary, ".mkv", taken)

    @property
    def plays(self) -> bool:
        """Whether the node shows a video, and not pictures."""
        return self._pictures is None

    @property
    def paths(self) -> list[Path]:
        """All names that it will have."""
        return [path for path in (self.path, self.preview, self._together) if path is not None]

    def shown(self, files: Sequence[Path]) -> list[ui.SavedResult]:
        """What the node shows: first what browsers play, and of what was saved all ``files``."""
        if self._pictures is not None:
            return [ui.SavedResult(file.name, self._pictures, io.FolderType.output) for file in files]
        if self.preview is None:
            return [self._shown]
        # A preview that failed is not there, and the log has said why.
        previews = [self._previewed] if self.preview.is_file() else []
        return [*previews, self._shown] if self._saved else previews

    def video(self, settings: OutputSettings) -> SavedVideo | ExecutionBlocker:
        """The VIDEO; of pictures a temporary one that holds them as they are, without which they stay what they are."""
        if self._together is None:
            return SavedVideo(str(self.path), format=self.format)
        try:
            pictures_as_video(self.path, self._together, settings)
        except OutputError as error:
            logger.warning("Wan VAE Parallel: the pictures in %s make no VIDEO: %s", self.path.parent, error)
            return ExecutionBlocker(f"the pictures in {self.path.parent} are whole, but make no VIDEO: {error}")
        return SavedVideo(str(self._together), format=self.format)


def _place(
    prefix: str, root: str, suffix: str, taken: Sequence[Path], size: tuple[int, int] = (0, 0)
) -> tuple[Path, str]:
    """A new file below ``root``, numbered as ComfyUI does, and the subfolder that it is in."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, *size)
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}") in taken:
        counter += 1
    return path, subfolder


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
        return os.path.getmtime(folder_paths.get_annotated_filepath(file)) if file else None

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """A file that is not there is told before the graph runs."""
        if file is None or folder_paths.exists_annotated_filepath(file):
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
