"""What users write for devices and dtypes."""

from __future__ import annotations

import logging

import pytest
import torch

from wan_vae_parallel import DeviceError
from wan_vae_parallel.devices import available_devices, parse_devices, parse_dtype
from wan_vae_parallel.ops.dispatch import say_once

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    """As parsing sees a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # Ampere, which has bf16, and a Turing card, which has not.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (7, 5)][device.index or 0])
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda _backend: True)


@pytest.fixture
def no_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda backend: backend != "nccl")


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("devices", ["auto", " auto ", "cpu", "cpu,", ["cpu"], CPU, [CPU], ["auto"]])
def test_without_a_gpu_it_is_the_cpu(devices):
    assert available_devices() == [CPU]
    assert parse_devices(devices) == [CPU]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("devices", "parsed"),
    [
        ("auto", GPUS),
        ("cuda", GPUS[:1]),  # the first one, by number: what is current may differ by thread
        (torch.device("cuda"), GPUS[:1]),
        ("cuda:1", GPUS[1:]),
        ("cuda:0,cuda:1", GPUS),
        (" cuda:1 , cuda:0 ", GPUS[::-1]),  # in the order written
        (["cuda:0", GPUS[1]], GPUS),
        ((GPUS[1],), GPUS[1:]),
        ("cpu", [CPU]),
        ("cpu,cpu,cpu", [CPU] * 3),  # as many processes
        # as ComfyUI's selectors and other programs write them
        ("CUDA:1", GPUS[1:]),
        (["CUDA:0", "Cuda:1"], GPUS),
        ("gpu", GPUS[:1]),
        ("GPU:0,gpu:1", GPUS),
        ("CPU", [CPU]),
        ("Auto", GPUS),
        ("default", GPUS),
        ([" AUTO "], GPUS),
        ("all but the first", GPUS[1:]),  # of two
        (" All  but the FIRST ", GPUS[1:]),
    ],
)
def test_with_gpus(devices, parsed):
    assert available_devices() == [CPU, *GPUS]
    assert parse_devices(devices) == parsed


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("", "no device is named; write 'auto'"),
        (" , ", "no device is named"),
        ([], "no device is named"),
        ("tpu", "there is no device 'tpu', but cpu, cuda:0, cuda:1: write some, with commas between, or 'auto'"),
        ("gpu:2", "device 'cuda:2' is not there"),
        ("cuda:0,GPU:0", "cuda:0 is named twice"),
        ("cuda:x", "there is no device 'cuda:x'"),
        ("cuda:2", "device 'cuda:2' is not there; there are cpu, cuda:0, cuda:1"),
        ("mps", "device 'mps' is not there"),
        ("meta", "device 'meta' is not there"),  # torch knows it, but nothing can be computed on it
        ("auto,cuda:1", "'auto' stands beside others in 'auto,cuda:1'; write it alone"),
        ("cuda:0,cuda:0", "cuda:0 is named twice in 'cuda:0,cuda:0'; name each device once"),
        ("cuda,cuda:0", "cuda:0 is named twice"),  # two names of one
        ("cpu,cuda:1", "GPUs would only wait for the CPU beside them, in 'cpu,cuda:1'; name one kind"),
    ],
)
def test_what_is_no_device_is_refused_with_those_that_are_there(devices, message):
    with pytest.raises(DeviceError) as error:
        parse_devices(devices)
    assert message in str(error.value)


@pytest.mark.usefixtures("two_gpus", "no_nccl")
def test_without_nccl_auto_is_one_gpu_which_is_said_once_and_several_are_refused(caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert parse_devices("auto") == GPUS[:1]
        assert parse_devices("auto") == GPUS[:1]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["decoding on cuda:0 alone, though there are 2 devices: this torch has no nccl"]
    assert parse_devices("cuda:1") == GPUS[1:]
    assert parse_devices("cuda:1,cuda:0", forgiving=True) == [torch.device("cuda:1")]
    with pytest.raises(DeviceError, match=r"there are 2 devices in .*, but this torch has no nccl; name one"):
        parse_devices("cuda:0,cuda:1")


@pytest.mark.usefixtures("two_gpus")
def test_without_anonymous_memory_there_is_one_device(monkeypatch):
    monkeypatch.delattr("os.memfd_create")
    assert parse_devices("auto") == GPUS[:1]
    for devices in ("cuda:0,cuda:1", "cpu,cpu"):
        with pytest.raises(DeviceError, match="workers need Linux's shared memory; name one"):
            parse_devices(devices)


@pytest.mark.parametrize("gpus", [0, 1])
def test_all_but_the_first_of_too_few_gpus_are_none(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(DeviceError, match=f"no GPU is left of 'all but the first', for there are {gpus}; write 'auto'"):
        parse_devices("all but the first")


@pytest.mark.usefixtures("no_gpus")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="device 'cuda:0' is not there; there are cpu, or write 'auto'"):
        parse_devices("cuda")


@pytest.mark.parametrize(
    ("dtype", "parsed"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("float64", torch.float64),
        ("fp64", torch.float64),
        ("BF16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, parsed):
    assert parse_dtype(dtype, CPU) is parsed


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_bf16_where_the_gpu_computes_in_it():
    assert [parse_dtype("auto", gpu) for gpu in GPUS] == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", ["int8", "half", "", "float8_e4m3fn", torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(DeviceError, match="it must be 'auto', 'float32', 'bfloat16', 'float16', 'float64'"):
        parse_dtype(dtype, CPU)
