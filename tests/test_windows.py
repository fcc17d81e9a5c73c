"""One device's way through the package, without what Windows lacks: modules, functions, signals and files of Linux."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import wan_vae_parallel as wvp
from tests.processes import patience

# Run before the package is loaded, and behind what it needs, which would otherwise do as on Windows.
WITHOUT_LINUX = """
import builtins, io, os, pathlib, select, signal, subprocess, sys, tempfile
import imageio_ffmpeg, numpy, PIL.Image, safetensors.torch, torch, torch.distributed

os.environ["IMAGEIO_FFMPEG_EXE"] = imageio_ffmpeg.get_ffmpeg_exe()  # which is started as on this system

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "triton"):
    sys.modules[name] = None
for name in (
    "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING", "fork", "forkpty", "sched_getaffinity", "sched_setaffinity",
    "sched_yield", "preadv", "pwritev", "pread", "pwrite", "posix_fallocate", "posix_fadvise", "posix_spawn", "getuid",
    "geteuid", "getgid", "getpgid", "setsid", "killpg", "setpriority", "getpriority", "PRIO_PROCESS", "nice", "mkfifo",
    "sysconf", "chown", "fchown", "fchmod", "wait", "wait3", "wait4", "waitid",
    "sendfile", "splice", "eventfd", "pidfd_open", "getloadavg", "register_at_fork", "ctermid", "O_NONBLOCK", "pipe2",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_TMPFILE", "set_blocking", "get_blocking", "fdatasync", "uname",
):
    if hasattr(os, name):
        delattr(os, name)
for name in ("KILL", "HUP", "CONT", "STOP", "TSTP", "USR1", "USR2", "PIPE", "CHLD", "ALRM"):
    delattr(signal, "SIG" + name)
for name in ("poll", "epoll"):
    delattr(select, name)

def elsewhere(function):
    def look(path, *arguments, **options):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys/", "/dev/shm")):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **options)
    return look

for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
    setattr(os, name, elsewhere(getattr(os, name)))
io.open = builtins.open = elsewhere(open)
# Python's own, which has looked at this system already.
tempfile._O_TMPFILE_WORKS = False
subprocess.Popen.kill = lambda process: os.kill(process.pid, 9)
sys.platform = "win32"
"""


def run(program, *arguments):
    """What a program says that has nothing of Linux."""
    source = WITHOUT_LINUX + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)], capture_output=True, text=True, timeout=patience(300)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small VAE and latents for it; and what this system makes of them."""
    folder = tmp_path_factory.mktemp("windows")
    wvp.save_demo_checkpoint(folder / "vae.safetensors", "wan2.1", 8)
    return folder


def test_one_device_decodes_and_encodes_without_linux_and_several_are_an_error(files):
    run(
        """
        import wan_vae_parallel as wvp
        folder = pathlib.Path(sys.argv[1])
        latents = torch.randn((1, 16, 3, 4, 5), generator=torch.Generator().manual_seed(0))
        with wvp.load_vae(folder / "vae.safetensors", devices="auto", chunk=1) as vae:
            assert vae.memory_needed(latents.shape) > 0
            frames = vae.decode(latents)
            assert frames.shape == (1, 9, 32, 40, 3)
            assert torch.equal(torch.cat(list(vae.decode_stream(latents)), dim=1), frames)
            means = vae.encode(frames)
            assert means.shape == latents.shape
            assert torch.equal(torch.cat(list(vae.encode_stream(frames[0].split(3))), dim=2), means)
            vae.park(), vae.release()
            assert torch.equal(vae.decode(latents), frames)
        try:
            wvp.load_vae(folder / "vae.safetensors", devices="cpu,cpu")
        except wvp.DeviceError as error:
            assert "workers need Linux's shared memory; name one" in str(error), error
        else:
            raise AssertionError("two devices were taken")
        torch.save((latents, frames, means), folder / "results.pt")
        """,
        files,
    )
    import torch

    latents, frames, means = torch.load(files / "results.pt")
    with wvp.load_vae(files / "vae.safetensors", devices="cpu", chunk=1) as vae:
        torch.testing.assert_close(vae.decode(latents), frames, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae.encode(frames), means, atol=1e-4, rtol=1e-4)


def test_the_shell_decodes_encodes_and_informs_without_linux(files):
    said = run(
        """
        from wan_vae_parallel.cli import main
        folder = pathlib.Path(sys.argv[1])
        vae = str(folder / "vae.safetensors")
        safetensors.torch.save_file({"latent": torch.zeros((1, 16, 2, 2, 3))}, folder / "in.safetensors")
        for line in (
            ["decode", folder / "in.safetensors", "--vae", vae, "-o", folder / "frames.safetensors"],
            ["decode", folder / "in.safetensors", "--vae", vae, "-o", folder / "frames/%04d.png"],
            ["encode", folder / "frames.safetensors", "--vae", vae, "-o", folder / "back.latent"],
            ["encode", folder / "frames/%04d.png", "--vae", vae, "-o", folder / "back.safetensors"],
            ["info", vae, "--size", "64x64", "--frames", "5"],
        ):
            code = main([str(word) for word in line])
            assert not code, (line, code)
        """,
        files,
    )
    assert "Wan 2.1" in said
    assert len(list((files / "frames").glob("*.png"))) == 5
    assert (files / "back.latent").exists()
    assert (files / "back.safetensors").exists()
