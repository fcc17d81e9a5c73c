"""Workers of the tests fork from a process that has loaded their modules: to load torch takes longer than most tests.

`workers` has it so in this process. A worker that was forked begins where `bootstrap` does, with the environment, the
folder, the session and the files, by their numbers, that one of its own Python would have; its parent is this process.
Programs that tests run start their workers as everybody does, and so do tests that ask for it (``real_starts``).

Run as a script, this is the process that forks; its argument is the socket on which it hears from the tests'.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Python puts a script's folder first, where names are the tests'.
    sys.path = [entry for entry in sys.path if entry != __file__.rpartition("/")[0]]

import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import json
import os
import socket
import struct
import subprocess
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Of Linux: orphans among this process's descendants become its children.
_PR_SET_CHILD_SUBREAPER = 36
_BOOTSTRAP = Path(__file__).resolve().parents[1] / "wan_vae_parallel" / "workers" / "bootstrap.py"
_LENGTH = struct.Struct("I")

# Of this process: the one that forks, which is no test's to look for.
helpers: set[int] = set()


# In the tests' process.


class Forks:
    """Stands for `subprocess` where workers are made.

    Attributes:
        enabled: whether workers are forked; else they start as everybody's do.
        gate: forked workers wait to begin until all have closed the pipe that this is the reading end of.
    """

    DEVNULL = subprocess.DEVNULL
    _args_from_interpreter_flags = staticmethod(subprocess._args_from_interpreter_flags)  # type: ignore[attr-defined]

    def __init__(self) -> None:
        self.enabled = True
        self.gate: int | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def Popen(self, command: Sequence[str], **options: Any) -> Any:
        """Starts a worker."""
        if not self.enabled or not json.loads(command[-1])["device"].startswith("cpu") or os.getpid() != self._owner:
            return subprocess.Popen(command, **options)
        return types.SimpleNamespace(pid=self._fork(command[-1], **options), returncode=None)

    def _fork(self, words: str, *, stdout: int, pass_fds: Sequence[int], env: Mapping[str, str], **_others: Any) -> int:
        request = {
            "words": words,
            "environment": dict(env),
            "numbers": [1, 2, *pass_fds],
            "gated": self.gate is not None,
        }
        data = json.dumps(request).encode()
        gate = [] if self.gate is None else [self.gate]
        with self._lock, _reaping():
            control = self._start()
            socket.send_fds(control, [_LENGTH.pack(len(data))], [stdout, stdout, *pass_fds, *gate])
            control.sendall(data)
            (pid,) = _LENGTH.unpack(_read(control, _LENGTH.size))
        if not pid:
            raise OSError("the process that forks workers could not")
        return int(pid)

    def _start(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair()
            flags = self._args_from_interpreter_flags()
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, *flags, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd="/"
                )
            helpers.add(self._server.pid)
        return self._control

    def close(self) -> None:
        """Ends the process that forks; workers stay."""
        if self._server is not None and self._control is not None:
            self._control.close()
            self._server.wait(60)
            helpers.discard(self._server.pid)


@contextlib.contextmanager
def workers() -> Iterator[Forks]:
    """Within it this process's workers are forked."""
    from wan_vae_parallel.workers import process

    forks = Forks()
    with mock.patch.object(process, "subprocess", forks):
        try:
            yield forks
        finally:
            forks.close()


class Gate:
    """Workers that are forked while it is shut, as it is at first, wait until it opens, and only then begin."""

    def __init__(self, forks: Forks | None) -> None:
        self._forks = forks
        self.shut()

    def shut(self) -> None:
        """Has those wait that come from now on."""
        self._reading, self._writing = os.pipe()
        if self._forks:
            self._forks.gate = self._reading

    def open(self) -> None:
        """Lets those begin that wait, and those that come; if it is open, nothing happens."""
        if self._forks:
            self._forks.gate = None
        for file in (self._reading, self._writing):
            if file >= 0:
                os.close(file)
        self._reading = self._writing = -1


@contextlib.contextmanager
def _reaping() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise OSError("the process that forks workers is gone")
        data += part
    return data


# In the process that forks.


def _serve(control: socket.socket) -> None:
    bootstrap = _load()
    gc.collect()
    gc.freeze()
    while True:
        head, files, *_ = socket.recv_fds(control, _LENGTH.size, 8)
        if not head:
            return
        request = json.loads(_read(control, *_LENGTH.unpack(head)))
        said, saying = os.pipe()
        waiting, go = os.pipe()
        # The one between ends, so that the worker's parent is the tests' process.
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                os.write(saying, _LENGTH.pack(pid))
                os._exit(0)
            for file in (said, saying, go):
                os.close(file)
            control.close()
            os.read(waiting, 1)
            os.close(waiting)
            _become(bootstrap, request, files)
        for file in (saying, waiting, *files):
            os.close(file)
        os.waitpid(between, 0)
        control.sendall(os.read(said, _LENGTH.size) or _LENGTH.pack(0))
        os.close(said)
        os.close(go)


def _load() -> Any:
    """Loads what workers load, as they do."""
    spec = importlib.util.spec_from_file_location("bootstrap", _BOOTSTRAP)
    assert spec is not None
    assert spec.loader is not None
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.load_package()
    importlib.import_module(bootstrap.PACKAGE + ".workers.worker")
    return bootstrap


def _become(bootstrap: Any, request: dict[str, Any], files: list[int]) -> None:
    """Is a worker; never returns."""
    try:
        os.setsid()
        os.chdir("/")
        if request["gated"]:
            os.read(files[-1], 1)
            os.close(files.pop())
        _place(files, request["numbers"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [bootstrap.__file__, request["words"]]
        bootstrap.run(json.loads(request["words"]))
    finally:
        os._exit(1)


def _place(files: list[int], numbers: list[int]) -> None:
    """Gives open files those numbers, and closes the numbers that they had."""
    away = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(away, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing:
        os.dup2(nothing, 0)
        os.close(nothing)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
