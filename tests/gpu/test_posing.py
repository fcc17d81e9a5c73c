"""That a posing run compiles as the older card would and assembles for the one that is there; needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.gpu.cross import GPUS, can_compile, compiled, targeting
from tests.gpu.posing import pose
from tests.processes import patience
from wan_vae_parallel.ops.gpu import Gpu
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("name", pose.POSES)
def test_a_hopper_has_the_facts_of_what_it_poses_as(name):
    real = Gpu("H200", (9, 0), 132, 232448)
    cleared = []
    gpu = types.SimpleNamespace(cache_clear=lambda: cleared.append(True))
    module = types.SimpleNamespace(_read=lambda _: real, gpu=gpu)
    pose._change_facts(module, name, *pose.POSES[name])
    found = module._read(CUDA)
    assert found == GPUS[name]._replace(name=f"H200 posing as {name}", processors=132)
    assert not found.has_tma
    assert not found.reads_products_from_shared
    assert module._read(CPU) is real
    assert cleared
    module = types.SimpleNamespace(_read=lambda _: real._replace(capability=(8, 0)), gpu=gpu)
    pose._change_facts(module, "sm_80", *pose.POSES["sm_80"])
    with pytest.raises(RuntimeError, match="can't pose as sm_80"):
        module._read(CUDA)


def test_cudnn_has_no_chance():
    module = types.SimpleNamespace(_time=lambda *_: Measured((0.5, 400.0), 700.0))
    pose._leave_cudnn_out(module)
    found = module._time(None, None, None)
    assert found.tiles == (0.5, 400.0)
    assert found.cudnn > 0
    assert not found.lost


def test_tritons_driver_tells_of_the_older_card():
    pytest.importorskip("triton", reason="needs Triton")
    driver = type("Driver", (), {})
    pose._change_target(driver, (8, 9))
    target = driver().get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 89, 32)


def test_processes_that_tests_start_pose_too():
    folder = Path(pose.__file__).parent
    program = (
        "import sys; assert 'torch' not in sys.modules; import torch\n"
        "from wan_vae_parallel.ops import gpu; assert gpu._read.__name__ == 'read', gpu._read\n"
        "from wan_vae_parallel.ops.gpu import H200; assert gpu.gpu(torch.device('cpu')) is H200\n"
        "from tests.gpu.posing import pose; read = gpu._read; pose.begin('sm_89', None)\n"
        "assert gpu._read is read, 'poses twice'\n"
    )
    environment = {**os.environ, pose.VARIABLE: "sm_89", "PYTHONPATH": os.pathsep.join((str(folder), os.getcwd()))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not can_compile(), reason="needs Triton's compiler")
@pytest.mark.parametrize("name", ["sm_80", "sm_89"])
def test_an_older_cards_code_is_assembled_for_hopper(monkeypatch, tmp_path, name):
    from triton.backends import backends

    from tests.gpu import cross, problems

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    backend = backends["nvidia"].compiler
    monkeypatch.setattr(backend, "make_cubin", backend.make_cubin)
    monkeypatch.setattr(pose, "the_cards_capability", lambda: 90)
    pose._assemble_for_the_card(backend)
    cubins = []
    read = cross._resources
    monkeypatch.setattr(cross, "_resources", lambda cubin: cubins.append(cubin) or read(cubin))
    with targeting(name) as gpu:
        (one,) = compiled(problems.convolution(LayerKind("conv", 96, 96, (3, 3, 3))))
    assert one.products > 0
    assert one.group_products == one.bulk_copies == 0
    assert one.shared <= gpu.shared
    assert one.stack == 0
    # ELF's flags, which have the architecture at one of two places.
    flags = cubins[0][48:52]
    assert 90 in (flags[0], flags[1])
