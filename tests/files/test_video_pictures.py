"""Pictures of a video: of a batch, and beside those of an older one."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.files.clips import COUNT, FRAMES, HEIGHT, WIDTH, by_ffmpeg, write
from wan_vae_parallel import OutputError
from wan_vae_parallel.files.ffmpeg import FedProcess
from wan_vae_parallel.files.settings import OutputSettings
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.files.video_out import pictures_as_video


def test_pictures_of_16_bits_are_equal_to_rounding(tmp_path):
    frames = torch.rand(2, 3, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "%03d.png", frames, format="png16", metadata={"prompt": '{"a": 1}', "wörd": "日本"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:03d}.png" for i in range(6)]
    assert Image.open(tmp_path / "005.png").text["prompt"] == '{"a": 1}'
    assert Image.open(tmp_path / "005.png").text["wörd"] == "日本"
    for index in (0, 5):
        found = by_ffmpeg(tmp_path / f"{index:03d}.png")[0]
        assert (found - frames.flatten(0, 1)[index]).abs().max() <= 0.5 / 65535 + 1e-7


@pytest.fixture
def processes(monkeypatch):
    """How many ffmpegs were fed, and how many at a time at the most."""
    alive, counts = set(), {"all": 0, "at once": 0}
    begin, close = FedProcess.__init__, FedProcess.close

    def begun(self, command):
        begin(self, command)
        alive.add(self)
        counts["all"] += 1
        counts["at once"] = max(counts["at once"], len(alive))

    def closed(self):
        close(self)
        alive.discard(self)

    monkeypatch.setattr(FedProcess, "__init__", begun)
    monkeypatch.setattr(FedProcess, "close", closed)
    return counts


@pytest.mark.parametrize("frames", [1, 3])
def test_one_process_writes_all_pictures_of_a_batch_each_as_by_itself(tmp_path, processes, frames):
    batch = torch.rand(12, frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    (tmp_path / "all").mkdir()
    write(tmp_path / "all" / "%d.png", batch, format="png16", metadata={"prompt": "p"})
    assert processes == {"all": 1, "at once": 1}
    for video in (0, 5, 11):
        alone = tmp_path / f"{video}"
        alone.mkdir()
        write(alone / "%d.png", batch[video : video + 1], format="png16", metadata={"prompt": "p"})
        for frame in range(frames):
            together = (tmp_path / "all" / f"{video * frames + frame}.png").read_bytes()
            assert together == (alone / f"{frame}.png").read_bytes()


def test_videos_of_one_frame_are_encoded_one_after_the_other(tmp_path, processes):
    batch = torch.rand(6, 1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "v.mkv", batch, format="ffv1")
    assert processes == {"all": 6, "at once": 1}
    for video in range(6):
        found = by_ffmpeg(tmp_path / f"v_{video + 1}.mkv")
        assert (found - batch[video]).abs().max() <= 0.5 / 65535 + 1e-7


def test_an_older_longer_videos_pictures_are_refused_or_cleared(tmp_path):
    pattern = tmp_path / "f_%03d.png"
    write(pattern, FRAMES)
    others = ["f_abc.png", "f_7.png", "g_009.png", "f_004.txt"]
    for name in others:
        (tmp_path / name).touch()
    short = FRAMES[:, :3]
    with pytest.raises(OutputError, match=r"f_003.png to f_004.png of an older video, .* 3 new pictures"):
        write(pattern, short)
    assert len(list(tmp_path.iterdir())) == 9
    write(pattern, short, old_pictures="clear")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, *(f"f_00{i}.png" for i in range(3))])
    write(pattern, short)  # as many: they are written over


def test_a_video_that_is_not_finished_clears_nothing(tmp_path):
    write(tmp_path / "%d.png", FRAMES)
    with (
        pytest.raises(OutputError, match="1 of 3 frames"),
        open_output(tmp_path / "%d.png", shape=FRAMES[:, :3].shape, fps=16, old_pictures="clear") as put,
    ):
        put(FRAMES[:, :1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(5)]


def test_older_pictures_come_back_if_the_new_ones_can_not_take_their_names(tmp_path, monkeypatch):
    write(tmp_path / "%d.png", FRAMES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, count = Path.replace, []

    def replace(path, target):
        count.append(target)
        if len(count) == 4:
            raise OSError(5, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match="Input/output error"):
            write(tmp_path / "%d.png", FRAMES[:, :3].flip(1), old_pictures="clear")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("folder", ["-x", "a:b", "concat:a|b", "50%d", "a b*[c]?"])
def test_the_folders_name_is_nothing_but_a_name(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    write(Path(folder) / "%d.png")
    assert len(list((tmp_path / folder).iterdir())) == COUNT
    pictures_as_video(Path(folder) / "%d.png", tmp_path / "v.mkv", OutputSettings())
    assert by_ffmpeg(tmp_path / "v.mkv").shape == FRAMES[0].shape
