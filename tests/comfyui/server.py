"""A real ComfyUI server in a folder of its own, and a client for it."""

import contextlib
import json
import os
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from socket import socket

import websocket

from tests.processes import patience

REPOSITORY = Path(__file__).resolve().parents[2]
_TEXT = 3
PROBES = Path(__file__).parent / "probe_pack"


def find_comfyui() -> tuple[Path, Path] | None:
    """ComfyUI's checkout and its Python: by environment, around this pack, or in the home folder."""
    candidates = [os.environ.get("COMFYUI_PATH"), REPOSITORY.parents[1], Path.home() / "comfy" / "ComfyUI"]
    for candidate in filter(None, candidates):
        path = Path(candidate)
        if (path / "main.py").is_file() and (path / "comfy_api").is_dir():
            beside = [path / "venv", path / ".venv", path.parent / "venv", Path.home() / "comfy" / "venv"]
            pythons = [os.environ.get("COMFYUI_PYTHON"), *(venv / "bin" / "python" for venv in beside)]
            for python in filter(None, pythons):
                if Path(python).is_file():
                    return path, Path(python)
    return None


class Server:
    """A server process with its own models, inputs and outputs below ``folder``.

    ``options`` go to ComfyUI. ``packs`` are node packs beside this one and the probes, by the names that they get in
    custom_nodes. ``environment`` is added to this process's.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path,
        folder: Path,
        *options: str,
        packs: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.input, self.output = folder / "input", folder / "output"
        for name in ("input", "output", "temp", "user", "models/vae", "custom_nodes", "frontend"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, target in {"wan-vae-parallel": REPOSITORY, "probes": PROBES, **(packs or {})}.items():
            link = folder / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(target)
        with closing(socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log_path = folder / "server.log"
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [
                *(str(python), "main.py", "--base-directory", str(folder), "--port", str(self.port)),
                *("--disable-auto-launch", "--disable-api-nodes", "--front-end-root", str(folder / "frontend")),
                *("--disable-metadata", "--database-url", "sqlite:///:memory:"),
                *options,
            ],
            cwd=comfyui,
            env={**os.environ, **(environment or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self._wait_until_up()
        # What it had said and started by then.
        self.first_words, self.first_children = self.log(), self.children()

    def _wait_until_up(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.25)
            else:
                return
        self.stop()
        raise RuntimeError(f"ComfyUI did not start in {seconds} s:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return json.loads(response.read())

    def free(self, freed: Callable[[], bool], *, memory: bool = True, seconds: float = 30) -> None:
        """Asks ComfyUI to unload models until ``freed()``: it misses what is asked just when a prompt ends."""
        deadline = time.monotonic() + patience(seconds)
        # With nothing to free it might act on what is asked only after the next prompt.
        while not freed():
            self.post("/free", {"unload_models": True, "free_memory": memory})
            asked = time.monotonic()
            while time.monotonic() < asked + 3:
                if freed():
                    return
                time.sleep(0.1)
            assert time.monotonic() < deadline, "/free did not free what it should"

    def post(self, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
        return json.loads(text) if text else {}

    def children(self) -> list[tuple[int, str]]:
        """Ids and command lines of the server's child processes; they and its threads may end meanwhile."""
        found = []
        for listing in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for pid in listing.read_text().split():
                    with contextlib.suppress(OSError):
                        found.append((int(pid), Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")))
        return found

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)
        self._log.close()

    def run(self, graph: dict, *, on_message=None, timeout: float = 240) -> "Run":
        """Sends a prompt and follows it to its end."""
        client_id = uuid.uuid4().hex
        with closing(
            websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=timeout)
        ) as ws:
            sent = self.post("/prompt", {"prompt": graph, "client_id": client_id})
            run = Run(self, sent["prompt_id"])
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                message = ws.recv()
                if isinstance(message, bytes):
                    run.take_bytes(message)
                    continue
                message = json.loads(message)
                run.messages.append(message)
                if on_message:
                    on_message(message)
                data = message.get("data", {})
                if data.get("prompt_id") != run.prompt_id:
                    continue
                if message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    run.ended = message["type"]
                    run.detail = data
                    return run
            raise AssertionError(f"the prompt did not end in {timeout} s:\n{self.log()[-4000:]}")


class Run:
    """What came over the websocket of one prompt."""

    def __init__(self, server: Server, prompt_id: str) -> None:
        self.server = server
        self.prompt_id = prompt_id
        self.messages: list[dict] = []
        self.previews: list[bytes] = []
        self.texts: list[tuple[str, str]] = []  # which node says what
        self.ended = ""
        self.detail: dict = {}

    def take_bytes(self, message: bytes) -> None:
        """A preview; or a text, with the length of its node's id before that, as ComfyUI's protocol.py has it."""
        kind, length = struct.unpack(">II", message[:8])
        if kind == _TEXT:
            self.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))
        else:
            self.previews.append(message)

    def check(self) -> "Run":
        assert self.ended == "execution_success", f"{self.detail}\n{self.server.log()[-3000:]}"
        return self

    def progress(self, node: str) -> list[tuple[float, float]]:
        return [
            (m["data"]["value"], m["data"]["max"])
            for m in self.messages
            if m["type"] == "progress" and m["data"]["node"] == node
        ]

    def outputs(self, node: str) -> dict:
        # The server writes its history a moment after it has said that the prompt succeeded.
        deadline = time.monotonic() + 10
        while self.prompt_id not in (history := self.server.get(f"/history/{self.prompt_id}")):
            assert time.monotonic() < deadline, "the prompt is not in the history"
            time.sleep(0.05)
        return history[self.prompt_id]["outputs"][node]


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def saves(server: Server, container: str, codec: str) -> bool:
    """Whether its Save Video has this choice."""
    choices = str(server.get("/object_info/SaveVideo"))
    return f"'{container}'" in choices and f"'{codec}'" in choices
