"""A kernel that can't be compiled or launched, in any operation: PyTorch's do its work. With stand-ins for kernels."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from tests.ops import plain
from wan_vae_parallel.ops import attention, conv, dispatch, frames, kernels, norm_silu, pixels, shortcut
from wan_vae_parallel.ops.dispatch import KernelError
from wan_vae_parallel.ops.pixels import Margins, tap_channels

SIZE = (2, 4, 6)
TRIED = "_some_kernel: RuntimeError ptxas error: no such instruction"


class Broken(types.SimpleNamespace):
    """Kernels that take everything, and fail."""

    def __init__(self, error):
        super().__init__(error=error, tried=[], MAX_COLUMNS=64)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith(("takes", "can_")):
            return lambda *_, **__: True
        if name.startswith("why_not"):
            return lambda *_, **__: ""

        def fail(*_arguments, **_options):
            self.tried.append(name)
            raise self.error

        return fail


@pytest.fixture
def broken(monkeypatch):
    """Puts kernels that fail with an error in the place of all."""

    def put(error):
        stand_in = Broken(error)
        for name in ("attention", "conv", "down_conv", "frames", "head_conv", "norm", "pixels", "shortcut"):
            monkeypatch.setitem(sys.modules, f"wan_vae_parallel.ops.kernels.{name}", stand_in)
            monkeypatch.setattr(kernels, name, stand_in, raising=False)
        for module in (attention, conv, frames, norm_silu, pixels, shortcut):
            monkeypatch.setattr(module, "kernels_run", lambda _: True)
        monkeypatch.setattr(attention, "_kernels", lambda _: (stand_in, None))
        return stand_in

    dispatch.say_once.cache_clear()
    monkeypatch.setattr(dispatch, "_failed_on", set())
    yield put
    dispatch.say_once.cache_clear()


def _random(*shape):
    return plain.random(*shape)


def _convolved():
    return conv.conv(*plain.conv_problem(SIZE, 16, 8), residual=_random(*SIZE, 8))


def _into_its_residual():
    residual = _random(*SIZE, 8)
    return conv.conv(*plain.conv_problem(SIZE, 16, 8), residual=residual, out=residual)


def _upsampled():
    _, (arena, slots, weight, bias) = plain.upsample_problem(SIZE, 16, 8)
    return conv.upsample_conv(arena, slots, weight, bias, folded=conv.fold_upsample_weight(weight))


def _downsampled():
    _, problem = plain.down_problem(SIZE, 16, 8)
    return conv.down_conv(*problem)


def _head():
    problem = plain.conv_problem(SIZE, 16, 3)
    prepared = conv.PreparedHead(torch.empty(0), 1, 1, False) if conv.kernels_run(problem[0]) else None
    return conv.head_conv(*problem, prepared=prepared)


def _pointwise():
    return conv.pointwise_conv(_random(*SIZE, 16), _random(8, 16, 1, 1, 1), _random(8))


def _normed():
    return norm_silu.rms_norm(_random(*SIZE, 16), _random(16))


def _norm_silu():
    arena, slots = torch.zeros(2, 6, 8, 16), torch.tensor([1, 0], dtype=torch.int32)
    norm_silu.norm_silu(_random(*SIZE, 16), _random(16), arena=arena, slots=slots)
    return arena


def _attended():
    return attention.frame_attention(*(_random(2, 9, 16) for _ in range(3)))


def _pictures():
    return frames.to_frames(_random(*SIZE, 12), 2)


def _gathered():
    arena, slots = torch.zeros(2, 4, 6, tap_channels(3)), torch.tensor([1, 0], dtype=torch.int32)
    pixels.gather_taps(_random(*SIZE, 3), patch=1, margins=Margins(), arena=arena, slots=slots)
    return arena


def _duplicated():
    out = _random(2, 8, 12, 8)
    shortcut.add_duplicated(_random(*SIZE, 16), time_factor=2, phases=(1, 2), out=out)
    return out


def _averaged():
    out = _random(1, 2, 3, 16)
    shortcut.add_averaged(_random(*SIZE, 8), time_factor=2, out=out)
    return out


OPERATIONS = [
    _convolved, _into_its_residual, _upsampled, _downsampled, _head, _pointwise, _normed, _norm_silu, _attended,
    _pictures, _gathered, _duplicated, _averaged,
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_pytorchs_kernels_do_what_ours_can_not_and_it_is_said_once(broken, operation, caplog):
    wanted = operation()
    stand_in = broken(KernelError(TRIED))
    for _ in range(2):
        assert torch.equal(operation(), wanted)
    assert len(stand_in.tried) == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert TRIED in said
    assert "Please report this line" in said
    assert dispatch.kernels_failed(wanted.device)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), ValueError("a shape")], ids=repr)
def test_out_of_memory_and_wrong_arguments_are_no_reason_to_fall_back(broken, operation, error):
    broken(error)
    with pytest.raises(type(error)):
        operation()


def test_hoppers_attention_is_followed_by_the_other_kernel_of_ours(broken, monkeypatch, caplog):
    wanted = _attended()
    hopper = broken(KernelError(TRIED))
    ours = types.SimpleNamespace(frame_attention=lambda *_: wanted, why_not=lambda *_: "")
    monkeypatch.setattr(attention, "_kernels", lambda _: (ours, hopper))
    assert _attended() is wanted
    assert hopper.tried == ["frame_attention"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "a slower one of ours does its work, to the same bits" in said
    assert not dispatch.kernels_failed(wanted.device)


@pytest.mark.parametrize(
    ("takes", "lacking", "said"),
    [(True, "", []), (True, "no such Triton", ["no such Triton"]), (False, "no such Triton", [])],
)
def test_that_hoppers_own_attention_is_missing_is_said_where_it_is_wanted(monkeypatch, caplog, takes, lacking, said):
    ours = types.SimpleNamespace(frame_attention="ours", why_not=lambda *_: "")
    hopper = types.SimpleNamespace(
        frame_attention="Hopper's", can_attend=lambda *_: takes, why_not_on=lambda _: lacking
    )
    monkeypatch.setattr(attention, "_kernels", lambda _: (ours, hopper))
    dispatch.say_once.cache_clear()
    inputs = [_random(1, 4, 8)] * 3
    for _ in range(2):
        assert attention._kernels_for(*inputs) == ("ours", "Hopper's" if takes and not lacking else None)
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [f"attention runs on a slower kernel, whose frames are the same: {one}" for one in said]


def test_where_no_setting_of_a_kernel_runs_that_is_said_with_its_reason(monkeypatch, caplog):
    pytest.importorskip("triton", reason="settings are of kernels that Triton compiles")
    from wan_vae_parallel.ops.kernels import measure

    class Measuring(Exception):
        """The rest needs a GPU."""

    def stop(_cycles):
        raise Measuring

    class Problem:
        kind = "a kind"
        arena = torch.empty(0)

        def ours(self, tile):
            if tile not in self.runs:
                raise KernelError(f"{TRIED} of {tile}")

        def cudnn(self):
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "_sleep", stop)
    monkeypatch.setattr(dispatch, "gpu", lambda _: types.SimpleNamespace(name="GeForce", capability=(8, 6)))
    dispatch.say_once.cache_clear()
    for runs, texts in ((("second",), 0), ((), 1)):
        Problem.runs = runs
        for _ in range(2):  # kinds of layers have the same kernel
            with pytest.raises(Measuring):
                measure._time(Problem(), ["first", "second"], torch.device("cpu"))
        assert len(caplog.records) == texts
    said = caplog.records[0].getMessage()
    assert "a kernel of ours does not run on GeForce (sm_86" in said
    assert f"{TRIED} of first. Please report this line at https://" in said
