"""What counts as which error, what errors are called, and whom their advice is for."""

from __future__ import annotations

import ast
import errno
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_vae_parallel as wvp
from wan_vae_parallel.errors import about_file, is_out_of_memory, summary

PACKAGE = Path(wvp.__file__).parent


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        # NCCL makes its connections late, when a device may be full.
        (RuntimeError("NCCL error in: ... Last error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("NCCL error in: ... Last error:\nCuda failure 999 'unknown error'"), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error, counts):
    assert is_out_of_memory(error) == counts


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("two\n  lines"), "two lines"),
        (RuntimeError("no way\nException raised from f at /x.cpp:1 (most recent call first):\nframe #0"), "no way"),
        (
            RuntimeError(
                "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/\n"
                "CUDA kernel errors might be asynchronously reported at some other API call, so ..."
            ),
            "CUDA error: out of memory",
        ),
        (
            RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported at ..."),
            "CUDA error: misaligned address",
        ),
    ],
    ids=["nothing", "two lines", "a stack", "advice and an address", "advice"],
)
def test_a_summary_is_one_line_without_what_is_for_developers(error, told):
    assert summary(error) == told


def test_errors_are_called_by_the_packages_name_wherever_it_lies():
    # ComfyUI writes an error's module before its class, and a node pack's modules are named by their folder.
    script = (
        "import importlib, importlib.util, sys\n"
        "name = '/home/user/ComfyUI/custom_nodes/wan-vae-parallel'\n"
        "at = {'submodule_search_locations': [sys.argv[1]]}\n"
        "spec = importlib.util.spec_from_file_location(name, sys.argv[1] + '/__init__.py', **at)\n"
        "package = importlib.util.module_from_spec(spec)\n"
        "sys.modules[name] = package\n"
        "spec.loader.exec_module(package)\n"
        "failures = importlib.import_module(name + '.workers.failures')\n"
        "errors = importlib.import_module(name + '.errors')\n"
        "kinds = [errors.WanVAEError, *errors.WanVAEError.__subclasses__()]\n"
        "assert failures.StepOutOfMemory in kinds\n"
        "print(*{kind.__module__ for kind in kinds})\n"
    )
    run = subprocess.run([sys.executable, "-c", script, PACKAGE], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["wan_vae_parallel"]


def test_errors_can_be_pickled_and_say_the_same():
    for kind in (wvp.OutOfMemoryError, wvp.OutputError, wvp.LatentError):
        error = kind("no room; free some", "stream the frames")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error) == "no room; free some, or stream the frames"
        assert error.text == "no room; free some"


# What only helps who calls from Python: calls, indices, arguments, types.
PYTHON = re.compile(r"\w\(\w*\)|\[None\]|\bpermute\b|\w_stream\b|state dict|[a-z_]=\w|[;:] pass\b|\btorch\.\w|\bNone\b")


def raised(path):
    """Where a module makes an error of the package's, the error's name, and the text of its first argument."""
    for call in ast.walk(ast.parse(path.read_text())):
        name = getattr(getattr(call, "func", None), "id", "")
        if name.endswith("Error") and hasattr(wvp, name) and call.args:
            parts = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
            yield f"{path.name}:{call.lineno}", name, " ".join(part for part in parts if isinstance(part, str))


def test_python_advice_stands_where_graphs_and_shells_dont_read_it():
    found = [error for path in PACKAGE.rglob("*.py") for error in raised(path)]
    assert len(found) > 150
    # An argument is wrong where Python gave it: the nodes' inputs and the shell's options are checked by themselves.
    unfit = [(where, text) for where, name, text in found if name != "ArgumentError" and PYTHON.search(text)]
    assert not unfit
    assert PYTHON.search("take the frames from decode_stream")
    assert PYTHON.search("divide them, as frames.float() / 255")


# What an error may begin with but words: short names, of a setting, a device, a file without its folder.
LEADS = re.compile(
    r"len\(\w+\)|name|named|source|self\.name|self\.title|chosen\.title|(self|engine)\.source\.name|path\.name"
    r"|checkpoint\.source|device|worker|waited|error|reason|self\._name\(self\.rank\)|', '\.join\(.*\)|videos \*.*"
)


def test_errors_lead_with_words_and_not_with_a_path_or_an_object():
    # `raised` in whatever way: by the class, by what a caller handed in, or returned.
    leads = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "nodes").glob("*.py")]:
        if path.parent.name == "kernels":  # nobody hears of these
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(call, "func", None), "id", "") or getattr(getattr(call, "func", None), "attr", "")
            if not name.lower().endswith(("error", "error_class")) or not getattr(call, "args", None):
                continue
            if isinstance(call.args[0], ast.JoinedStr) and isinstance(
                first := call.args[0].values[0], ast.FormattedValue
            ):
                leads.append((f"{path.name}:{call.lineno}", ast.unparse(first.value), first.conversion))
    assert len(leads) > 30
    # A shell's option is named before its value.
    unfit = [one for one in leads if not LEADS.fullmatch(one[1]) or one[2] == ord("r")]
    assert not [one for one in unfit if not (one[0].startswith("shared.py") and one[1] == "text")]


def test_what_is_wrong_with_a_file_comes_before_where_it_lies(tmp_path):
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    others = {"pickle.pt": b"\x80\x02", "page.safetensors": b"<html>", "table.safetensors": b"{}"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    for wrong in (file, *map(tmp_path.joinpath, ("empty", "none.safetensors", *others))):
        with pytest.raises(wvp.CheckpointError) as caught:
            wvp.load_vae(wrong, devices="cpu")
        said = str(caught.value)
        assert said.startswith(f"{wrong.name} ")
        assert said.count(str(tmp_path)) == 1
        assert said.endswith(f"{wrong})")
    with pytest.raises(wvp.CheckpointError) as caught:
        wvp.load_vae(file, devices="cpu")
    damaged = "vae.safetensors can't be read, as it is damaged or not downloaded in full: fetch it again ("
    assert str(caught.value).startswith(damaged)


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("vae.safetensors", None, "vae.safetensors is empty; fetch it again"),
        ("/m/vae.safetensors", None, "vae.safetensors is empty; fetch it again (/m/vae.safetensors)"),
        ("/m/vae.safetensors", "too short", "vae.safetensors is empty; fetch it again (too short; /m/vae.safetensors)"),
        (
            "/m/vae.safetensors",
            "no '/m/vae.safetensors'",
            "vae.safetensors is empty; fetch it again (no '/m/vae.safetensors')",
        ),
        ("/", None, "/ is empty; fetch it again"),
    ],
)
def test_a_place_is_told_once(path, error, said):
    assert about_file(path, "is empty; fetch it again", error) == said


@pytest.mark.parametrize(
    ("settings", "results", "advice"),
    [
        ({"dtype": torch.float16, "encode_dtype": torch.float16}, "latents", "try dtype bfloat16 or float32"),
        # dtype is bfloat16 already: it is the encoder's that is to be changed
        ({"dtype": torch.bfloat16, "encode_dtype": torch.float16}, "latents", "try encode_dtype bfloat16 or float32"),
    ],
)
def test_advice_on_overflow_names_the_setting_that_overflows(tmp_path, settings, results, advice):
    path = tmp_path / "vae.safetensors"
    wvp.save_demo_checkpoint(path, width=8)
    tensors = load_file(path)
    tensors["encoder.conv1.bias"][0] = 60000.0  # what float16 can hold, and its square can't
    tensors["encoder.conv1.bias"][1] = 60000.0
    tensors["encoder.conv1.weight"] *= 60000.0
    save_file(tensors, path)
    with wvp.load_vae(path, devices="cpu", **settings) as vae, pytest.raises(wvp.WanVAEError) as caught:
        vae.encode(torch.rand(1, 1, 16, 16, 3))
    assert f"{results} are NaN: in float16" in str(caught.value)
    assert advice in str(caught.value)
