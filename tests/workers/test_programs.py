"""Whole programs that decode on several workers: what these import, and what is left when a program ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.processes import gone, patience, shared_names, state, wait_until

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 21
# Without a guard for __main__, as users write it, and as ComfyUI's main.py is for a child.
PROGRAM = """
    import os, sys, time
    import comfy
    import torch
    import wan_vae_parallel as wvp
    print("program runs", flush=True)
    vae = wvp.load_vae(sys.argv[1], devices="cpu,cpu", chunk=1)
    torch.manual_seed(1)
    latents = torch.randn(1, 16, 6, 4, 3)
    {decode}
"""
# Python imports it first of all, in each process: it writes down what the process imports and its environment.
SPY = """
    import json, logging, os, sys, threading, time
    def write():
        said = False
        while True:
            # Only workers have a handler for the engine's words: it hands them to the parent.
            if not said and "SPY_SPEAKS" in os.environ and logging.getLogger("wan_vae_parallel").handlers:
                said = True
                logging.getLogger("wan_vae_parallel.spy").warning("a word that all workers say")
                logging.getLogger("wan_vae_parallel.spy").info("a word of " + str(os.getpid()))
            seen = {"modules": sorted(sys.modules), "environment": dict(os.environ), "arguments": sys.argv}
            path = os.path.join(os.environ["SPY_FOLDER"], f"{os.getpid()}.json")
            with open(path + ".new", "w") as file:
                json.dump(seen, file)
            os.replace(path + ".new", path)
            time.sleep(0.2)
    threading.Thread(target=write, daemon=True).start()
"""


@pytest.fixture
def program(path, tmp_path):
    """Starts PROGRAM with the lines given; temporary files go to ``tmp_path / "temporary"``."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").touch()
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(textwrap.dedent(SPY))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "seen").mkdir()
    started = []

    def start(decode, **more):
        main = tmp_path / "main.py"
        main.write_text(textwrap.dedent(PROGRAM).format(decode=decode))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "spy"), str(ROOT)]),
            "SPY_FOLDER": str(tmp_path / "seen"),
            "TMPDIR": str(tmp_path / "temporary"),
            "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
            **more,
        }
        process = subprocess.Popen(
            [sys.executable, str(main), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=tmp_path,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_workers_do_not_run_the_program_again_nor_import_what_it_imports(program, tmp_path):
    process = program("print(vae.decode(latents).shape[1], 'frames', flush=True); time.sleep(0.5); vae.close()")
    output, _ = process.communicate(timeout=patience(60))
    assert process.returncode == 0, output
    assert output.splitlines() == ["program runs", f"{FRAMES} frames"]
    seen = {int(file.stem): json.loads(file.read_text()) for file in (tmp_path / "seen").glob("*.json")}
    assert "comfy" in seen[process.pid]["modules"]
    workers = [one for one in seen.values() if "wan_vae_parallel.workers.worker" in one["modules"]]
    assert len(workers) == 2
    for worker in workers:
        assert not [name for name in worker["modules"] if name.partition(".")[0] in ("comfy", "nodes", "main")]
        # Theirs to choose: what a program sets for itself may not work between processes.
        assert "PYTORCH_CUDA_ALLOC_CONF" not in worker["environment"]
    assert "PYTORCH_CUDA_ALLOC_CONF" in seen[process.pid]["environment"]
    assert os.listdir(tmp_path / "temporary") == []


def test_what_workers_log_reaches_the_programs_log_once(program):
    lines = [
        "import logging",
        "logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(name)s: %(message)s')",
        "vae.decode(latents, on_chunk=lambda done, *_: time.sleep(0.3) if done == 1 else None)",
        "vae.decode(latents); vae.close()",
    ]
    output, _ = program("\n".join(lines), SPY_SPEAKS="1").communicate(timeout=patience(60))
    assert output.count("a word that all workers say") == 1, output
    assert output.count("a word of ") == 1  # the first rank's


def test_releasing_during_a_decode_ends_it_with_an_error(program):
    # In a process of its own, since a thread that hangs can't be ended.
    lines = [
        "import threading",
        "release = vae.release, threading.Thread(target=vae.release).start",
        "for action in release:",
        "    try: vae.decode(latents, on_chunk=lambda done, *_: action() if done == 1 else None)",
        "    except wvp.WanVAEError as error: print('told', flush=True)",
        "print(vae.decode(latents).shape[1], 'frames', flush=True)",
        "vae.close()",
    ]
    process = program("\n".join(lines))
    try:
        output, _ = process.communicate(timeout=patience(30))
    except subprocess.TimeoutExpired:
        pytest.fail("the decode hangs")
    assert output.splitlines() == ["program runs", "told", "told", f"{FRAMES} frames"]


@pytest.mark.slow
def test_releasing_while_workers_start_ends_the_start(program):
    lines = [
        "import threading",
        "def release():",
        "    while vae._engine.stage != 'loading': time.sleep(0.001)",
        "    vae.release()",
        "threading.Thread(target=release).start()",
        "try: vae.decode(latents)",
        "except wvp.WorkerError as error: print(error, flush=True)",
        "print(vae.loaded, vae.decode(latents).shape[1], flush=True)",
    ]
    output, _ = program("\n".join(lines)).communicate(timeout=patience(60))
    assert "were ended while they" in output
    assert f"False {FRAMES}" in output


@pytest.mark.slow
def test_a_program_that_ends_with_an_open_stream_ends_and_takes_its_workers_along(program, tmp_path):
    process = program("stream = vae.decode_stream(latents); next(stream); raise SystemExit(3)")
    process.communicate(timeout=patience(30))
    assert process.returncode == 3
    seen = {int(file.stem) for file in (tmp_path / "seen").glob("*.json")}
    assert len(seen) >= 3
    assert wait_until(lambda: all(map(gone, seen)), 5)


@pytest.mark.slow
def test_a_forked_child_neither_keeps_the_workers_nor_ends_them(program, tmp_path):
    lines = [
        "vae.decode(latents)",
        "if os.fork() == 0:",
        "    try: vae.decode(latents)",
        "    except wvp.WanVAEError as error: print(error, flush=True)",
        "    vae.close(); del vae",
        "    time.sleep(60)",
        "time.sleep(1)",
        "print(vae.decode(latents).shape[1], 'frames', flush=True)",
        "time.sleep(60)",
    ]
    process = program("\n".join(lines))
    output = [process.stdout.readline() for _ in range(3)]
    assert any("forked" in line for line in output)
    assert f"{FRAMES} frames\n" in output
    workers = [
        int(file.stem)
        for file in (tmp_path / "seen").glob("*.json")
        if "wan_vae_parallel.workers.worker" in json.loads(file.read_text())["modules"]
    ]
    forked = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    assert len(workers) == 2
    assert wait_until(lambda: all(map(gone, workers)), 5)
    for pid in set(forked) - set(workers):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pids_of(output):
    """What a program wrote as ``print('pids', ...)``."""
    return [int(word) for line in output.splitlines() if line.startswith("pids") for word in line.split()[1:]]


PRINT_PIDS = "print('pids', *[worker.pid for worker in vae._engine.workers], flush=True)"


def test_a_program_ends_though_a_worker_is_stopped(program):
    process = program(
        f"import signal; vae.decode(latents); {PRINT_PIDS}; os.kill(vae._engine.workers[1].pid, signal.SIGSTOP)"
    )
    try:
        output, _ = process.communicate(timeout=patience(20))
    except subprocess.TimeoutExpired:
        pytest.fail("it waits for the worker")
    assert process.returncode == 0, output
    assert len(pids_of(output)) == 2
    assert all(map(gone, pids_of(output)))


def test_ctrl_c_is_the_programs_alone(program):
    # A terminal sends it to all processes of the session in front.
    process = program(f"vae.decode(latents); {PRINT_PIDS}; time.sleep(60)")
    assert process.stdout.readline() == "program runs\n"
    pids = pids_of(process.stdout.readline())
    assert len(pids) == 2
    for pid in pids:
        assert os.getsid(pid) == pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (ignored,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigIgn")]
        assert ignored >> signal.SIGINT - 1 & 1
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert not any(map(gone, pids))


def test_a_forked_child_that_ends_leaves_workers_and_streams_alone(program):
    lines = [
        "import gc",
        f"vae.decode(latents); {PRINT_PIDS}",
        "if os.fork() == 0: sys.exit()",
        "os.wait()",
        "stream = vae.decode_stream(latents); frames = next(stream).shape[1]",
        "if os.fork() == 0:",
        "    try: next(stream)",
        "    except wvp.WanVAEError as error: print(error, flush=True)",
        "    stream.close(); del stream, vae; gc.collect(); sys.exit()",
        "os.wait()",
        f"frames += sum(part.shape[1] for part in stream); print(frames, 'frames', flush=True); {PRINT_PIDS}",
    ]
    output, _ = program("\n".join(lines)).communicate(timeout=patience(60))
    assert "forked from the one that works with the VAE" in output
    assert f"{FRAMES} frames" in output, output
    assert "Error" not in output, output
    assert len(pids_of(output)) == 4
    assert pids_of(output)[:2] == pids_of(output)[2:]


@pytest.mark.slow
def test_a_worker_that_was_killed_is_named_where_nobody_hears_of_exit_codes(program):
    lines = [
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "def kill(done, *_):",
        "    if done == 1: os.kill(vae._engine.workers[1].pid, signal.SIGKILL); time.sleep(0.3)",
        "try: vae.decode(latents, on_chunk=kill)",
        "except wvp.WorkerError as error: print(str(error).splitlines()[0], flush=True)",
        "vae.decode(latents); os.kill(vae._engine.workers[1].pid, signal.SIGKILL); time.sleep(0.5)",
        "print(vae.decode(latents).shape[1], 'frames', flush=True)",
    ]
    output, _ = program("\n".join(lines)).communicate(timeout=patience(90))
    assert "worker 1 on cpu died with exit code unknown" in output, output
    assert f"{FRAMES} frames" in output


@pytest.mark.parametrize("before", ["vae.release(); more = 6", pytest.param("more = 1", marks=pytest.mark.slow)])
def test_limits_of_the_system_are_errors_that_name_a_way_out(program, before):
    lines = [
        "import resource",
        before,
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + more,) * 2)",
        "try: vae.decode(latents)",
        "except wvp.WorkerError as error: print(error, flush=True)",
    ]
    output, _ = program("\n".join(lines)).communicate(timeout=patience(60))
    assert "Too many open files" in output
    assert "ulimit -n" in output
    assert "Traceback" not in output, output


def test_a_program_that_only_loads_a_vae_ends_with_its_workers(program):
    started = time.monotonic()
    output, _ = program(f"{PRINT_PIDS}; loaded = time.monotonic()").communicate(timeout=60)
    assert output.splitlines()[0] == "program runs"
    assert len(pids_of(output)) == 2, output
    assert all(map(gone, pids_of(output)))
    assert len(output.splitlines()) == 2, output
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "where", [pytest.param("beside the program", marks=pytest.mark.slow), "in a folder that is gone"]
)
def test_where_a_program_runs_is_nothing_to_its_workers(program, tmp_path, where):
    lines = ["print(vae.decode(latents).shape[1], 'frames', flush=True)"]
    if where == "in a folder that is gone":
        folder = tmp_path / "gone"
        lines.insert(
            0, f"os.mkdir({str(folder)!r}); os.chdir({str(folder)!r}); os.rmdir({str(folder)!r}); vae.release()"
        )
    else:
        # What the program itself has imported already.
        write = "open(os.path.join(sys.path[0], name + '.py'), 'w').write('raise RuntimeError')"
        lines.insert(0, f"for name in ('numpy', 'random', 'socket', 'worker'): {write}")
        lines.insert(1, "vae.release()")
    process = program("\n".join(lines))
    output, _ = process.communicate(timeout=90)
    assert f"{FRAMES} frames" in output, output
    assert "Traceback" not in output, output


@pytest.mark.parametrize(
    "when",
    ["decoding", "parked", *(pytest.param(when, marks=pytest.mark.slow) for when in ("starting", "idle", "stopped"))],
)
def test_a_killed_program_takes_its_workers_along(program, tmp_path, when):
    names = shared_names()
    wait = "lambda *_: (print('now', flush=True), time.sleep(60))" if when == "decoding" else "None"
    park = "vae.park();" if when == "parked" else ""
    process = program(f"vae.decode(latents, on_chunk={wait}); {park} print('now', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "program runs\n"

    def descendants():
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _parent(entry) == process.pid and "resource_tracker" not in _command(entry)
        ]

    if when == "starting":
        assert wait_until(lambda: len(descendants()) == 2, 20)
        time.sleep(0.3)  # they import torch
    else:
        assert process.stdout.readline() == "now\n"
    workers = descendants()
    assert len(workers) == 2
    if when == "stopped":
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        assert wait_until(lambda: [state(pid) for pid in workers] == ["T", "T"], 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        # A worker that imports torch looks up when it is done with that, which takes a while on a busy machine.
        assert wait_until(lambda: all(map(gone, workers)), 15 if when == "starting" else 5)
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: os.listdir(tmp_path / "temporary") == [], 1)
    assert wait_until(lambda: shared_names() <= names, 1)


def _parent(entry):
    with contextlib.suppress(OSError):
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _command(entry):
    with contextlib.suppress(OSError):
        return (entry / "cmdline").read_bytes().decode(errors="replace")
    return ""
