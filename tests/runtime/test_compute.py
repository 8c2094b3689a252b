"""One rule for the device of a process."""

from __future__ import annotations

import pytest
import torch

from slicer.errors import UsageError
from slicer.runtime import distributed
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes

OF_SEVERAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for name in OF_SEVERAL:
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, **variables: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        ({}, "cuda"),  # alone: over all GPUs where one is too small
        ({"WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, "cuda"),
        ({"WORLD_SIZE": 4, "RANK": 2, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}, "cuda:2"),
        ({"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, "cuda:1"),
        ({"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 5, "LOCAL_WORLD_SIZE": 8}, "cuda:1"),  # two share a GPU
        ({"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, "cuda"),  # one a machine
        ({"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}, "cuda:1"),  # a launcher that sets no more
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_each_process_of_a_machine_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, int], device: str
) -> None:
    launched(monkeypatch, **variables)
    assert Compute().torch_device() == torch.device(device)
    pinned = Compute(dtype="float16").pinned()
    assert pinned == Compute("auto" if variables.get("WORLD_SIZE", 1) == 1 else device, dtype="float16")


@pytest.mark.usefixtures("four_gpus")
def test_a_process_that_works_alone_has_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others wait for it; what it pinned to its own GPU stays there."""
    launched(monkeypatch, WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)
    monkeypatch.setattr(Processes, "agree", lambda self, value: value)
    own = Compute().pinned()
    assert Processes(0, 2).first(Compute().torch_device) == torch.device("cuda")
    assert Processes(0, 2).first(own.torch_device) == torch.device("cuda:0") == Compute().torch_device()
    pytest.importorskip("accelerate")
    with distributed.alone():
        assert Compute().torch_device() == torch.device("cuda") and own.pinned() == own


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launched(monkeypatch, WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert Compute().torch_device() == Compute("cpu").torch_device() == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:97", "quantum"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device}"):
        Compute(device).torch_device()


@pytest.mark.gpu
def test_auto_takes_the_gpu() -> None:
    assert Compute().torch_device().type == "cuda"
