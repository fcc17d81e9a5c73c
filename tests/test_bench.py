"""The bench command: what it measures, prints and writes. Its figures are not judged here."""

from __future__ import annotations

import importlib
import json
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan_vae_parallel import Architecture, bench
from wan_vae_parallel.cli import main
from wan_vae_parallel.errors import WorkerError
from wan_vae_parallel.files.checkpoint import checkpoint_from_state_dict
from wan_vae_parallel.workers.meanwhile import MeanwhileRun
from wan_vae_parallel.workers.run import PoolRun

SMALL = ["--width", "8", "--sizes", "32x16", "--frames", "5", "--devices", "cpu,cpu", "--repeats", "1"]


@pytest.mark.slow
def test_bench_draws_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra [bench]")
    assert main(["bench", *SMALL, "-o", str(tmp_path)]) == 0
    with Image.open(tmp_path / "bench.png") as plot:
        assert plot.width > 500
        assert len(plot.convert("L").getcolors(256)) > 10  # something is drawn


def test_bench_measures_every_size_and_direction_with_one_and_all_devices_and_diffusers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    assert main(["bench", *SMALL, "--chunk", "1", "-o", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    measured = [(row["direction"], row["size"], row["what"], len(row["devices"])) for row in content["rows"]]
    expected = [("ours", 1), ("ours", 2), ("diffusers", 1)]
    assert measured == [(direction, "32x16", *one) for direction in ("decode", "encode") for one in expected]
    assert all(row["frames"] == 5 and 0 < row["seconds"] < row["first"] + 10 for row in content["rows"])
    assert content["environment"]["torch"] == torch.__version__
    assert all(len(row["times"]) == 1 for row in content["rows"])
    assert content["settings"]["dtype"] == "float32"
    assert content["settings"]["chunk"] == 1
    printed = capsys.readouterr().out
    assert printed.count("| ours |") == 4
    # Each against one device in its own direction.
    for direction in ("decode", "encode"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {direction} ") and "1.00x" in line]
        assert "| ours | cpu |" in line
    assert content["settings"]["directions"] == ["decode", "encode"]


def test_what_is_timed_after_the_first_call_is_the_workers(tmp_path, monkeypatch):
    # As on GPUs, where one decodes alone as long as the workers start.
    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(lambda *_: True))
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    real, alone = MeanwhileRun.__init__, []

    def begun(run, *arguments):
        alone.append(run)
        real(run, *arguments)

    monkeypatch.setattr(MeanwhileRun, "__init__", begun)
    found = []
    monkeypatch.setattr(PoolRun, "__init__", _noting(PoolRun.__init__, found))
    assert main(["bench", *SMALL, "--direction", "decode", "--repeats", "2", "-o", str(tmp_path)]) == 0
    assert alone
    assert found[-2:] == ["ready", "ready"]


def _noting(init, found):
    def noted(run, pool, *arguments):
        found.append(pool.stage)
        init(run, pool, *arguments)

    return noted


def test_workers_that_never_take_part_are_an_error_of_their_row(tmp_path, monkeypatch):
    def refused(*_args):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(MeanwhileRun, "possible", staticmethod(lambda *_: True))
    monkeypatch.setattr("wan_vae_parallel.workers.pool.WorkerProcess", refused)
    monkeypatch.setattr(bench, "_START_SECONDS", 0.5)
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    assert main(["bench", *SMALL, "--direction", "decode", "-o", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    failed = {tuple(row["devices"]): row["failed"] for row in rows if row["what"] == "ours"}
    assert failed["cpu",] == ""
    assert "workers did not start within" in failed["cpu", "cpu"]


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_one_direction_alone(tmp_path, monkeypatch, direction, family):
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    arguments = ["--devices", "cpu", "--direction", direction, "--architecture", family, "-o", str(tmp_path)]
    assert main(["bench", *SMALL, *arguments]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["direction"], row["what"], row["failed"]) for row in rows] == [
        (direction, what, "") for what in ("ours", "diffusers")
    ]


def test_a_file_without_encoder_is_measured_as_far_as_it_goes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    weights = bench.random_weights(Architecture(family="wan2.1", z_dim=16, width=8))
    save_file(weights, tmp_path / "vae.safetensors")
    arguments = ["bench", *SMALL, "--devices", "cpu", "--vae", str(tmp_path / "vae.safetensors"), "-o", str(tmp_path)]
    assert main([*arguments, "--direction", "encode"]) == 1
    assert "has no encoder; take the whole VAE's file, or measure decodes" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "has no encoder; only decodes are measured" in capsys.readouterr().err
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["direction"] for row in rows} == {"decode"}


def test_without_matplotlib_the_figures_are_there_and_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "bench.png").write_text("an older run's")
    arguments = ["bench", *SMALL, "--devices", "cpu", "--sizes", "16x16", "-o", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    # Before it measures, for who would rather have one.
    assert printed.err.index("wan-vae-parallel[bench]") < printed.err.index("16x16, ours")
    assert "plot:" not in printed.out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not (tmp_path / "bench.png").exists()


def test_what_fails_is_a_row_that_says_so_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    arguments = ["--devices", "cpu", "--sizes", "99999984x99999984,16x16", "-o", str(tmp_path)]
    assert main(["bench", *SMALL, *arguments]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["what"], row["failed"]) for row in rows] == [
        (what, failed) for failed in ("does not fit", "") for _ in bench.DIRECTIONS for what in ("ours", "diffusers")
    ]
    assert [row["seconds"] is None for row in rows] == 4 * [True] + 4 * [False]
    assert capsys.readouterr().out.count("| does not fit |") == 4


def test_a_run_that_measured_nothing_fails(tmp_path, capsys):
    arguments = ["--devices", "cpu", "--sizes", "99999984x99999984", "-o", str(tmp_path)]
    assert main(["bench", *SMALL, *arguments]) == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert [row["failed"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["does not fit"] * 4
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize(
    "broken",
    [RuntimeError("Failed to import diffusers.models\nas it is broken"), TypeError("no such keyword"), KeyError()],
)
def test_diffusers_that_is_broken_or_too_old_is_a_row_that_says_so(tmp_path, monkeypatch, broken):
    def fails(*_):
        raise broken

    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    monkeypatch.setattr(bench, "_diffusers", fails)
    assert main(["bench", *SMALL, "--devices", "cpu", "--direction", "decode", "-o", str(tmp_path)]) == 0
    ours, theirs = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert ours["seconds"] > 0
    assert theirs["failed"] in ("Failed to import diffusers.models", "no such keyword", "KeyError")


@pytest.mark.parametrize("stand_in", ["no spec", "a folder"])
def test_what_only_has_diffusers_name_is_not_compared_with(tmp_path, monkeypatch, stand_in):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    if stand_in == "a folder":
        (tmp_path / "diffusers").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        importlib.invalidate_caches()
    else:
        module = types.ModuleType("diffusers")
        module.__spec__ = None
        monkeypatch.setitem(sys.modules, "diffusers", module)
    assert not bench._diffusers_knows(Architecture.published("wan2.1"))


def test_speed_ups_are_against_one_device_or_not_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs the extra [bench]")
    from matplotlib.axes import Axes

    def row(count, seconds, direction="decode"):
        devices = tuple(f"cuda:{i}" for i in range(count))
        return bench.Row(
            direction=direction, size="16x16", frames=5, what="ours", devices=devices, seconds=seconds, times=(),
            first=1.0, peak_gib=None,
        )  # fmt: skip

    drawn = []
    plot = Axes.plot

    def remembered(axes, *data, **options):
        drawn.append(data[:2])
        return plot(axes, *data, **options)

    monkeypatch.setattr(Axes, "plot", remembered)
    bench.save_plot(tmp_path / "a.png", [row(1, 4.0), row(2, 2.5)], "")
    assert ([1, 2], [1.0, 1.6]) in drawn
    drawn.clear()
    both = [row(1, 4.0), row(2, 2.5), row(1, 2.0, "encode"), row(2, 1.0, "encode")]
    bench.save_plot(tmp_path / "ab.png", both, "")
    assert all(line in drawn for line in (([1, 2], [1.0, 1.6]), ([1, 2], [1.0, 2.0])))
    drawn.clear()
    bench.save_plot(tmp_path / "b.png", [row(1, None), row(2, 2.5), row(4, 1.5)], "")
    assert drawn == [([2, 4], [2.5, 1.5]), ([1, 4], [1, 4])]


def test_a_worker_that_fails_is_a_row_and_other_errors_are_ours_to_hear():
    def fails(error):
        def decode(_):
            raise error

        return bench._timed(lambda: decode, lambda: torch.zeros(1), [torch.device("cpu")], 1)

    assert fails(WorkerError("worker 1 died\nand more")) == ([], None, "worker 1 died")
    with pytest.raises(RuntimeError, match="a bug"):
        fails(RuntimeError("a bug"))


@pytest.mark.parametrize("name", ["bench.json", "bench.png"])
def test_what_can_not_be_written_is_told_before_anything_is_measured(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / name).mkdir()
    assert main(["bench", *SMALL, "-o", str(tmp_path)]) == 1
    assert f"{name} is a folder" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_told_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert main(["bench", *SMALL, "-o", "/proc/self"]) == 1
    assert "self can't be written to" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_random_weights_are_a_vaes_and_no_zeros(family):
    architecture = Architecture.published(family, width=16)
    weights = bench.random_weights(architecture)
    assert checkpoint_from_state_dict(weights, source="them").architecture == architecture
    assert all(tensor.std() > 0 for tensor in weights.values() if tensor.numel() > 1)
    assert weights["decoder.conv1.weight"].shape[2:] == (3, 3, 3)
