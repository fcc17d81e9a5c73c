"""Decodes in a process group that somebody else made: ranks of a launcher, and torchrun's over two nodes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from tests.parallel import launch
from tests.processes import gone, patience, wait_until
from wan_vae_parallel.cli import main
from wan_vae_parallel.files.latents import read_latents, save_latents
from wan_vae_parallel.files.video import open_output
from wan_vae_parallel.files.video_in import VideoInput
from wan_vae_parallel.ops.kernels import tiles
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured
from wan_vae_parallel.ops.pixel_format import YUV420
from wan_vae_parallel.parallel.coordination import Coordinator
from wan_vae_parallel.runtime import tuning

ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with launch.Ranks(4, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def latents_of(rows, columns, seed=1):
    return torch.randn((1, 16, 4, rows, columns), generator=torch.Generator().manual_seed(seed))


def alone(path, latents):
    with wvp.load_vae(path, devices="cpu", chunk=1) as vae:
        return vae.decode(latents)


def _decode(_rank, _world, path, latents, chunk):
    with wvp.load_vae(path, chunk=chunk, group=launch.group()) as vae:
        assert [str(device) for device in vae.devices] == ["cpu"]
        return vae.decode(latents), vae.device_names


@pytest.mark.parametrize(
    ("rows", "columns", "members", "chunk"),
    [
        pytest.param(5, 4, 4, 1, marks=pytest.mark.slow),  # rows that don't divide
        (2, 7, 4, 2),  # columns
        (1, 3, 4, "auto"),  # a rank without any
        (3, 2, (1, 3), 1),  # a group that does not begin at global rank 0
        (3, 2, (2,), 1),  # a group of one
    ],
)
def test_the_first_rank_gets_the_frames_of_one_device(ranks, path, rows, columns, members, chunk):
    latents = latents_of(rows, columns)
    (frames, names), *others = ranks.run(_decode, path, latents, chunk, members=members)
    torch.testing.assert_close(frames, alone(path, latents), **CLOSE)
    assert all(theirs.shape == (1, 0, *frames.shape[2:]) for theirs, _ in others)
    assert names == (f"{socket.gethostname()}/cpu",) * (1 + len(others))


def _steps_to_an_encoder(rank, _world, path, latents):
    # Only the first rank knows what becomes of the frames.
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        patch.setattr("wan_vae_parallel.memory._HANDED_ON_PIXELS", 24 * 16)
        pixels = list(vae.pixel_stream(latents, None if rank else YUV420))
        return [len(part[0]) for part in pixels], [len(part[0]) for part in vae.decode_stream(latents)]


def test_steps_are_small_where_an_encoder_takes_the_frames(ranks, path):
    (pixels, floats), *_ = ranks.run(_steps_to_an_encoder, path, latents_of(3, 2))
    assert sum(pixels) == sum(floats) == 13
    assert max(pixels) < max(floats)


def _decode_to_files_with_alpha(_rank, _world, path, latents, folder):
    with wvp.load_vae(path, chunk=1, group=launch.group()) as vae, wvp.load_vae(path, group=launch.group()) as alpha:
        for name in ("v.mkv", "v.safetensors"):
            format = "ffv1" if name == "v.mkv" else None
            files = vae.decode_to_video(latents, folder / name, format=format, vae_alpha=alpha)
        return files


def test_the_first_rank_writes_what_two_vaes_make(ranks, path, tmp_path):
    latents = latents_of(3, 2)
    written, *others = ranks.run(_decode_to_files_with_alpha, path, latents, tmp_path)
    assert written == [tmp_path / "v.safetensors"]
    assert others == [[]] * 3
    frames = alone(path, latents)
    expected = torch.cat([frames, frames[..., :1]], dim=-1)
    torch.testing.assert_close(load_file(tmp_path / "v.safetensors")["frames"], expected, **CLOSE)
    with VideoInput(tmp_path / "v.mkv", colours=4) as video:
        torch.testing.assert_close(torch.cat(list(video)), expected[0], atol=2e-5, rtol=0)
    assert len(list(tmp_path.iterdir())) == 2


def _encode(_rank, _world, path, video):
    with wvp.load_vae(path, chunk=2, group=launch.group()) as vae:
        latents = vae.encode(video)
        parts = list(vae.encode_stream(video[0].split(4)))
        # Those without latents get nothing, as of a decode.
        decoded = vae.decode(wvp.demo_latents(vae.architecture, frames=2, rows=2, columns=2))
        return latents, torch.cat(parts, dim=2) if parts else None, decoded.shape[1]


@pytest.mark.parametrize(
    ("rows", "columns", "members"),
    [
        (5, 2, 4),  # rows that don't divide
        (2, 3, 4),  # columns; a rank without any
        (3, 2, (1, 3)),  # a group that does not begin at global rank 0
    ],
)
def test_the_first_rank_gets_the_latents_of_one_device(ranks, path, rows, columns, members):
    video = torch.rand((2, 9, 8 * rows, 8 * columns, 3), generator=torch.Generator().manual_seed(5))
    video[:, 1:8] = video[:, 1:2]
    with wvp.load_vae(path, devices="cpu", chunk=2) as vae:
        expected = vae.encode(video)
    (latents, parts, decoded), *others = ranks.run(_encode, path, video, members=members)
    torch.testing.assert_close(latents, expected, **CLOSE)
    torch.testing.assert_close(parts, expected[:1], **CLOSE)
    assert decoded == 5
    for theirs, none, nothing in others:
        assert theirs.shape == (2, 16, 0, rows, columns)
        assert (none, nothing) == (None, 0)


def _other_frames(rank, _world, path, video, what):
    if rank == 1:
        video = video[:, :5] if what == "frames" else video + 0.1
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        patch.setattr("wan_vae_parallel.parallel.coordination.WORD_SECONDS", 1)
        with pytest.raises(wvp.WorkerError) as raised:
            vae.encode(video)
        return str(raised.value)


@pytest.mark.parametrize("what", ["frames", "pixels"])
def test_ranks_with_other_frames_say_so_all_of_them(ranks, path, what):
    for message in ranks.run(_other_frames, path, torch.rand(1, 9, 32, 16, 3), what):
        assert "ranks disagree on the frames" in message


def _encodes_after(rank, _world, path, video, what):
    """What goes wrong with an encode, and whether the group encodes afterwards."""
    with wvp.load_vae(path, chunk=1, group=launch.group()) as vae:
        expected = vae.encode(video)
        bad = video.clone()
        bad[0, 5, 30, 3, 0] = torch.nan  # in the last rank's rows
        reason = ""
        if what == "stop":
            try:
                vae.encode(torch.cat([video, video]), on_chunk=_raise if rank == 0 else None)
            except KeyError as error:
                reason = str(error)
        else:
            given = {"nan": bad[0].split(2), "size": [video[0, :5], video[0, :5, :16]], "source": _ends(video[0])}[what]
            with pytest.raises((wvp.FrameError, OSError)) as raised:
                list(vae.encode_stream(given))
            reason = str(raised.value)
        again = vae.encode(video)
        return reason, torch.equal(again, expected)


def _raise(*_):
    raise KeyError("enough")


def _ends(frames):
    yield frames[:5]
    raise OSError("the file ends here")


@pytest.mark.parametrize(
    ("what", "reason"),
    [("stop", "enough"), ("nan", "NaN or infinite"), ("size", "one size and dtype"), ("source", "the file ends here")],
)
def test_an_encode_that_ends_early_leaves_the_group_usable(ranks, path, what, reason):
    answers = ranks.run(_encodes_after, path, torch.rand(1, 9, 32, 8, 3), what)
    assert all(well for _, well in answers)
    for rank, (text, _) in enumerate(answers):
        assert reason in text or (what == "stop" and rank)


def _stop_early_and_decode(rank, _world, path, latents):
    with wvp.load_vae(path, chunk=1, group=launch.group()) as vae:
        seen = 0
        with contextlib.closing(vae.decode_stream(latents)) as stream:
            for frames in stream:
                seen += frames.shape[1]
                if rank == 0 and seen > 4:
                    break
        return seen, vae.decode(latents)


def test_the_first_rank_may_end_a_decode_for_all(ranks, path):
    latents = latents_of(4, 3)
    (seen, frames), *others = ranks.run(_stop_early_and_decode, path, latents)
    assert seen == 5
    assert [theirs for theirs, _ in others] == [0, 0, 0]
    torch.testing.assert_close(frames, alone(path, latents), **CLOSE)


def _tunes(rank, _world, folder):
    models = ["A", "B", "B", ""]
    wide, narrow = (LayerKind("conv", channels, channels, (3, 3, 3)) for channels in (384, 96))
    asked = []

    def measure(kinds, _dtype, device):
        asked.append(rank)
        return {
            kind: Measured(
                tuple(100.0 + i + rank for i, _ in enumerate(tiles.candidates(kind, device))),
                500.0 if (models[rank], kind) == ("B", narrow) else 50.0,
            )
            for kind in kinds
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{folder}/{rank}")  # as on hosts of their own
        patch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.measure", types.SimpleNamespace(measure=measure))
        patch.setattr(tuning, "_key", lambda *_: {"GPU": models[rank], "dtype": "bf16"} if models[rank] else {})
        patch.setattr(tiles, "_measured", {})
        given = tuning.tune([wide, narrow], torch.device("cpu"), torch.bfloat16, Coordinator(launch.group()))
        return sorted(map(str, given)), asked, [speed for pairs in tiles._measured.values() for _, speed in pairs]


def test_the_first_rank_of_each_gpu_model_measures_and_all_agree_on_cudnns_layers(ranks, tmp_path):
    given, asked, speeds = zip(*ranks.run(_tunes, tmp_path), strict=True)
    assert given == (["conv 3x3x3 96 to 96"],) * 4
    assert asked == ([0], [1], [], [])
    assert speeds[1] == speeds[2] != speeds[0]
    assert speeds[3] == []


def _fails(rank, _world, path, what):
    latents = latents_of(4, 3, seed=2 if what == "latents" and rank == 1 else 1)
    dtype = "float64" if what == "dtype" and rank == 1 else "float32"
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, dtype=dtype, group=launch.group()) as vae:
        patch.setattr("wan_vae_parallel.parallel.coordination.WORD_SECONDS", 1)
        with pytest.raises(wvp.WorkerError) as raised:
            vae.decode(latents)
        return str(raised.value)


@pytest.mark.parametrize("what", ["latents", "dtype"])
def test_ranks_that_disagree_say_so_all_of_them(ranks, path, what):
    for message in ranks.run(_fails, path, what):
        assert f"ranks disagree on the {what}: rank 0 has" in message
        assert "rank 1 has" in message


def _other_weights(rank, _world, paths):
    with pytest.raises(wvp.WorkerError) as raised, wvp.load_vae(paths[rank == 1], group=launch.group()) as vae:
        vae.decode(latents_of(4, 3))
    return str(raised.value)


def test_ranks_with_other_weights_say_so_all_of_them(ranks, path, tmp_path):
    tensors = load_file(path)
    wrong = tmp_path / "wrong.safetensors"
    tensors["decoder.conv1.bias"] += 1
    save_file(tensors, wrong)
    for message in ranks.run(_other_weights, (path, wrong)):
        assert "ranks disagree on the weights" in message


def _device_error(_rank, _world, path, devices):
    with pytest.raises(wvp.DeviceError) as raised:
        wvp.load_vae(path, devices=devices, group=launch.group())
    return str(raised.value)


@pytest.mark.parametrize(("devices", "message"), [("cpu,cpu", "each rank of a group has one"), ("cuda:9", "not there")])
def test_a_rank_has_one_device(ranks, path, devices, message):
    assert all(message in error for error in ranks.run(_device_error, path, devices))


def _short_of_memory(rank, _world, path):
    # As a GPU that is full would answer.
    room = "wan_vae_parallel.runtime.shard.ShardDecoder.room"
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        if rank == 2:
            patch.setattr(room, lambda *_: 0)
        with pytest.raises(wvp.OutOfMemoryError) as raised:
            vae.decode(latents_of(4, 3))
        patch.setattr(room, lambda *_: 2 if rank == 2 else 3)
        frames = vae.decode(latents_of(4, 3))
    return str(raised.value), frames


def test_a_rank_without_memory_is_an_error_on_all_and_less_memory_a_smaller_chunk(ranks, path):
    answers = ranks.run(_short_of_memory, path)
    assert all("has not the memory for its rows" in message for message, _ in answers)
    torch.testing.assert_close(answers[0][1], alone(path, latents_of(4, 3)), **CLOSE)


def _refuses(rank, _world, path):
    first, second = latents_of(4, 3, seed=1), latents_of(4, 3, seed=2)
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        if rank == 0:
            patch.setattr("wan_vae_parallel.memory.free_memory", lambda _: 0)
        with pytest.raises(wvp.WanVAEError) as raised:
            vae.decode(first)
        patch.undo()
        frames = vae.decode(second)
        # Again, and this time the first rank comes back with the same latents: nobody else has noticed.
        if rank == 0:
            patch.setattr("wan_vae_parallel.memory.free_memory", lambda _: 0)
            with pytest.raises(wvp.OutOfMemoryError):
                vae.decode(first)
            patch.undo()
        return type(raised.value), str(raised.value), frames, vae.decode(first)


def test_a_decode_that_the_first_rank_refuses_is_none_and_the_next_one_works(ranks, path):
    (kind, _, second, first), *others = ranks.run(_refuses, path)
    assert kind is wvp.OutOfMemoryError
    assert all(kind is wvp.WorkerError and "rank 0 refused this call" in message for kind, message, *_ in others)
    torch.testing.assert_close(first, alone(path, latents_of(4, 3, seed=1)), **CLOSE)
    torch.testing.assert_close(second, alone(path, latents_of(4, 3, seed=2)), **CLOSE)


def _fails_to_load(rank, _world, path):
    def damaged(*_):
        raise wvp.CheckpointError("it is damaged")

    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        if rank == 2:
            patch.setattr("wan_vae_parallel.runtime.group.ShardDecoder", damaged)
        with pytest.raises(wvp.WanVAEError) as raised:
            vae.decode(latents_of(4, 3))
        patch.undo()
        return f"{type(raised.value).__name__}: {raised.value}", vae.decode(latents_of(4, 3))


def test_a_rank_that_can_not_load_is_an_error_on_all_that_names_it(ranks, path):
    answers = ranks.run(_fails_to_load, path)
    named = f"WorkerError: rank 2 on {socket.gethostname()}/cpu: CheckpointError: it is damaged"
    assert [message for message, _ in answers] == [named, named, "CheckpointError: it is damaged", named]
    torch.testing.assert_close(answers[0][1], alone(path, latents_of(4, 3)), **CLOSE)


def _misses_one(rank, _world, path):
    message = ""
    with pytest.MonkeyPatch.context() as patch, wvp.load_vae(path, group=launch.group()) as vae:
        if rank == 3:
            time.sleep(2)
        else:
            patch.setattr("wan_vae_parallel.parallel.coordination.WORK_SECONDS", 1)
            with pytest.raises(wvp.WorkerError) as raised:
                vae.decode(latents_of(4, 3))
            message = str(raised.value)
            patch.undo()
        return message, vae.decode(latents_of(4, 3))


def test_ranks_that_say_nothing_are_named_and_may_come_to_the_next_decode(ranks, path):
    answers = ranks.run(_misses_one, path)
    assert all("rank 3 said nothing for 1 s" in message for message, _ in answers[:3])
    torch.testing.assert_close(answers[0][1], alone(path, latents_of(4, 3)), **CLOSE)


# torchrun.


def torchrun(folder, *arguments, nodes=2, ranks=2):
    """Two launches on this machine, as two machines would; returns exit codes and outputs."""
    with launches([folder] * nodes, *arguments, ranks=ranks) as started:
        return ends(started)


@contextlib.contextmanager
def launches(folders, *arguments, ranks=2, interfaces=("lo", "lo")):
    """A launch in each of ``folders``, as on a machine of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *f"--nnodes {len(folders)} --node-rank {node} --nproc-per-node {ranks}".split(),
                *f"--master-addr 127.0.0.1 --master-port {port} -m wan_vae_parallel".split(),
                *map(str, arguments),
            ],
            cwd=folder,
            env={**environment, "GLOO_SOCKET_IFNAME": interface},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, (folder, interface) in enumerate(zip(folders, interfaces, strict=False))
    ]
    try:
        yield started
    finally:
        for one in started:
            one.kill()


def ends(started, seconds=90):
    """Exit codes and outputs, which must be there in so many seconds."""
    deadline = time.monotonic() + patience(seconds)
    outputs = [one.communicate(timeout=max(1, deadline - time.monotonic()))[0] for one in started]
    return [one.returncode for one in started], outputs


def process_of(rank, launch):
    """The process that ``launch`` started as ``rank``."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            parent = entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(launch.pid) and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
    raise AssertionError(f"no rank {rank}")


def test_torchrun_on_two_nodes_decodes_one_video_and_the_first_rank_writes(path, tmp_path):
    latents = latents_of(4, 3)
    save_latents(tmp_path / "x.latent", latents)
    codes, outputs = torchrun(tmp_path, "decode", "x.latent", "--vae", path, "-o", "out.safetensors", "--chunk", 1)
    assert codes == [0, 0], outputs
    written = load_file(tmp_path / "out.safetensors")["frames"]
    torch.testing.assert_close(written, alone(path, latents), **CLOSE)
    place = f"{socket.gethostname()}/cpu"
    size = "x".join(str(8 * side) for side in latents.shape[:2:-1])
    assert f"decoded 13 frames of {size} on {place}: rows 0-0, {place}: rows 1-1, " in outputs[0]
    assert "decod" not in outputs[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "x.latent"]


@pytest.mark.slow
def test_torchrun_encodes_a_video_of_which_each_rank_reads_the_file(path, tmp_path):
    frames = torch.rand(1, 9, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with open_output(tmp_path / "%d.png", shape=frames.shape, fps=16.0) as write:
        write(frames)
    codes, outputs = torchrun(
        tmp_path, "encode", "%d.png", "--vae", path, "-o", "o.latent", "--frames", 6, nodes=1, ranks=2
    )
    assert codes == [0], outputs
    with wvp.load_vae(path, devices="cpu") as vae:
        expected = vae.encode((frames[:, :6] * 255).round() / 255)
    torch.testing.assert_close(read_latents(tmp_path / "o.latent"), expected, **CLOSE)
    place = f"{socket.gethostname()}/cpu"
    assert f"on {place}: rows 0-1, {place}: rows 2-3, " in outputs[0]
    assert outputs[0].count("written: o.latent, 2 latent frames of 6 frames, of which the last 1 make no whole") == 1


@pytest.mark.slow
def test_an_error_under_torchrun_ends_all_ranks_and_leaves_nothing(path, tmp_path):
    save_latents(tmp_path / "x.latent", latents_of(4, 3))
    codes, outputs = torchrun(tmp_path, "decode", "x.latent", "--vae", path, "-o", "missing/out.mp4", nodes=1, ranks=1)
    assert codes != [0]
    assert "there is no folder" in outputs[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.latent"]


def test_other_commands_than_decode_and_encode_are_refused_under_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["demo"]) == 1
    assert "run the other commands without it" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_on_one_node_ends_the_other_and_is_named_there(path, tmp_path):
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        node.mkdir()
    save_latents(nodes[0] / "x.latent", latents_of(4, 3))  # which the second node lacks
    with launches(nodes, "decode", "x.latent", "--vae", path, "-o", "out.mp4") as started:
        codes, outputs = ends(started, seconds=25)
    assert 0 not in codes
    place = f"{socket.gethostname()}/cpu"
    assert re.search(f"error: rank [23] on {place}: LatentError: x.latent does not exist", outputs[0])
    assert "error: x.latent does not exist" in outputs[1]
    assert "cli.py" not in outputs[0] + outputs[1]  # no traceback but torchrun's own
    assert [file.name for file in tmp_path.rglob("*")] == ["first", "second", "x.latent"]


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_ends_both_nodes_and_leaves_no_half_written_file(path, tmp_path):
    latents = latents_of(8, 8).repeat(1, 1, 200, 1, 1)
    save_latents(tmp_path / "x.latent", latents)
    arguments = "decode", "x.latent", "--vae", path, "-o", "frames/%04d.png", "--chunk", 1
    with launches([tmp_path] * 2, *arguments) as started:
        assert wait_until(lambda: list(tmp_path.glob("frames/.*/made 3.png")), 30)
        os.kill(process_of(3, started[1]), signal.SIGKILL)
        codes, outputs = ends(started, seconds=12)
    assert 0 not in codes
    # The killed one could say nothing; who noticed first says it for all.
    assert re.search(r"error: rank \d on \S+/cpu (lost the connection to another rank|was told to end)", outputs[0])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "x.latent"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_stopped_in_the_middle_ends_both_nodes_and_itself(path, tmp_path, rank):
    latents = latents_of(8, 8).repeat(1, 1, 200, 1, 1)
    save_latents(tmp_path / "x.latent", latents)
    arguments = "decode", "x.latent", "--vae", path, "-o", "frames/%04d.png", "--chunk", 1
    with launches([tmp_path] * 2, *arguments) as started:
        assert wait_until(lambda: list(tmp_path.glob("frames/.*/made 3.png")), 30)
        process = process_of(rank, started[rank // 2])
        os.kill(process, signal.SIGSTOP)
        codes, outputs = ends(started, seconds=30)
    assert 0 not in codes
    for output in outputs:
        assert re.search(rf"error: no answer from rank {rank} on \S+/cpu for \d s: its process {process} was", output)
    assert gone(process)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "x.latent"]


@pytest.mark.slow
def test_an_interface_that_is_not_there_ends_both_nodes_with_its_name(path, tmp_path):
    save_latents(tmp_path / "x.latent", latents_of(4, 3))
    arguments = "decode", "x.latent", "--vae", path, "-o", "out.mp4"
    with launches([tmp_path] * 2, *arguments, ranks=1, interfaces=("lo", "nosuch0")) as started:
        codes, outputs = ends(started, seconds=25)
    assert 0 not in codes
    for output in outputs:
        assert "can't join the others over gloo" in output
        assert "GLOO_SOCKET_IFNAME is 'nosuch0'" in output
        assert "cli.py" not in output
