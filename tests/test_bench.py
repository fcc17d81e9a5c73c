"""The bench command: what it measures, prints and writes. Its figures are not judged here."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from wan_vae_parallel import Architecture, bench
from wan_vae_parallel.cli import main

SMALL = ["--width", "8", "--sizes", "32x16", "--frames", "5", "--devices", "cpu,cpu", "--repeats", "1"]


@pytest.mark.slow
def test_bench_draws_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra [bench]")
    assert main(["bench", *SMALL, "-o", str(tmp_path)]) == 0
    with Image.open(tmp_path / "bench.png") as plot:
        assert plot.width > 500
        assert len(plot.convert("L").getcolors(256)) > 10  # something is drawn


def test_bench_measures_every_size_with_one_and_all_devices_and_diffusers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "save_plot", lambda *_: None)
    assert main(["bench", *SMALL, "-o", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    measured = [(row["size"], row["what"], len(row["devices"])) for row in content["rows"]]
    expected = [("ours", 1), ("ours", 2), ("diffusers", 1)]
    assert measured == [(size, *one) for size in ("32x16",) for one in expected]
    assert all(row["frames"] == 5 and 0 < row["seconds"] < row["first"] + 10 for row in content["rows"])
    assert content["environment"]["torch"] == torch.__version__
    assert content["settings"]["dtype"] == "float32"
    printed = capsys.readouterr().out
    assert printed.count("| ours |") == 2
    assert "1.00x" in printed


def test_without_matplotlib_the_figures_are_there_and_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    arguments = ["bench", *SMALL, "--devices", "cpu", "--sizes", "16x16", "-o", str(tmp_path)]
    assert main(arguments) == 1
    assert "wan-vae-parallel[bench]" in capsys.readouterr().err
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not (tmp_path / "bench.png").exists()


def test_what_does_not_fit_is_a_row_that_says_so():
    row = bench.Row(size="16x16", frames=5, what="ours", devices=("cpu",), seconds=None, first=None, peak_gib=None)
    assert "does not fit" in bench.table([row])


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_random_weights_are_a_decoders_and_no_zeros(family):
    weights = bench.random_weights(Architecture.published(family, width=16))
    assert all(tensor.std() > 0 for tensor in weights.values() if tensor.numel() > 1)
    assert weights["decoder.conv1.weight"].shape[2:] == (3, 3, 3)
