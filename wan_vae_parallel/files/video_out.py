"""Frames into videos and numbered pictures, through ffmpeg.

B videos, T frames, H x W pixels; frames come as bytes [B, t, n] in the format's pixels
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from ..errors import OutputError, about_file
from ..ops.pixel_format import PixelFormat
from .audio import Audio, audio_channels, audio_filter, audio_input, encoders_layouts, write_samples
from .ffmpeg import FedProcess, check_encoder, complaints, describe_video, find_ffmpeg, run
from .formats import FileFormat
from .pictures import add_texts
from .settings import Check, OutputSettings, no_check
from .whole import check_writable, readable_as_usual, replacing, unfinished_folder

logger = logging.getLogger(__name__)

Write = Callable[[torch.Tensor], None]

# The longer side of a preview.
_PREVIEW_PIXELS = 960
# To YUV of BT.709 in limited range, and its tags: ffmpeg prefers what the frames bring along to what is asked for.
_AS_BT709 = "out_color_matrix=bt709:out_range=tv,format={},setparams=color_primaries=bt709:color_trc=bt709"
_TO_BT709 = _AS_BT709.format("yuv420p")
_TAGS = (
    *("-color_range", "tv", "-colorspace", "bt709"),
    *("-color_primaries", "bt709", "-color_trc", "bt709"),
)
# What a file with sound has beside it, chapters and texts of its streams: none of it is the video's.
_NOTHING_ELSE = ("-map_chapters", "-1", "-map_metadata:s", "-1", "-disposition:a", "default")
# What ffmpeg reads as a MOV's or MP4's texts and is none: each copy would have it once more.
_NOT_TEXTS = tuple(
    word for name in ("major_brand", "minor_version", "compatible_brands") for word in ("-metadata", f"{name}=")
)
# As what a video is encoded again.
_H264 = (
    *("-c:v", "libx264", "-preset", "faster", "-crf", "13"),
    *("-c:a", "aac", "-movflags", "+faststart+use_metadata_tags", "-f", "mp4"),
)
_LOSSLESS = ("-c:v", "ffv1", "-level", "3", "-c:a", "copy", "-f", "matroska")
# Threads of an encoder, at most, and the pixels of a frame beyond which it is half of them.
_THREADS, _LARGE_PIXELS = 12, 1920 * 1088
_FULL = re.compile(r"No space left|File too large|quota|Disk full", re.IGNORECASE)


class VideoOutput:
    """Files that ffmpeg writes.

    Args:
        files: one a video; of pictures all.
        chosen: the format.
        shape: ``[B, T, H, W, C]`` of all frames.
        settings: the rest.
        check: called several times a second while ffmpeg tries it out; what it raises ends that.

    Attributes:
        pixels: what frames come as.
        files: the final names.

    Raises:
        OutputError: it can't be written so.
    """

    def __init__(
        self,
        files: Sequence[Path],
        chosen: FileFormat,
        shape: Sequence[int],
        settings: OutputSettings,
        check: Check = no_check,
    ):
        self.files = list(files)
        self._format = chosen
        self._settings = settings
        self._batch, self._total, self._height, self._width, colours = shape
        self.pixels: PixelFormat = chosen.of_colours(colours)
        self._quality = chosen.quality_arguments(settings.quality)
        chosen.check_size(self._width, self._height)
        suffix = self.files[0].suffix.lower()
        self._audio_encoder = chosen.audio.get(suffix, ())
        if settings.audio is not None and not self._audio_encoder:
            raise OutputError(f"{chosen.title} can't hold sound; choose a video's format, or leave the audio away")
        self._program = find_ffmpeg(settings.ffmpeg)
        check_encoder(self._program, chosen.encoder, self.pixels.name)
        if settings.audio is not None:
            check_encoder(self._program, self._audio_encoder[1])
            channels = audio_channels(settings.audio, self._program)
            self._audio_layouts = encoders_layouts(channels, self._audio_encoder[1])
        self._preview = self._planned_preview()
        self._try(check)

    @contextlib.contextmanager
    def open(self, check: Check) -> Iterator[Write]:
        """Starts writing; gives a function to call with each step's bytes ``[B, t, n]``.

        Nothing is there under its final name before all of it is written.

        Args:
            check: called several times a second while ffmpeg is waited for; what it raises ends the writing.

        Raises:
            OutputError: it can't be written, or not all frames came.
        """
        with self._told():
            yield from self._open(check)

    def _open(self, check: Check) -> Iterator[Write]:
        with contextlib.ExitStack() as stack:
            temporaries = [stack.enter_context(replacing(file)) for file in self.files]
            outputs = [self._muxed(temporary) for temporary in temporaries]
            yield from self._fed(outputs, temporaries[0].parent, stack, check)

    def _fed(
        self, outputs: Sequence[list[str]], folder: Path, stack: contextlib.ExitStack, check: Check
    ) -> Iterator[Write]:
        """Feeds a process for each of ``outputs``; texts and samples for them go to ``folder``."""
        inputs = self._side_inputs(folder)
        frames_each = self._batch * self._total // len(outputs)

        def begin(output: list[str]) -> FedProcess:
            process = FedProcess([*self._source("pipe:0"), *inputs, *output])
            stack.callback(process.close)
            return process

        def end(process: FedProcess) -> None:
            written = process.finish(check)
            if written != frames_each:
                raise OSError(f"ffmpeg wrote {written} of {frames_each} frames {process.said}")

        preview: _Preview | None = None
        if self._preview is not None:
            command = [*self._source("pipe:0"), *inputs, *self._previewed()]
            preview = stack.enter_context(contextlib.closing(_Preview(self._preview, command)))
        # Files of a single frame are written one after the other: a batch of hundreds would start as many processes.
        at_once = self._total > 1 or len(outputs) == 1
        processes = [begin(output) for output in outputs] if at_once else []
        done = 0

        def write(data: torch.Tensor) -> None:
            nonlocal done
            for number, frames in enumerate(self._streams(data, done)):
                own = frames.clone()  # the caller's memory is used again
                with self._told():
                    process = processes[number] if at_once else begin(outputs[number])
                    process.put(own, check)
                    if not at_once:
                        end(process)
                        process.close()
                if preview and number == 0:
                    preview.put(own[: data.shape[1]], check)
            done += data.shape[1]

        yield write
        if done != self._total:
            raise OutputError(
                about_file(self._path, f"would have {done} of {self._total} frames, so it is not written")
            )
        for process in processes:
            with self._told():
                end(process)
        if preview:
            preview.finish(check)

    def _streams(self, data: torch.Tensor, _: int) -> Sequence[torch.Tensor]:
        """What of a step's ``[B, t, n]`` each process gets, ``[t, n]``, given how many frames came before."""
        return list(data)

    @property
    def _path(self) -> Path:
        return self.files[0]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within it, what the system or ffmpeg refuses is told of the file."""
        try:
            yield
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            way = "free some room or choose another place" if _FULL.search(str(error)) else "nothing was left of it"
            raise OutputError(about_file(self._path, f"could not be written; {way}", error)) from error

    def _source(self, source: str) -> list[str]:
        """The program, and frames as its first input."""
        return [
            self._program, "-y", "-nostdin", "-hide_banner", "-nostats", "-v", "level+error", "-progress", "pipe:1",
            "-f", "rawvideo", "-pixel_format", self.pixels.name, "-video_size", f"{self._width}x{self._height}",
            "-framerate", str(self._settings.rate), *self._tags, "-i", source,
        ]  # fmt: skip

    @property
    def _tags(self) -> list[str]:
        return [word for name, value in self._format.tags.items() for word in (f"-{name}", value)]

    @property
    def _threads(self) -> int:
        """Of the encoder. Each of x264's holds frames: at 720p it takes 0.3 GB with 12, 0.6 with 32, 1.3 with 128.

        Encoders that work side by side, of a batch's videos, share them.
        """
        most = _THREADS if self._width * self._height <= _LARGE_PIXELS else _THREADS // 2
        at_once = len(self.files) if self._total > 1 and not self._format.pictures else 1
        return max(1, min(most, os.cpu_count() or 1) // at_once)

    @property
    def _seconds(self) -> Fraction:
        return self._total / self._settings.rate

    def _side_inputs(self, folder: Path) -> list[str]:
        """Sound and texts as further inputs."""
        inputs, audio = [], self._settings.audio
        if audio is not None:
            samples = folder / "audio.f32"
            if isinstance(audio, Audio):
                write_samples(audio, self._seconds, samples)
            inputs += audio_input(audio, str(samples))
        if self._settings.metadata and not self._format.pictures:
            # By a file: a workflow is longer than an argument may be.
            texts = folder / "texts.ffmetadata"
            escaped = [
                "=".join(re.sub(r"([=;#\\\n])", r"\\\1", word) for word in pair)
                for pair in self._settings.metadata.items()
            ]
            texts.write_text("\n".join([";FFMETADATA1", *escaped, ""]), encoding="utf-8")
            inputs += ["-f", "ffmetadata", "-i", f"file:{texts}"]
        return inputs

    def _encoded(self, seconds: Fraction) -> list[str]:
        """How streams are encoded."""
        chosen = self._format
        arguments = [
            "-map", "0:v:0", "-c:v", chosen.encoder, "-threads", str(self._threads), "-pix_fmt", self.pixels.name,
            *chosen.encoder_arguments(self.pixels, self._width, self._height), *self._quality, *self._tags,
        ]  # fmt: skip
        if self.pixels.halved_columns:
            arguments += ["-chroma_sample_location", "left"]
        if self._settings.audio is not None:
            arguments += ["-map", "1:a:0", "-af", audio_filter(seconds, self._audio_layouts), *self._audio_encoder]
        return arguments

    def _muxed(self, path: Path) -> list[str]:
        arguments = self._encoded(self._seconds)
        if self._settings.metadata:
            arguments += ["-map_metadata", str(1 + (self._settings.audio is not None))]
        else:
            arguments += ["-map_metadata", "-1"]
        arguments += _NOTHING_ELSE
        if path.suffix.lower() in (".mp4", ".mov"):
            arguments += ["-movflags", "+faststart+use_metadata_tags"]
        # Without a random number in the file: the same frames are the same bytes.
        return [*arguments, "-fflags", "+bitexact", f"file:{path}"]

    def _planned_preview(self) -> Path | None:
        """Where a preview goes, if one is wanted and can be made."""
        preview = self._settings.preview
        if preview is None:
            return None
        try:
            check_writable(preview)
            check_encoder(self._program, "libx264", "yuv420p")
        except OutputError as error:
            _say_no_preview(preview, error)
            return None
        return preview

    def _previewed(self) -> list[str]:
        """How a preview is encoded."""
        scale = min(1.0, _PREVIEW_PIXELS / max(self._width, self._height))
        width, height = (max(2, round(side * scale / 2) * 2) for side in (self._width, self._height))
        arguments = [
            *("-map", "0:v:0", "-vf", f"scale={width}:{height}:{_TO_BT709}"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-threads", "4"),
            *_TAGS,
        ]
        if self._settings.audio is not None:
            arguments += ["-map", "1:a:0", "-af", audio_filter(self._seconds, "mono|stereo"), "-c:a", "aac"]
        return [*arguments, "-map_metadata", "-1", *_NOTHING_ELSE, "-movflags", "+faststart", "-f", "mp4"]

    def _try(self, check: Check) -> None:
        """Has ffmpeg encode one black frame to nowhere: what it can't do is known before a decode."""
        audio, one = self._settings.audio, 1 / self._settings.rate
        # Of zeros: the frame, and a sample of each channel.
        sizes = {"frame": self.pixels.frame_bytes(self._height, self._width)}
        if isinstance(audio, Audio):
            sizes["samples"] = 4 * audio.waveform.shape[0]
        sound = [] if audio is None else audio_input(audio, "@/samples")
        changed = audio.stat().st_mtime_ns if isinstance(audio, Path) else 0
        large = self._width * self._height > _LARGE_PIXELS
        command = (
            *(*self._source("file:@/frame"), *sound, *self._encoded(one)),
            *(self._format.trial_arguments if large else ()),
        )
        try:
            _try_once(command, tuple(sizes.items()), changed, check)
        except _CanNotEncode as reason:
            if isinstance(audio, Path):
                self._try_sound(audio, check)
            raise OutputError(
                about_file(
                    self._path,
                    f"can't be written as {self._format.title}, {self._width}x{self._height}"
                    f"{' with sound' if audio is not None else ''}; choose another format or ffmpeg"
                    f"{', or mix the sound to 5.1 or stereo' if 'channel layout' in str(reason) else ''}",
                    f"ffmpeg says {reason}",
                )
            ) from None
        except OSError as error:
            raise OutputError(
                f"ffmpeg can't be tried out, as the folder for temporary files can't be used ({error}); free some "
                f"room there, or name another by TMPDIR"
            ) from error

    def _try_sound(self, audio: Path, check: Check) -> None:
        """Raises `OutputError` if it is the file with sound that ffmpeg can't read."""
        read = ("-i", f"file:{audio}", "-map", "0:a:0", "-t", "0.1", "-f", "null", "-")
        if said := _run(self._program, *read, check=check):
            raise OutputError(
                about_file(
                    audio,
                    "has no sound that ffmpeg can read; name a file with sound, or leave the audio away",
                    f"ffmpeg says {said}",
                )
            )


class _Preview:
    """A small video beside another one, from which it takes nothing: what keeps it from being made is only said.

    Args:
        path: where it goes.
        command: of the ffmpeg that makes it, up to its name.
    """

    def __init__(self, path: Path, command: Sequence[str]) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._process: FedProcess | None = None
        with self._tried():
            folder = self._stack.enter_context(unfinished_folder(path.parent, path.name))
            self._temporary = folder / path.name
            self._process = FedProcess([*command, f"file:{self._temporary}"])
            self._stack.callback(self._process.close)

    def put(self, frames: torch.Tensor, check: Check) -> None:
        """Hands over bytes, see `FedProcess.put`."""
        with self._tried():
            if self._process:
                self._process.put(frames, check)

    def finish(self, check: Check) -> None:
        """Waits until it is there."""
        with self._tried():
            if self._process:
                self._process.finish(check)
                readable_as_usual(self._temporary)
                self._temporary.replace(self._path)

    def close(self) -> None:
        """Ends the process, and removes what it has begun."""
        self._stack.close()

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._process = None
            _say_no_preview(self._path, error)


def _say_no_preview(path: Path, error: OSError) -> None:
    logger.warning("the preview %s could not be made (%s); the video itself needs none", path, error)


class PictureOutput(VideoOutput):
    """Numbered pictures, one video's after the other's; the arguments are `VideoOutput`'s.

    Args:
        later: pictures of the same name with higher numbers than the new ones.
    """

    def __init__(
        self,
        files: Sequence[Path],
        chosen: FileFormat,
        shape: Sequence[int],
        settings: OutputSettings,
        later: Sequence[Path],
        check: Check = no_check,
    ):
        super().__init__(files, chosen, shape, settings, check)
        self._later = later
        self._order: list[int] = []

    def _streams(self, data: torch.Tensor, done: int) -> Sequence[torch.Tensor]:
        # One process for all videos' pictures, whose numbers are noted as they come.
        batch, count = data.shape[:2]
        self._order += [video * self._total + done + frame for video in range(batch) for frame in range(count)]
        return [data.flatten(0, 1)]

    def _open(self, check: Check) -> Iterator[Write]:
        parent = self.files[0].parent
        made = not parent.exists()
        parent.mkdir(exist_ok=True)
        moved: list[Path] = []
        older: dict[Path, Path] = {}
        try:
            # Beside the final place, so that moving them there is only a new name.
            with unfinished_folder(parent, "frames") as folder, contextlib.ExitStack() as stack:
                pattern = str(folder).replace("%", "%%")
                output = [
                    *(*self._encoded(self._seconds), "-fflags", "+bitexact", "-f", "image2"),
                    *("-start_number", "0", f"{pattern}/made %d.png"),
                ]
                yield from self._fed([output], folder, stack, check)
                for made_as, number in enumerate(self._order):
                    (folder / f"made {made_as}.png").replace(folder / f"{number}.png")
                for number in range(len(self.files)):
                    check()
                    if self._settings.metadata:
                        add_texts(folder / f"{number}.png", self._settings.metadata)
                try:
                    # New names alone, which take no time. Older pictures wait in the folder, and go with it.
                    for number, file in enumerate((*self.files, *self._later)):
                        if file.is_file():
                            file.replace(folder / f"older {number}.png")
                            older[file] = folder / f"older {number}.png"
                        if number < len(self.files):
                            (folder / f"{number}.png").replace(file)
                            moved.append(file)
                except BaseException:
                    for file in moved:  # not all of them: none
                        file.unlink(missing_ok=True)
                    for file, picture in older.items():
                        picture.replace(file)
                    raise
        finally:
            if made and not any(parent.iterdir()):
                parent.rmdir()


def pictures_as_video(pattern: Path, path: Path, settings: OutputSettings, check: Check = no_check) -> None:
    """Puts numbered PNG pictures into a Matroska video as they are: the same bytes, with a rate.

    What ``check``, called several times a second, raises ends it.

    Raises:
        OutputError: it can't be written.
    """
    with replacing(path) as temporary:
        said = _run(
            find_ffmpeg(settings.ffmpeg),
            *("-f", "image2", "-framerate", str(settings.rate), "-start_number", "0"),
            *(
                "-i",
                str(pattern.parent.absolute()).replace("%", "%%") + f"/{pattern.name}",
                "-c",
                "copy",
                "-f",
                "matroska",
            ),
            f"file:{temporary}",
            check=check,
        )
        if said:
            raise OutputError(
                about_file(path, f"could not be written (ffmpeg: {said}); free some room or choose another place")
            )


def encode_again(path: Path, into: Path, check: Check = no_check, *, lossless: bool = False) -> None:
    """Encodes a video of any format as H.264 in MP4, with BT.709's colours and its tags; sound becomes AAC.

    ``lossless``: as FFV1 of 10 bits in Matroska, for whoever encodes it once more; sound stays what it is. What
    ``check``, called several times a second, raises ends it.

    Raises:
        OutputError: it can't be read or written.
    """
    with replacing(into) as temporary:
        said = _run(
            find_ffmpeg(),
            *("-i", f"file:{path}", "-map", "0:v:0", "-map", "0:a:0?", "-map_metadata", "0", *_NOTHING_ELSE),
            *_NOT_TEXTS,
            *("-vf", f"scale={_AS_BT709.format('yuv420p10le') if lossless else _TO_BT709}", *_TAGS),
            *(_LOSSLESS if lossless else _H264),
            f"file:{temporary}",
            check=check,
        )
        if said:
            way = "free some room" if _FULL.search(said) else "the file itself is whole: take that"
            name = "FFV1" if lossless else "H.264"
            raise OutputError(about_file(path, f"could not be encoded again as {name}; {way}", f"ffmpeg says {said}"))


def tag_as_hvc1(path: Path, check: Check = no_check) -> bool:
    """Gives H.265 in an MP4 or MOV file that is tagged hev1 the tag hvc1, as our own files have; whether it was hev1.

    The streams stay what they are: their parameters lie in the file's header, as those of copies of our files do. What
    ``check``, called several times a second, raises ends it.

    Raises:
        OutputError: it can't be written; the file is as it was.
    """
    program = find_ffmpeg()
    if describe_video(program, path).tag != "hev1":
        return False
    kind = "mov" if path.suffix.lower() == ".mov" else "mp4"
    _copy(program, path, "hvc1", "-tag:v", "hvc1", "-movflags", "+faststart+use_metadata_tags", "-f", kind, check=check)
    return True


def tag_as_alpha(path: Path, check: Check = no_check) -> bool:
    """Has a WebM or Matroska file of VP9 say that its frames have alpha, as ours do; whether it did not.

    A copy of the streams has the alpha, and no word of it. Otherwise as `tag_as_hvc1`.
    """
    program = find_ffmpeg()
    if describe_video(program, path).alpha:
        return False
    kind = "matroska" if path.suffix.lower() == ".mkv" else "webm"
    _copy(program, path, "one with alpha", "-metadata:s:v:0", "alpha_mode=1", "-f", kind, check=check)
    return True


def _copy(program: str, path: Path, name: str, *arguments: str, check: Check) -> None:
    """Replaces a file by a copy of its streams with other tags."""
    with replacing(path) as temporary:
        said = _run(
            program,
            *("-i", f"file:{path}", "-map", "0:v", "-map", "0:a?", "-c", "copy", "-map_metadata", "0"),
            *_NOT_TEXTS,
            *arguments,
            f"file:{temporary}",
            check=check,
        )
        if said:
            raise OutputError(about_file(path, f"could not be tagged as {name} (ffmpeg: {said}); free some room"))


def _run(program: str, *arguments: str, check: Check) -> str:
    """Runs an ffmpeg; if it failed, what it complains of."""
    code, said = run([program, "-y", "-nostdin", "-hide_banner", "-nostats", "-v", "level+error", *arguments], check)
    return (complaints(said) or f"nothing, and ended with code {code}") if code else ""


class _CanNotEncode(Exception):
    """What ffmpeg complains of."""


# What ffmpeg has encoded, by `_try_once`'s arguments.
_worked: dict[Hashable, None] = {}
_MOST_WORKED = 64


def _try_once(command: tuple[str, ...], sizes: tuple[tuple[str, int], ...], changed: int, check: Check) -> None:
    """Has ffmpeg encode a frame of zeros to nowhere; what worked is not tried again, what did not is.

    Args:
        command: without an output; ``file:@/name`` stands for a file of zeros.
        sizes: of these files, by name.
        changed: when a file that it reads was.
        check: called several times a second; what it raises ends it.
    """
    if (tried := (command, sizes, changed)) in _worked:
        return
    with tempfile.TemporaryDirectory(prefix="wan-vae-parallel-") as folder:
        for name, size in sizes:
            with (Path(folder) / name).open("wb") as file:
                file.truncate(size)
        (program, *arguments) = (word.replace("file:@/", f"file:{folder}/") for word in command)
        if said := _run(program, *arguments, "-f", "null", "-", check=check):
            raise _CanNotEncode(said)
    for oldest in list(_worked)[: len(_worked) + 1 - _MOST_WORKED]:
        _worked.pop(oldest, None)
    _worked[tried] = None
