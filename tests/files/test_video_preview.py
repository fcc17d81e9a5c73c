"""Previews of videos that browsers can't play: what becomes of one takes nothing from the video."""

import shutil
import subprocess

import pytest
import torch

from tests.files.clips import COLOURS, COUNT, FRAMES, SHAPE, by_ffmpeg, program, write
from wan_vae_parallel.files.ffmpeg import find_ffmpeg
from wan_vae_parallel.files.video import open_output


def test_what_browsers_can_not_play_gets_a_preview(tmp_path):
    for name in ("v.mkv", "p/%d.png"):
        write(tmp_path / name, format="ffv1" if name == "v.mkv" else None, preview=tmp_path / "preview.mp4")
        found = by_ffmpeg(tmp_path / "preview.mp4")
        assert found.shape == FRAMES[0].shape
        command = [find_ffmpeg(), "-i", str(tmp_path / "preview.mp4")]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        assert "yuv420p(tv, bt709, progressive)" in said  # of matrix, primaries and transfer
        for i, colour in enumerate(COLOURS):
            patch = found[:, 36:, i * 12 + 4 : i * 12 + 8].mean(dim=(0, 1, 2)) * 255
            assert (patch - torch.tensor(colour) * 255).abs().max() < 6


@pytest.mark.parametrize("name", ["v.mkv", "p/%d.png"])
@pytest.mark.parametrize(
    "fault",
    ["it does not start", "it ends in the middle", "it fails at the end", "its place goes", "no place", "no encoder"],
)
def test_a_preview_that_fails_is_told_and_the_video_stays(tmp_path, caplog, name, fault):
    expected, place, real = tmp_path / "expected", tmp_path / "place", find_ffmpeg()
    options = {"format": "ffv1"} if name == "v.mkv" else {}
    expected.mkdir()
    write(expected / name, **options)
    previewed = {
        "it does not start": 'case "$*" in *veryfast*) exit 3;; esac',
        "it ends in the middle": 'case "$*" in *veryfast*) head -c 100000 >/dev/null; kill -9 $$;; esac',
        "it fails at the end": f'case "$*" in *veryfast*) {real} "$@"; exit 3;; esac',
        "no encoder": 'case "$*" in *encoder=libx264) exit 0;; esac',
    }
    ffmpeg = program(tmp_path / "ffmpeg", f'{previewed.get(fault, "")}\nexec {real} "$@"')
    if fault != "no place":
        place.mkdir()
    (tmp_path / "made").mkdir()
    with open_output(
        tmp_path / "made" / name, shape=SHAPE, fps=16, preview=place / "preview.mp4", ffmpeg=ffmpeg, **options
    ) as put:
        put(FRAMES[:, :2])
        if fault == "its place goes":
            shutil.rmtree(place)
        put(FRAMES[:, 2:])
    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (expected, tmp_path / "made")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == (1 if name == "v.mkv" else COUNT)
    assert "preview.mp4 could not be made" in caplog.text
    assert not place.exists() or not list(place.iterdir())
