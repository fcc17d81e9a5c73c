"""All kernels, compiled for GPUs that are not there: that they compile, fit in shared memory, and spill little.

Needs Triton and no GPU. An ordinary run compiles each kind of kernel for some of the GPUs, in under a minute of one
core; with ``-m slow`` all settings that could be chosen for all layers of the published models.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from tests.gpu.cross import GPUS, can_compile, compiled, targeting
from wan_vae_parallel.ops.dispatch import KernelError
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs Triton's compiler")

if can_compile():
    from tests.gpu import problems
    from wan_vae_parallel.ops.kernels import tiles
    from wan_vae_parallel.ops.kernels.triton_version import DESCRIPTORS, VERSION

CPU = torch.device("cpu")
# Bytes of a thread's stack that kernels may spill to. Those of Hopper, and of Blackwell in the data centre, are a
# residual's that starts accumulators of 384 channels, in passing (Hopper: 176 with Triton 3.6, 288 with 3.9). Those of
# the others are of warps with 64 x 96 accumulators, or copies of 64 channels at once, which are the fastest all the
# same; 8 to 16 on Blackwell the compiler's own.
SPILLS = {"sm_80": 128, "sm_86": 128, "sm_89": 128, "sm_90": 288, "sm_100": 64, "sm_120": 144}
# More with Triton 3.5, which has 3.6's warps of 64 x 96 but not its registers for them.
OLDER_SPILLS = 330
# Of up to 384 channels: one pass of 384, and of two passes the first of 320.
ATTENTION_SPILLS = {"sm_80": 96, "sm_86": 104, "sm_89": 104}


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(run, name, spills=None):
    """Compiles for the GPU ``name``; what came of it."""
    with targeting(name) as gpu:
        found = compiled(run)
    assert found
    for one in found:
        assert one.shared <= gpu.shared, one
        more = OLDER_SPILLS if VERSION[:2] == (3, 5) else 0
        assert one.stack <= (SPILLS[name] if spills is None else spills) + more, one
        if name in ("sm_80", "sm_86", "sm_89"):
            assert one.bulk_copies == one.group_products == 0, one
    return found


def settings(name, kind):
    with targeting(name):
        return tiles.candidates(kind, CPU)


def check_convolution(name, kind, tile, **options):
    (one,) = check(problems.convolution(kind, tile, **options), name)
    assert one.products + one.group_products > 0
    if name in ("sm_90", "sm_100") and DESCRIPTORS:
        assert one.group_products > 0
    if one.bulk_copies == 0:
        # Inputs and weights travel asynchronously, 16 bytes a thread or, of a tile smaller than the program, less: in
        # short steps of channels those of both accumulators' weights.
        assert one.copies > 0
        assert one.wide_copies >= (0.75 if tile.step >= 32 else 0.5) * one.copies
        # Of biases and residuals, outside the loop: out of tensor memory a thread has a whole row of columns.
        assert one.narrow_loads <= (64 if name == "sm_100" else 16)
    return one


CONV = LayerKind("conv", 384, 384, (3, 3, 3))
SOME = [
    ("sm_89", CONV),
    ("sm_80", LayerKind("conv", 192, 192, (3, 3, 3))),
    ("sm_86", LayerKind("conv", 96, 96, (3, 3, 3))),
    ("sm_120", LayerKind("conv", 192, 384, (3, 3, 3))),
    ("sm_90", CONV),
    ("sm_100", LayerKind("conv", 96, 96, (3, 3, 3))),
    ("sm_89", LayerKind("conv", 384, 768, (3, 1, 1), 2)),
    ("sm_80", LayerKind("conv", 320, 320, (3, 1, 1), time_stride=2)),
    ("sm_86", LayerKind("conv", 32, 96, (3, 1, 1))),  # an encoder's first
    ("sm_89", LayerKind("upsample_conv", 384, 192, (1, 3, 3))),
    ("sm_120", LayerKind("upsample_conv", 1024, 1024, (1, 3, 3))),
    ("sm_89", LayerKind("down_conv", 192, 192, (1, 3, 3))),
    ("sm_90", LayerKind("down_conv", 160, 160, (1, 3, 3))),
    ("sm_86", LayerKind("head_conv", 96, 3, (3, 3, 3))),
    ("sm_120", LayerKind("head_conv", 256, 12, (3, 3, 3))),
]


@pytest.mark.parametrize(("name", "kind"), SOME, ids=str)
def test_the_first_setting_of_some_layers(name, kind):
    residual = kind.op == "conv" and kind.kernel == (3, 3, 3)
    check_convolution(name, kind, settings(name, kind)[0], residual=residual, paged=kind.kernel == (3, 1, 1))


def test_hoppers_without_descriptors_take_settings_that_do_not_spill(monkeypatch):
    # As with Triton 3.3.
    monkeypatch.setattr(tiles, "DESCRIPTORS", False)
    check_convolution("sm_90", CONV, settings("sm_90", CONV)[0], descriptors=False)


@pytest.mark.parametrize(("name", "channels"), [("sm_89", 384), ("sm_80", 384), ("sm_120", 1024)])
def test_attention_fits(name, channels):
    found = check(problems.attend(channels), name, ATTENTION_SPILLS.get(name) if channels <= 384 else None)
    multiplying = [one for one in found if one.products]
    # Of two passes a third kernel, between them, looks at each query's maxima.
    assert [len(found), len(multiplying)] == ([1, 1] if name == "sm_80" else [3, 2])
    assert all(one.narrow_loads == 0 for one in found)
    for one in multiplying:
        # Through descriptors or 16 bytes a thread; the last kernel also reads each query's share, 4 bytes.
        assert one.bulk_copies or one.wide_copies >= 0.8 * one.copies > 0


@pytest.mark.parametrize(
    ("name", "which"),
    [("sm_89", "norm_silu 384"), ("sm_80", "frames True"), ("sm_120", "pixels False"), ("sm_86", "averaged"),
     ("sm_100", "duplicated"), ("sm_120", "halo")],
)  # fmt: skip
def test_what_moves_bytes(name, which):
    check(problems.others()[which], name)


@pytest.mark.skipif(can_compile() and VERSION < (3, 6), reason="Gluon is older there")
def test_hoppers_own_attention_compiles():
    from wan_vae_parallel.ops.kernels import attention_hopper

    query, key, value = torch.empty((1, 3600, 3 * 384), dtype=torch.bfloat16).chunk(3, dim=2)
    (one,) = check(lambda: attention_hopper._attend_on_hopper(query, key, value), "sm_90")
    assert one.group_products > 0


@pytest.mark.skipif(can_compile() and VERSION < (3, 6), reason="Gluon is older there")
@pytest.mark.parametrize(
    ("version", "bits", "reason"),
    [
        ((3, 6), 1.0, ""),  # which it has run with: it is not tried
        ((3, 8), 0.0, ""),
        ((3, 8), 1.0, "gives other bits with Triton"),
        ((3, 8), KernelError("no such layout"), "does not run (no such layout)"),
        ((3, 99), 0.0, "is written for Triton 3.6, 3.7"),
    ],
)
def test_hoppers_own_attention_is_tried_where_it_has_never_run(monkeypatch, version, bits, reason):
    from wan_vae_parallel.ops.kernels import attention_hopper

    def attended(*_):
        if isinstance(bits, KernelError):
            raise bits
        return torch.full((1,), bits)

    monkeypatch.setattr(attention_hopper, "VERSION", version)
    monkeypatch.setattr(attention_hopper, "_attend_on_hopper", attended)
    monkeypatch.setattr(attention_hopper, "frame_attention_of_all", lambda *_: torch.zeros(1))
    attention_hopper.why_not_on.cache_clear()
    try:
        found = attention_hopper.why_not_on(CPU)
    finally:
        attention_hopper.why_not_on.cache_clear()
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_kernels_numbers_are_no_reason_to_compile_it_again():
    # But for frames that hold no tile.
    from wan_vae_parallel.ops.kernels.launch import collect

    with targeting("sm_89"):
        jobs = collect(
            lambda: [problems.convolution(CONV, tiles.candidates(CONV, CPU)[0], rows=rows)() for rows in (2, 31, 64)]
        )
    assert len(jobs) == 1


def test_what_is_measured_is_compiled_before_also_where_a_setting_fails(monkeypatch):
    from wan_vae_parallel.ops.kernels import launch, measure

    kind = LayerKind("conv", 32, 48, (1, 3, 3))
    monkeypatch.setattr(launch, "_failed", {})
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure, "_measured", lambda *_: Measured((1.0,), 0.0))
    with targeting("sm_89"):
        found = tiles.candidates(kind, CPU)
        assert len(found) == 3
        # A step that no product takes.
        monkeypatch.setattr(measure, "candidates", lambda *_: [dataclasses.replace(found[0], step=8), *found[1:2]])
        for _ in range(2):
            assert measure.measure([kind], torch.bfloat16, CPU) == {kind: Measured((1.0,), 0.0)}
    assert len(launch._failed) == 1
    (failed,) = launch._failed.values()
    assert failed.startswith("_conv_kernel: CompilationError at ")
    assert "K >= 16" in failed


# All of it: half an hour of one core.


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("kind", problems.kinds() if can_compile() else [CONV], ids=str)
def test_all_settings_of_all_layers(name, kind):
    residual, paged = kind.op == "conv" and kind.kernel == (3, 3, 3), kind.op in ("conv", "down_conv")
    for transposed, tile in enumerate(settings(name, kind)):
        check_convolution(name, kind, tile, residual=residual, transposed=bool(transposed % 2))
    check_convolution(name, kind, settings(name, kind)[0], paged=paged, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_all_other_kernels(name):
    for channels in (16, 96, 128, 160, 256, 320, 384, 512, 640, 1024):
        check(problems.attend(channels), name, ATTENTION_SPILLS.get(name, 8) if channels <= 384 else None)
    for run in problems.others().values():
        check(run, name)
    for run in problems.others(torch.float16).values():
        check(run, name)
