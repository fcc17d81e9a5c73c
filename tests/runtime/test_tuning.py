"""Who measures, what is kept, which layers become cuDNN's; with a GPU that only says it is one."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from tests.oracle import load, oracle_vae, random_latents
from tests.tuning import start_anew
from wan_vae_parallel.architecture import Architecture
from wan_vae_parallel.cancel import cancellable, check_cancelled
from wan_vae_parallel.memory import decode_memory, decoder_kinds, largest_chunk
from wan_vae_parallel.model.decoder import WanDecoder
from wan_vae_parallel.ops import dispatch
from wan_vae_parallel.ops.kernels import tiles
from wan_vae_parallel.ops.layer_kinds import LayerKind, Measured
from wan_vae_parallel.runtime import tuning

CPU, BF16 = torch.device("cpu"), torch.bfloat16
WIDE, NARROW = LayerKind("conv", 384, 384, (3, 3, 3)), LayerKind("conv", 96, 96, (3, 3, 3))
KEY = {"GPU": "Test GPU", "dtype": "bfloat16", "torch": "2.11"}
MEASURE = "wan_vae_parallel.ops.kernels.measure"


class Gpu:
    """What measuring finds, and what was asked of it."""

    def __init__(self):
        self.asked = []
        self.best, self.cudnn = {}, {}
        self.error = None

    def measure(self, kinds, _dtype, device):
        self.asked.append(list(kinds))
        if self.error:
            raise self.error
        found = {}
        for kind in kinds:
            count = len(tiles.candidates(kind, device))
            best = self.best.get(kind, 0)
            found[kind] = Measured(
                tuple(600.0 if i == best else 60.0 for i in range(count)), self.cudnn.get(kind, 300.0)
            )
        return found


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start_anew(monkeypatch)
    yield tmp_path
    dispatch.say_once.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, MEASURE, types.SimpleNamespace(measure=gpu.measure))
    monkeypatch.setattr(tuning, "_key", lambda *_: dict(KEY))
    return gpu


def chosen(kind, dtype=BF16):
    return tiles.choose_tile(kind, 720 * 1282, 4, dtype=dtype, device=CPU)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_on_the_cpu_nothing_happens(folder, dtype, monkeypatch):
    monkeypatch.setitem(sys.modules, MEASURE, None)
    assert tuning.tune([WIDE], CPU, dtype) == frozenset()
    assert files(folder) == []
    assert tiles._measured == {}


def test_each_kind_is_measured_once_and_kept_for_the_next_process(gpu, folder, monkeypatch, caplog):
    gpu.best = {WIDE: 1, NARROW: 1}
    with caplog.at_level(logging.INFO):
        assert tuning.tune([WIDE, NARROW, WIDE], CPU, BF16) == frozenset()
    assert gpu.asked == [[WIDE, NARROW]]
    text = caplog.text
    assert "measuring settings for 2 kinds of layers on Test GPU" in text
    assert "measured settings for 2 kinds of layers on Test GPU in 0 s" in text
    assert str(folder) in text
    wanted = [tiles.candidates(kind, CPU)[1] for kind in (WIDE, NARROW)]
    assert [chosen(WIDE), chosen(NARROW)] == wanted
    tuning.tune([WIDE], CPU, BF16)
    assert len(gpu.asked) == 1
    start_anew(monkeypatch)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tuning.tune([NARROW, WIDE], CPU, BF16)
    assert len(gpu.asked) == 1
    assert not caplog.records
    assert [chosen(WIDE), chosen(NARROW)] == wanted
    # Another VAE's kinds come to those that are there.
    other = LayerKind("upsample_conv", 192, 96, (1, 3, 3))
    tuning.tune([WIDE, other], CPU, BF16)
    assert gpu.asked[1:] == [[other]]
    assert len(files(folder)) == 3


def test_other_versions_are_measured_anew(gpu, monkeypatch):
    tuning.tune([WIDE], CPU, BF16)
    for name, value in (("torch", "2.12"), ("GPU", "Other GPU"), ("dtype", "float16")):
        monkeypatch.setattr(tuning, "_key", lambda *_, name=name, value=value: KEY | {name: value})
        tuning.tune([WIDE], CPU, BF16)
        tuning.tune([WIDE], CPU, BF16)
    assert len(gpu.asked) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("600.0", "NaN"),
        lambda text: text.replace("600.0", "-600.0"),
        lambda text: text.replace("600.0", '"fast"'),
        lambda text: text.replace("positions=128", "positions=130"),  # other candidates than there are now
        lambda text: text.replace('"cuDNN TFLOP/s"', '"cuDNN"'),
    ],
)
def test_what_can_not_be_right_is_measured_anew_and_replaced(gpu, folder, monkeypatch, damage):
    tuning.tune([WIDE], CPU, BF16)
    (path,) = (path for path in folder.rglob("*.json"))
    good = path.read_text()
    path.write_text(damage(good))
    assert path.read_text() != good
    start_anew(monkeypatch)
    tuning.tune([WIDE], CPU, BF16)
    assert len(gpu.asked) == 2
    assert path.read_text() == good


def test_measuring_that_fails_is_said_once_and_the_shipped_settings_stay(gpu, folder, caplog):
    gpu.error = torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
    shipped = chosen(WIDE)
    for _ in range(2):
        assert tuning.tune([WIDE], CPU, BF16) == frozenset()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "Test GPU could not be measured" in warnings[0]
    assert "(CUDA out of memory. Tried)" in warnings[0]
    assert chosen(WIDE) == shipped
    assert files(folder) == []
    # Memory that was short then may be there for the next decode.
    gpu.error = None
    gpu.best = {WIDE: 2}
    tuning.tune([WIDE], CPU, BF16)
    assert chosen(WIDE) == tiles.candidates(WIDE, CPU)[2]


def test_measuring_that_is_cancelled_is_no_failure(gpu, folder, caplog, monkeypatch):
    class Interrupt(Exception):
        """What a user interface raises."""

    def cancel():
        raise Interrupt

    def measure(*_):
        check_cancelled()

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, MEASURE, types.SimpleNamespace(measure=measure))
        with pytest.raises(Interrupt), cancellable(cancel):
            tuning.tune([WIDE], CPU, BF16)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert files(folder) == []
    gpu.best = {WIDE: 2}
    tuning.tune([WIDE], CPU, BF16)
    assert chosen(WIDE) == tiles.candidates(WIDE, CPU)[2]


def test_what_kept_all_settings_from_running_may_be_gone_the_next_time(gpu, folder, monkeypatch):
    real = gpu.measure

    def broken(kinds, *args):
        return {
            kind: Measured((0.0,) * len(one.tiles), one.cudnn) if kind == WIDE else one
            for kind, one in real(kinds, *args).items()
        }

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, MEASURE, types.SimpleNamespace(measure=broken))
        assert tuning.tune([WIDE, NARROW], CPU, BF16) == {WIDE}
    assert len(files(folder)) == 1  # the other kind's
    start_anew(monkeypatch)
    assert tuning.tune([WIDE, NARROW], CPU, BF16) == frozenset()
    assert gpu.asked[1:] == [[WIDE]]
    # Nor is a file believed that says so.
    (path,) = (path for path in folder.rglob("*.json") if "384" in path.read_text())
    path.write_text(path.read_text().replace("600.0", "0").replace("60.0", "0"))
    start_anew(monkeypatch)
    assert tuning.tune([WIDE], CPU, BF16) == frozenset()
    assert gpu.asked[2:] == [[WIDE]]


def test_a_folder_that_can_not_be_written_to_is_said_once_and_lived_without(gpu, folder, caplog):
    (folder / "wan_vae_parallel").write_text("in the way")
    gpu.best = {WIDE: 2}
    for kind in (WIDE, NARROW):
        tuning.tune([kind], CPU, BF16)
    assert chosen(WIDE) == tiles.candidates(WIDE, CPU)[2]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "can't be kept" in warnings[0]


def test_a_kind_that_loses_by_over_a_tenth_is_cudnns_and_that_is_said_once(gpu, caplog):
    gpu.cudnn = {WIDE: 659.0, NARROW: 661.0}
    for _ in range(2):
        assert tuning.tune([WIDE, NARROW], CPU, BF16) == {NARROW}
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "conv 3x3x3 96 to 96 runs on cuDNN: 661 TFLOP/s on Test GPU, where our kernel does 600" in warning
    assert "depend on the chunk and on the number of devices" in warning


@pytest.mark.usefixtures("gpu")
def test_a_kind_that_our_kernel_does_not_run_is_told_as_such(caplog, monkeypatch):
    found = {NARROW: Measured((0.0,) * len(tiles.candidates(NARROW, CPU)), 21.0)}
    monkeypatch.setitem(sys.modules, MEASURE, types.SimpleNamespace(measure=lambda *_: found))
    assert tuning.tune([NARROW], CPU, BF16) == {NARROW}
    assert "runs on cuDNN: 21 TFLOP/s on Test GPU, where our kernel does not run; the last bits" in caplog.text


def test_all_layers_of_a_kind_are_cudnns_and_the_frames_stay(gpu, monkeypatch):
    vae = load(oracle_vae("wan2.1"), devices="cpu", chunk=1)
    latents = random_latents("wan2.1", frames=3, rows=2, columns=3)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_key", lambda *_: {})
        expected = vae.decode(latents)
        assert not any(conv.cudnn for conv in vae._engine.decoder().model.convolutions())
    vae.release()
    convolutions = WanDecoder(vae.architecture).convolutions()
    gpu.cudnn = {conv.kind: 1000.0 for conv in convolutions}
    assert torch.equal(vae.decode(latents), expected)
    decoder = vae._engine.decoder()
    assert all(conv.cudnn for conv in decoder.model.convolutions())


def test_the_published_decoders_have_few_kinds_of_layers():
    for family, count in (("wan2.1", 9), ("wan2.2", 10)):
        with torch.device("meta"):
            model = WanDecoder(Architecture.published(family))
        kinds = {conv.kind for conv in model.convolutions()}
        assert len({str(kind) for kind in kinds}) == len(kinds) == count
        assert {kind.op for kind in kinds} == {"conv", "upsample_conv", "head_conv"}
        assert [kind.kernel for kind in kinds if kind.halves == 2] == [(3, 1, 1)]
        weights = {(conv.kind, tuple(conv.weight.shape)) for conv in model.convolutions()}
        for kind, shape in weights:
            own = shape if len(shape) == 5 else (*shape[:2], 1, *shape[2:])
            assert own == (kind.out_channels, kind.channels, *kind.kernel)


def test_layers_that_are_cudnns_take_more_memory():
    architecture, shape = Architecture.published("wan2.1"), (1, 21, 90, 160)
    ours, cudnn = (decode_memory(architecture, shape, chunk=4, dtype=BF16, kernels=value) for value in (True, False))
    frame = 722 * 1282 * 96 * 2
    assert cudnn.total - ours.total >= 6 * frame  # four frames of full resolution and two past ones, gathered
    assert (cudnn.weights, cudnn.caches) == (ours.weights, ours.caches)
    free = round(ours.total / 0.9) + 2**20
    assert largest_chunk(architecture, shape, dtype=BF16, free=free, kernels=True) == 4
    assert largest_chunk(architecture, shape, dtype=BF16, free=free, kernels=False) < 4


# What plans of memory go by.


@pytest.fixture
def planned(monkeypatch):
    """A GPU on which nothing has been tried yet."""
    monkeypatch.setattr(tuning, "kernels_expected", lambda *_: True)
    monkeypatch.setattr(tuning, "_circumstances", lambda *_: dict(KEY))
    return lambda kinds=(WIDE, NARROW): tuning.kernels_planned(kinds, [CPU], BF16)


def test_plans_expect_our_kernels_until_it_is_known_that_cudnn_has_a_layer(gpu, planned, monkeypatch):
    assert planned()
    assert gpu.asked == []  # nothing is measured for a plan
    gpu.cudnn[WIDE] = 900.0
    assert tuning.tune([WIDE, NARROW], CPU, BF16) == {WIDE}
    assert not planned()
    assert planned([NARROW])
    start_anew(monkeypatch)  # another process, such as the one that ComfyUI's nodes plan in
    assert not planned()
    assert planned([NARROW])
    assert len(gpu.asked) == 1


def test_plans_expect_pytorchs_kernels_where_ours_are_not_expected(planned, monkeypatch):
    monkeypatch.setattr(tuning, "kernels_expected", lambda *_: False)
    monkeypatch.setattr(tuning, "_circumstances", None)  # nothing is looked up
    assert not planned()


def test_the_memory_that_is_asked_for_is_enough_for_layers_that_are_cudnns(gpu, planned):
    architecture = Architecture.published("wan2.1")
    assert {WIDE, NARROW} <= set(decoder_kinds(architecture))
    size = (1, 21, 90, 160)
    ours, theirs = (
        decode_memory(architecture, size, chunk=2, dtype=BF16, kernels=kernels).total for kernels in (True, False)
    )
    assert theirs > ours + 2**30
    gpu.cudnn[NARROW] = 900.0
    tuning.tune([NARROW], CPU, BF16)
    assert not planned(decoder_kinds(architecture))
