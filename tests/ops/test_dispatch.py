"""Whether kernels of our own run, where something is missing; with a GPU that only says it is one."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from wan_vae_parallel.ops import attention, dispatch, kernels
from wan_vae_parallel.ops import gpu as gpu_facts
from wan_vae_parallel.ops.gpu import Gpu

# Before another Triton stands in for the one that is there.
from wan_vae_parallel.ops.kernels import triton_version  # noqa: F401

CUDA = torch.device("cuda", 0)
PROBE = "wan_vae_parallel.ops.kernels.probe"
WHY_NOT_LOADED = dispatch._why_not_loaded
HOPPER = Gpu("Test GPU", (9, 0), 132, 232448)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    def forget():
        for cached in (dispatch._why_not, dispatch._has_compiler, dispatch.say_once, gpu_facts.gpu, attention._kernels):
            cached.cache_clear()

    forget()
    monkeypatch.setattr(dispatch, "_why_not_loaded", lambda: "")
    monkeypatch.setattr(dispatch, "_tried", {})
    monkeypatch.setattr(dispatch, "_failed_on", set())
    monkeypatch.setattr(gpu_facts, "_read", lambda _: HOPPER)
    monkeypatch.setitem(sys.modules, "triton.language", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(language=None, __version__="3.6.0"))
    yield
    forget()


def tried(monkeypatch, answer):
    calls = []
    probe = types.SimpleNamespace(why_not=lambda device: calls.append(device) or answer)
    monkeypatch.setitem(sys.modules, PROBE, probe)
    monkeypatch.setattr(kernels, "probe", probe, raising=False)  # where the real one was imported before
    return calls


def test_kernels_run_once_one_was_tried(monkeypatch, caplog):
    calls = tried(monkeypatch, "")
    assert [dispatch.kernels_multiply(CUDA, torch.bfloat16) for _ in range(2)] == [True, True]
    assert calls == [CUDA]
    assert not caplog.records


def test_a_compiler_that_does_not_work_is_said_once(monkeypatch, caplog):
    tried(monkeypatch, "Triton can't compile kernels (Failed to find C compiler)")
    assert [dispatch.kernels_multiply(CUDA, torch.bfloat16) for _ in range(2)] == [False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cuda:0 with PyTorch's own kernels, which is slower: Triton can't compile" in said


@pytest.mark.parametrize("what", ["triton", "old"])
def test_what_is_known_to_lack_kernels_tries_none(monkeypatch, caplog, what):
    calls = tried(monkeypatch, "")
    if what == "old":
        monkeypatch.setattr(gpu_facts, "_read", lambda _: HOPPER._replace(capability=(7, 5)))
    else:
        monkeypatch.setitem(sys.modules, "triton.language", None)
    assert not dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not caplog.records
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert calls == []
    said = "compute capability 7.5, and our kernels are written for 8.0" if what == "old" else "Triton is missing"
    assert said in caplog.text


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_where_triton_is_missing_its_package_is_named(monkeypatch, caplog, platform, package):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert f"pip install {package} brings it" in caplog.text


def test_plans_try_nothing(monkeypatch):
    calls = tried(monkeypatch, "it can't")
    assert dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not dispatch.kernels_expected(CUDA, torch.float32)
    assert not dispatch.kernels_expected(torch.device("cpu"), torch.bfloat16)
    assert calls == []


def test_a_triton_that_can_not_be_loaded_is_said(monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("libtriton.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "triton.language")
    monkeypatch.setitem(sys.modules, "triton", Broken("triton"))
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert "Triton" in caplog.text
    assert "install" in caplog.text


def test_a_triton_that_has_renamed_something_is_said_with_what_to_install(monkeypatch, caplog):
    calls = tried(monkeypatch, "")
    # The real one, with a Triton that has nothing that the kernels' modules name.
    monkeypatch.setattr(dispatch, "_why_not_loaded", WHY_NOT_LOADED)
    for name in ("conv", "down_conv", "frames", "head_conv", "norm", "pixels", "products", "shortcut"):
        monkeypatch.delitem(sys.modules, f"wan_vae_parallel.ops.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert calls == []
    assert "our kernels can't be loaded with Triton 3.6.0" in caplog.text
    assert f"install the one that torch {torch.__version__} asks for" in caplog.text


def test_plans_know_what_was_tried_before(monkeypatch):
    tried(monkeypatch, "it can't")
    assert dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert not dispatch.kernels_expected(CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("platform", "found", "expected"),
    [("linux", {}, False), ("linux", {"gcc"}, True), ("linux", {"clang"}, True), ("win32", {}, True)],
)
def test_plans_know_whether_there_is_a_compiler(monkeypatch, platform, found, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: name if name in found else None)
    assert dispatch.kernels_expected(CUDA, torch.bfloat16) == expected


def test_plans_know_that_a_kernel_failed(monkeypatch):
    tried(monkeypatch, "")
    assert dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert dispatch.kernels_expected(CUDA, torch.bfloat16)
    with dispatch.FallingBack(types.SimpleNamespace(device=CUDA)):
        raise dispatch.KernelError("_conv_kernel: OutOfResources")
    assert dispatch.kernels_failed(CUDA)
    assert not dispatch.kernels_expected(CUDA, torch.bfloat16)
    # Others may still run.
    assert dispatch.kernels_multiply(CUDA, torch.bfloat16)


def test_plans_know_that_a_kernel_failed_in_another_process(monkeypatch):
    tried(monkeypatch, "")
    other = torch.device("cuda", 1)
    dispatch.note_failed(other)
    assert dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not dispatch.kernels_expected(other, torch.bfloat16)


def test_where_no_kernel_runs_they_failed(monkeypatch):
    tried(monkeypatch, "it can't")
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert dispatch.kernels_failed(CUDA)


def test_a_kernel_that_fails_is_said_once_with_what_to_report(caplog):
    for _ in range(2):
        with dispatch.FallingBack(types.SimpleNamespace(device=CUDA)):
            raise dispatch.KernelError("_norm_kernel: RuntimeError ptxas error")
    (said,) = [record.getMessage() for record in caplog.records]
    for word in ("Test GPU (sm_90, torch ", "Triton 3.6.0", "_norm_kernel: RuntimeError ptxas error", "issues"):
        assert word in said


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), ValueError("no such shape")])
def test_nothing_else_falls_back(error, caplog):
    with pytest.raises(type(error)), dispatch.FallingBack(types.SimpleNamespace(device=CUDA)):
        raise error
    assert not caplog.records


def test_attention_without_gluon_takes_the_kernel_that_needs_none(monkeypatch, caplog):
    plain = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention", plain)
    monkeypatch.setattr("wan_vae_parallel.ops.kernels.attention", plain, raising=False)
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention_hopper", None)
    monkeypatch.delattr("wan_vae_parallel.ops.kernels.attention_hopper", raising=False)
    attention._kernels.cache_clear()
    assert [attention._kernels(CUDA) for _ in range(2)] == [(plain, None)] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "slower kernel, whose frames are the same" in said


def test_attention_without_any_says_what_is_lost(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention", None)
    monkeypatch.delattr("wan_vae_parallel.ops.kernels.attention", raising=False)
    attention._kernels.cache_clear()
    assert attention._kernels(CUDA) == (None, None)
    assert "last bits depend on chunks and devices" in caplog.text
