"""Facts in the user's cache folder: what is read back, what is not believed, and writers that write at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from wan_vae_parallel.files.user_cache import CachedFacts, cache_folder

KEY = {"GPU": "Test GPU", "torch": "2.11"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wan_vae_parallel"


def facts(**changes):
    return CachedFacts("Test GPU/bf16", KEY | changes)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_was_written_is_read_and_replaced(folder):
    assert facts().read("a") is None
    facts().write({"a": [1, 2], "b/c d": {"x": 0.5}})
    assert (facts().read("a"), facts().read("b/c d")) == ([1, 2], {"x": 0.5})
    facts().write({"a": 3})
    assert (facts().read("a"), facts().read("b/c d")) == (3, {"x": 0.5})
    assert facts().folder.parent == folder
    assert files(folder) == ["a.json", "b-c-d.json"]


def test_other_keys_have_their_own():
    facts().write({"a": 1})
    assert facts(torch="2.12").read("a") is None
    assert facts(more="").read("a") is None
    facts(torch="2.12").write({"a": 2})
    assert (facts().read("a"), facts(torch="2.12").read("a")) == (1, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"key": {"GPU"',
        b"\xff\xfe",
        b"[1]",
        b'{"value": 1}',
        b'{"key": {"GPU": "other"}, "name": "a", "value": 1}',
    ],
)
def test_a_damaged_or_foreign_file_is_not_believed_and_gets_replaced(folder, content):
    facts().write({"a": 1})
    (path,) = folder.rglob("a.json")
    path.write_bytes(content)
    assert facts().read("a") is None
    facts().write({"a": 2})
    assert facts().read("a") == 2
    assert files(folder) == ["a.json"]


def test_a_figure_in_which_a_digit_went_wrong_is_not_believed():
    facts().write({"a": {"TFLOP/s": 250.0}})
    path = facts().folder / "a.json"
    assert facts().read("a") == {"TFLOP/s": 250.0}
    path.write_text(path.read_text().replace("250.0", "2500.0"))
    assert facts().read("a") is None


@pytest.mark.parametrize("what", ["the cache", "the folder", "the file"])
def test_where_nothing_can_be_written_that_is_an_error_and_nothing_stays(folder, what):
    block = {"the cache": folder, "the folder": facts().folder, "the file": facts().folder / "a.json"}[what]
    block.parent.mkdir(parents=True, exist_ok=True)
    block.mkdir() if what == "the file" else block.write_text("no folder")
    assert facts().read("a") is None
    with pytest.raises(OSError, match=r"a\.json|exists|directory"):
        facts().write({"a": 1})
    assert not list(folder.rglob("*.partial"))


def _write(worker, start):
    start.wait()
    for i in range(20):
        facts().write({f"own {worker}": i, "shared": ["x" * 10_000, worker]})


def test_processes_that_write_at_once_lose_and_damage_nothing(folder):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    writers = [context.Process(target=_write, args=(i, start)) for i in range(4)]
    for writer in writers:
        writer.start()
    facts().write({"shared": ["", 0]})
    start.set()
    while any(writer.is_alive() for writer in writers):
        assert isinstance(facts().read("shared"), list)  # never half a file
        time.sleep(0.001)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert [facts().read(f"own {i}") for i in range(4)] == [19] * 4
    assert facts().read("shared")[1] in range(4)
    assert not list(folder.rglob("*.partial"))


def test_what_a_killed_process_left_goes_with_the_next_writing_but_not_what_is_new():
    facts().write({"a": 1})
    old, new = (facts().folder / f".{name}.partial" for name in ("old", "new"))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    facts().write({"a": 2})
    assert not old.exists()
    assert new.exists()


@pytest.mark.skipif(os.name == "nt", reason="there the folder is another")
def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # as the specification wants it ignored
    monkeypatch.setenv("HOME", "/somebody")
    assert cache_folder() == Path("/somebody/.cache/wan_vae_parallel")
