"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from wan_vae_parallel import OutputError
from wan_vae_parallel.files.whole import check_writable, replacing


def test_a_new_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "frames.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
        assert temporary.suffix == ".bin"  # writers choose the format by it
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "frames.bin"
    path.write_bytes(b"old")
    with replacing(str(path)) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# Of a user's code, of the user, of an engine error; each leaves as it is.
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OutputError("own words")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "frames.bin"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ha")
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_meanwhile_is_an_output_error(tmp_path):
    path = tmp_path / "frames.bin"

    def write_until_full():
        with replacing(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"frames\.bin could not be written; free some room .*\(.*No space left"):
        write_until_full()
    assert not list(tmp_path.iterdir())


def test_a_block_that_writes_nothing_is_an_output_error(tmp_path):
    def write_nothing():
        with replacing(tmp_path / "frames.bin"):
            pass

    with pytest.raises(OutputError, match="could not be written"):
        write_nothing()
    assert not list(tmp_path.iterdir())


def enter(path, **options):
    with replacing(path, **options):
        pytest.fail("nothing may be computed for a file that can't be written")


@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_a_missing_folder(tmp_path, refuse):
    with pytest.raises(OutputError, match=r"there is no folder for it; make it, or choose another \(.*nowhere"):
        refuse(tmp_path / "nowhere" / "frames.bin")


@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_a_folder_in_the_files_place(tmp_path, refuse):
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        refuse(tmp_path)


@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_a_read_only_folder(tmp_path, refuse, monkeypatch):
    if os.geteuid() == 0:
        # root may write anywhere: what the system would tell anybody else.
        monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    else:
        tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="is read-only; choose another"):
        refuse(tmp_path / "frames.bin")
    tmp_path.chmod(0o755)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_a_disk_that_is_too_full(tmp_path, refuse):
    needed = shutil.disk_usage(tmp_path).total + 2**40
    with pytest.raises(OutputError, match=r"takes \d+\.\d GiB, and .* are free there; free some room or choose"):
        refuse(tmp_path / "frames.bin", needed=needed)
    assert not list(tmp_path.iterdir())


def test_what_fits_is_let_through(tmp_path):
    check_writable(tmp_path / "frames.bin", needed=1)


# Letters of one byte, two, three and four; and such that cutting after any number of bytes cuts one of them.
@pytest.mark.parametrize("name", ["f" * 251, "é" * 125, "名" * 83, "😀" * 62, "a" + "名" * 83, "ab" + "名" * 83])
def test_a_name_as_long_as_the_system_allows(tmp_path, name):
    path = tmp_path / f"{name}.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["f" * 256, "名" * 86])
@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_a_longer_name_is_told_beforehand(tmp_path, refuse, name, monkeypatch):
    # As from Python 3.13 on.
    monkeypatch.setattr(type(tmp_path), "is_dir", lambda self: os.path.isdir(self))
    monkeypatch.setattr(type(tmp_path), "exists", lambda self: os.path.exists(self))
    with pytest.raises(OutputError, match=r"can't be written; choose another name \(.*[Nn]ame too long"):
        refuse(tmp_path / name)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("refuse", [check_writable, enter])
def test_devices_and_pipes_are_not_replaced(tmp_path, refuse):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="is a device or a pipe"):
        refuse(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_files_have_the_usual_mode(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "ours") as temporary:
        temporary.touch(mode=0o600)  # as safetensors makes them
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_disk_that_fills_up_under_safetensors_is_an_output_error(tmp_path):
    # Its library has an error of its own for it.
    def write_until_full():
        with replacing(tmp_path / "frames.bin"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputError, match=r"frames\.bin could not be written; free some room .*\(.*No space left"):
        write_until_full()
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from wan_vae_parallel.files.whole import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_what_a_killed_process_left_goes_with_the_next_file_of_the_name(tmp_path):
    path, other = tmp_path / "v.mp4", tmp_path / "other.mp4"
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in (path, path, other)
    ]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.communicate)
            assert process.stdout.readline() == b"there\n"
        living = set(tmp_path.glob(".*.partial"))
        assert len(living) == 3
        for process in processes[1:]:
            process.kill()
            process.wait()
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
        assert set(tmp_path.glob(".*.partial")) == living  # they are new, and might be about to be locked
        for folder in living:
            os.utime(folder, (0, 0))
        with replacing(path) as temporary:
            temporary.write_bytes(b"newer")
        # One of the name is still written to, and one is of another name.
        assert len(list(tmp_path.glob(".v.mp4.*.partial"))) == len(list(tmp_path.glob(".other.mp4.*.partial"))) == 1
    assert path.read_bytes() == b"half"  # of the one that lived
    assert not list(tmp_path.glob(".v.mp4.*"))
