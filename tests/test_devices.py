"""What users write for devices and dtypes."""

from __future__ import annotations

import pytest
import torch

from wan_vae_parallel import DeviceError
from wan_vae_parallel.devices import available_devices, parse_devices, parse_dtype

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


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("devices", ["auto", " auto ", "cpu", "cpu,", ["cpu"], CPU, [CPU], ["auto"]])
def test_without_a_gpu_it_is_the_cpu(devices):
    assert available_devices() == [CPU]
    assert parse_devices(devices) == [CPU]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("devices", "parsed"),
    [
        ("auto", GPUS[:1]),
        ("cuda", GPUS[:1]),  # the first one, by number: what is current may differ by thread
        (torch.device("cuda"), GPUS[:1]),
        ("cuda:1", GPUS[1:]),
        ("cuda:0,cuda:1", GPUS),
        (" cuda:1 , cuda:0 ", GPUS[::-1]),  # in the order written
        (["cuda:0", GPUS[1]], GPUS),
        ((GPUS[1],), GPUS[1:]),
        ("cpu", [CPU]),
        ("cpu, cuda:1", [CPU, GPUS[1]]),
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
        ("gpu", "'gpu' is no device; there are cpu, cuda:0, cuda:1, or write 'auto'"),
        ("cuda:x", "'cuda:x' is no device"),
        ("cuda:2", "device 'cuda:2' is not there; there are cpu, cuda:0, cuda:1"),
        ("mps", "device 'mps' is not there"),
        ("meta", "device 'meta' is not there"),  # torch knows it, but nothing can be computed on it
        ("auto,cuda:1", "'auto' is no device"),  # all or by name
        ("cuda:0,cuda:0", "cuda:0 is named twice in 'cuda:0,cuda:0'; name each device once"),
        ("cuda,cuda:0", "cuda:0 is named twice"),  # two names of one
    ],
)
def test_what_is_no_device_is_refused_with_those_that_are_there(devices, message):
    with pytest.raises(DeviceError) as error:
        parse_devices(devices)
    assert message in str(error.value)


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
