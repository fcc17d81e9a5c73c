"""No change of a user's file, at any time, is more than an error that names it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import wan_vae_parallel as wvp
from tests.oracle import random_latents
from tests.processes import open_files
from wan_vae_parallel.files import tensor_file
from wan_vae_parallel.files.checkpoint import describe_checkpoint, read_checkpoint
from wan_vae_parallel.files.latents import read_latents, save_latents

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A small Wan 2.1 VAE's file."""
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    wvp.save_demo_checkpoint(path, "wan2.1", 8)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(content)
    return path


def emptied(path):
    os.truncate(path, 0)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def grown_again(path):
    """A download that has just begun anew, of a program that reserves the room."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def rewritten(path):
    """Other weights of the same size, under the same inode."""
    other = {key: tensor * 2 for key, tensor in load_file(path).items()}
    with path.open("r+b") as file:
        file.write(save(other))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def removed(path):
    path.unlink()


CHANGES = [emptied, cut, grown_again, rewritten, replaced, removed]
# In a process of its own, which a mapped file would kill.
CHANGED = """
import sys
from pathlib import Path
import wan_vae_parallel as wvp
from tests.files import test_tensor_file
from tests.oracle import random_latents
source, devices, *names = sys.argv[1:]
latents = random_latents("wan2.1", frames=2, rows=2, columns=3)
for name in names:
    for decoded_before in (False, True):
        path = Path(source).with_name(f"{name}-{decoded_before}.safetensors")
        path.write_bytes(Path(source).read_bytes())
        with wvp.load_vae(path, devices=devices, chunk=1) as vae:
            if decoded_before:
                vae.decode(latents)
                vae.release()
            getattr(test_tensor_file, name)(path)
            for _ in range(2):
                try:
                    vae.decode(latents)
                except wvp.CheckpointError as error:
                    print(name, path.name in str(error))
"""


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        ("cpu", CHANGES),
        ("cpu,cpu", [rewritten]),  # workers start for each
        pytest.param("cpu,cpu", CHANGES, marks=pytest.mark.slow),
    ],
)
def test_a_file_that_changes_between_load_and_decode(path, devices, changes):
    names = [change.__name__ for change in changes]
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, str(path), devices, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.splitlines() == [f"{name} True" for name in names for _ in range(4)]


@linux
@pytest.mark.parametrize("change", CHANGES[:4])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_file_that_changes_while_it_is_read(path, monkeypatch, change, block):
    real, read = os.preadv, []

    def preadv(*arguments):
        read.append(arguments)
        if len(read) == block + 1:
            change(path)
        return real(*arguments)

    monkeypatch.setattr(tensor_file, "_BLOCK", 10_000)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors (changed while it was|can't be) read"):
        read_checkpoint(path)


@linux
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_copy_every_byte_and_their_errors_are_the_callers(path, content, monkeypatch, threads):
    monkeypatch.setattr(tensor_file, "_SMALL", 0)
    monkeypatch.setattr(tensor_file, "_BLOCK", 4096)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)))
    with tensor_file.TensorFile(path, wvp.CheckpointError, holds="VAE", another="", again="") as file:
        file.read()
        assert Path(f"/proc/self/fd/{file._copy}").read_bytes() == content
    real = os.preadv

    def preadv(descriptor, buffers, offset):
        if offset > len(content) // 2:
            raise OSError(errno.EIO, "Input/output error")  # a bad disk
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors can't be read, .*Input/output error"):
        read_checkpoint(path)


@pytest.mark.parametrize("read", [read_checkpoint, describe_checkpoint])
def test_a_file_cut_at_any_place_is_named(path, content, read):
    header = 8 + int.from_bytes(content[:8], "little")
    lengths = [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) - 1]
    lengths += range(header, len(content), len(content) // 10)
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors can't be read, .*fetch it again"):
            read(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_what_was_read_is_neither_the_files_nor_leaves_anything_open(path, tmp_path):
    latents_path = tmp_path / "video.latent"
    save_latents(latents_path, torch.ones(1, 16, 2, 2, 3))
    before = sorted(open_files())
    checkpoint, latents = read_checkpoint(path), read_latents(latents_path)
    vae = wvp.load_vae(path, devices="cpu")
    assert sorted(open_files()) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    values = {key: tensor.clone() for key, tensor in checkpoint.decoder.items()}
    for changed in (path, latents_path):
        rewritten(changed)
        emptied(changed)
    assert all(torch.equal(tensor, values[key]) for key, tensor in checkpoint.decoder.items())
    assert torch.equal(latents, torch.ones(1, 16, 2, 2, 3))
    latents.mul_(2)  # the caller's own
    for refused in (lambda: vae.decode(latents), lambda: read_checkpoint(path), lambda: read_latents(latents_path)):
        with pytest.raises((wvp.CheckpointError, wvp.LatentError)):
            refused()
    assert sorted(open_files()) == before


@linux
def test_to_load_only_the_header_is_read(path, content, monkeypatch):
    real, read = os.preadv, []

    def preadv(*arguments):
        read.append(real(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    header = 8 + int.from_bytes(content[:8], "little")
    wvp.load_vae(path, devices="cpu")
    assert sum(read) == header
    # Nor more of another model's file, which may be of many gigabytes, or of one in a latent's place.
    read.clear()
    other = path.with_name("other.safetensors")
    save_file({"transformer.weight": torch.zeros(1000, 1000)}, other)
    for refused in (read_checkpoint, read_latents):
        with pytest.raises((wvp.CheckpointError, wvp.LatentError)):
            refused(other)
    assert sum(read) < 1000


@linux
def test_what_is_mapped_can_not_get_shorter(path):
    with tensor_file.TensorFile(path, wvp.CheckpointError, holds="VAE", another="", again="") as file:
        file.read()
        for length in (0, path.stat().st_size + 1):
            with pytest.raises(PermissionError):
                os.truncate(file._copy, length)


@pytest.mark.parametrize("error", [None, errno.EFBIG, errno.EMFILE])
def test_without_files_in_memory_the_bytes_are_read(path, content, monkeypatch, error):
    expected = read_checkpoint(path)
    if error is None:
        monkeypatch.setattr(sys, "platform", "another")
    else:

        def refuse(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(tensor_file, "anonymous_file", refuse)
    checkpoint = read_checkpoint(path)
    assert checkpoint.version == expected.version
    assert all(torch.equal(tensor, expected.decoder[key]) for key, tensor in checkpoint.decoder.items())
    described = describe_checkpoint(path)
    assert {key: tensor.shape for key, tensor in described.decoder.items()} == {
        key: tensor.shape for key, tensor in expected.decoder.items()
    }
    path.write_bytes(content[: len(content) // 2])
    for read in (read_checkpoint, describe_checkpoint):
        with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors can't be read"):
            read(path)


@linux
def test_want_of_memory_is_told_as_that(path, monkeypatch):
    def pwrite(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(wvp.OutOfMemoryError, match=r"vae\.safetensors takes \d+\.\d MiB, and the host has no memory"):
        read_checkpoint(path)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "vae.safetensors")
    with pytest.raises(wvp.CheckpointError, match=r"vae\.safetensors is no file; name a Wan VAE's"):
        read_checkpoint(tmp_path / "vae.safetensors")
    with pytest.raises(wvp.LatentError, match=r"is a folder|is no file; name a \.latent"):
        read_latents(tmp_path)


def interrupted_in_the_library(monkeypatch, name):
    """A signal comes while ``name`` of the library works, which takes what its handler raises for a bad tensor."""

    def library(*args, **options):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(1000):  # where handlers run, if this is their thread
                time.sleep(0.001)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None
        return real(*args, **options)

    where, _, function = name.rpartition(".")
    module = tensor_file.safetensors.torch if where else tensor_file
    real = getattr(module, function)
    monkeypatch.setattr(module, function, library)


@pytest.fixture
def _signal_interrupts():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("_signal_interrupts")
@pytest.mark.parametrize("of", ["a VAE", "a VAE, by way of bytes", "latents"])
def test_an_interrupt_while_a_file_is_read_stays_one(path, tmp_path, monkeypatch, of):
    latents = tmp_path / "x.latent"
    save_latents(latents, random_latents("wan2.1", frames=1, rows=1, columns=1))
    if "bytes" in of:
        monkeypatch.setattr(tensor_file.TensorFile, "_with_header", lambda _: None)
    with monkeypatch.context() as patch:
        interrupted_in_the_library(patch, "torch.load" if "bytes" in of else "safe_open")
        with pytest.raises(KeyboardInterrupt):
            read_latents(latents) if of == "latents" else read_checkpoint(path)
    assert read_checkpoint(path).decoder
    assert read_latents(latents).shape[2] == 1


def test_where_there_are_no_more_threads_files_are_read_all_the_same(path, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert read_checkpoint(path).decoder
