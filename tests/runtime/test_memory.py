"""The budget of each device, what fits into it, and what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slicer.errors import HealError, OutOfMemory
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes

GIB = 1 << 30


CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 64 GiB, 48 of them available, and an empty /sys/fs/cgroup, which is returned."""

    class Memory:
        total, available = 64 * GIB, 48 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize("place", ["", "job/step"], ids=["of a container", "of a process"])
@pytest.mark.parametrize(
    ("own", "limit", "used", "prefix"),
    [
        ("0::/{}", "memory.max", "memory.current", ""),
        ("3:cpuset:/\n4:memory:/{}\n0::/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
    ids=["version 2", "version 1"],
)
def test_a_control_group_limits_the_memory(
    host: Path, own: str, limit: str, used: str, prefix: str, place: str
) -> None:
    """And what it has of the page cache is available."""
    directory = (host / "memory" if "memory" in own else host) / place
    directory.mkdir(parents=True, exist_ok=True)
    (host / "own").write_text(own.format(place or "seen/by/the/host"))
    (directory / limit).write_text(f"{16 * GIB}\n")
    (directory / used).write_text(f"{15 * GIB}\n")
    assert memory.available() == GIB, "without statistics everything in use counts"
    (directory / "memory.stat").write_text(
        f"anon {3 * GIB}\n{prefix}inactive_file {8 * GIB}\n{prefix}active_file {4 * GIB}\nslab 5\n"
    )
    assert memory.available() == 13 * GIB and memory.total(CPU) == 16 * GIB
    (directory.parent / limit).write_text(f"{8 * GIB}\n")
    (directory.parent / used).write_text("0\n")
    assert memory.total(CPU) == (8 * GIB if place else 16 * GIB), "those around it limit it too"
    for name in (directory, directory.parent):
        (name / limit).write_text(f"{900 * GIB}\n")
    assert memory.available() == 48 * GIB and memory.total(CPU) == 64 * GIB, "no more than the machine has"


def test_without_a_limit_it_is_the_machines(host: Path) -> None:
    assert memory.available() == 48 * GIB
    (host / "memory.max").write_text("max\n")
    (host / "memory.current").write_text("5\n")
    assert memory.available() == 48 * GIB == memory.free(CPU) and memory.total(CPU) == 64 * GIB


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 16 GiB with 8 GiB free each, and 4 GiB on the first one that torch holds and does not use."""
    unused = {0: 4 * GIB, 1: 0}
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB + unused[device.index or 0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)


def launched(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.setenv(name, "1")


def largest(compute: Compute, **more: int) -> int:
    """Bytes of the largest model that fits, to 1%."""
    size = 1.0
    while memory.fits(int(size * 1.01), compute, **more):
        size *= 1.01
    return int(size)


def near(nbytes: float) -> object:
    """A budget is rounded down by up to a sixteenth."""
    return pytest.approx(nbytes * 0.97, rel=0.05)


@pytest.mark.usefixtures("gpus", "host")
def test_what_torch_holds_and_does_not_use_is_free() -> None:
    assert [memory.free(torch.device("cuda", i)) for i in (0, 1)] == [12 * GIB, 8 * GIB]


@pytest.mark.usefixtures("host")
def test_the_budget_is_a_share_of_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.settled(Compute("cpu"))
    assert memory.budget(Compute("cpu")) == before.memory == near(memory.HOST_SHARE * 64 * GIB)
    assert before.device_memory is None and memory.settled(before) == before
    monkeypatch.setattr(memory, "free", lambda *_: 1)
    monkeypatch.setattr(memory, "available", lambda: 1)
    assert memory.settled(Compute("cpu")) == before, "whatever is free"
    assert largest(Compute("cpu")) == near(memory.HOST_SHARE * 64 * GIB / memory.OVERHEAD)
    assert memory.settled(Compute("cpu", memory=5, device_memory=7)) == Compute("cpu", memory=5)
    assert not memory.fits(GIB, Compute("cpu", memory=GIB)) and memory.fits(GIB, Compute("cpu", memory=2 * GIB))


@pytest.mark.usefixtures("gpus", "host")
def test_so_is_that_of_a_gpu() -> None:
    """And the host then holds states, and one file of the weights at a time."""
    found = memory.settled(Compute("cuda"))
    assert found.device_memory == near(memory.DEVICE_SHARE * 16 * GIB)
    assert found.memory == near(memory.HOST_SHARE * 64 * GIB)
    assert memory.budget(Compute("cuda", device_memory=7), torch.device("cuda", 0)) == 7
    small = Compute("cuda", memory=GIB)
    assert memory.fits(8 * GIB, small, file=GIB) and not memory.fits(8 * GIB, small, file=GIB + 1)
    assert not memory.fits(8 * GIB, Compute("cuda", device_memory=8 * GIB))


@pytest.mark.usefixtures("gpus", "host")
def test_one_process_may_spread_over_all_gpus_and_several_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one = near(memory.DEVICE_SHARE * 16 * GIB / memory.OVERHEAD)
    assert largest(Compute()) == near(memory.DEVICE_SHARE * 32 * GIB / memory.OVERHEAD)
    assert largest(Compute("cuda")) == one
    launched(monkeypatch, 2)
    assert largest(Compute()) == one, "each has a GPU of its own"
    launched(monkeypatch, 4)
    assert largest(Compute()) == near(memory.DEVICE_SHARE * 8 * GIB / memory.OVERHEAD), "two share one"


@pytest.mark.usefixtures("host")
def test_every_process_of_the_machine_loads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory.budget(Compute("cpu"))
    launched(monkeypatch, 4)
    assert memory.budget(Compute("cpu")) == alone // 4
    monkeypatch.setattr(Processes, "agree", lambda self, value: value)
    assert Processes(0, 4).first(lambda: memory.budget(Compute("cpu"))) == alone, "the others wait"


@pytest.mark.usefixtures("gpus", "host")
def test_too_little_that_is_free_is_an_error_with_both_figures() -> None:
    memory.check_free(47 * GIB, Compute("cpu"))
    memory.check_free(15 * GIB, Compute())
    with pytest.raises(OutOfMemory, match="52.7GB are needed, 51.5GB are free; close .* --memory 51.5GB"):
        memory.check_free(49 * GIB, Compute("cpu"))
    with pytest.raises(OutOfMemory, match="on cuda:1: 9.67GB are needed, 8.58GB are free; .* --device-memory 8.58GB"):
        memory.check_free(18 * GIB, Compute())
    with pytest.raises(OutOfMemory, match="container, or give --heal none$"):
        memory.check_free(49 * GIB, Compute("cpu"), instead="--heal none")


def test_whether_a_small_model_has_room_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda *_: 8e6)
    memory.check_free(3e8, Compute("cpu"))
    with pytest.raises(OutOfMemory, match="too little"):
        memory.check_free(1e9, Compute("cpu"))


def test_it_is_told_from_other_errors() -> None:
    out: list[Any] = [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ]
    for error in out:
        with pytest.raises(OutOfMemory, match="give A or B"), memory.within_memory("here", ["A", "B"]):
            raise error
    for other in (HealError("out of memory of it"), RuntimeError("shapes differ")):
        with pytest.raises(type(other), match=str(other)), memory.within_memory("here", ["A"]):
            raise other
