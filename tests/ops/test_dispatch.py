"""Whether kernels of our own run, where something is missing; with a GPU that only says it is one."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from wan_vae_parallel.ops import attention, dispatch, kernels

CUDA = torch.device("cuda", 0)
PROBE = "wan_vae_parallel.ops.kernels.probe"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    for name in ("_why_not", "_kernels_run_on"):
        getattr(dispatch, name).cache_clear()
    dispatch.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setitem(sys.modules, "triton.language", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(language=None))
    yield
    for name in ("_why_not", "_kernels_run_on"):
        getattr(dispatch, name).cache_clear()
    dispatch.say_once.cache_clear()
    attention._kernels.cache_clear()


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
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    else:
        monkeypatch.setitem(sys.modules, "triton.language", None)
    assert not dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not caplog.records
    assert not dispatch.kernels_multiply(CUDA, torch.bfloat16)
    assert calls == []
    assert ("older than" if what == "old" else "Triton is missing") in caplog.text


def test_plans_try_nothing(monkeypatch):
    calls = tried(monkeypatch, "it can't")
    assert dispatch.kernels_expected(CUDA, torch.bfloat16)
    assert not dispatch.kernels_expected(CUDA, torch.float32)
    assert not dispatch.kernels_expected(torch.device("cpu"), torch.bfloat16)
    assert calls == []


def test_attention_without_gluon_takes_the_kernel_that_needs_none(monkeypatch, caplog):
    plain = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention", plain)
    monkeypatch.setattr("wan_vae_parallel.ops.kernels.attention", plain, raising=False)
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention_hopper", None)
    monkeypatch.delattr("wan_vae_parallel.ops.kernels.attention_hopper", raising=False)
    attention._kernels.cache_clear()
    assert [attention._kernels() for _ in range(2)] == [(plain, None)] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "slower kernel, whose frames are the same" in said


def test_attention_without_any_says_what_is_lost(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wan_vae_parallel.ops.kernels.attention", None)
    monkeypatch.delattr("wan_vae_parallel.ops.kernels.attention", raising=False)
    attention._kernels.cache_clear()
    assert attention._kernels() == (None, None)
    assert "last bits depend on chunks and devices" in caplog.text
