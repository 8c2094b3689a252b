"""How much memory there is, and whether something fits into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slicer.errors import HealError, OutOfMemory
from slicer.runtime import memory
from slicer.runtime.distributed import Processes

GIB = 1 << 30


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 64 GiB available and an empty /sys/fs/cgroup, which is returned."""

    class Memory:
        available = 64 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_the_page_cache_of_a_container_is_available(
    host: Path, limit: str, used: str, statistics: str, prefix: str
) -> None:
    (host / "memory").mkdir()
    (host / limit).write_text(f"{16 * GIB}\n")
    (host / used).write_text(f"{15 * GIB}\n")
    assert memory.available() == GIB, "without statistics everything in use counts"
    (host / statistics).write_text(
        f"anon {3 * GIB}\n{prefix}inactive_file {8 * GIB}\n{prefix}active_file {4 * GIB}\nslab 5\n"
    )
    assert memory.available() == 13 * GIB
    (host / limit).write_text(f"{900 * GIB}\n")
    assert memory.available() == 64 * GIB, "no more than the machine has"


def test_without_a_limit_it_is_the_machines(host: Path) -> None:
    assert memory.available() == 64 * GIB
    (host / "memory.max").write_text("max\n")
    (host / "memory.current").write_text("5\n")
    assert memory.available() == 64 * GIB == memory.free(torch.device("cpu"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with 8 GiB free each, and 4 GiB on the first one that torch holds and does not use."""
    unused = {0: 4 * GIB, 1: 0}
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB + unused[device.index or 0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)


@pytest.mark.usefixtures("gpus", "host")
def test_what_torch_holds_and_does_not_use_is_free() -> None:
    assert [memory.free(torch.device("cuda", i)) for i in (0, 1)] == [12 * GIB, 8 * GIB]


@pytest.mark.usefixtures("gpus", "host")
def test_one_process_may_spread_over_all_gpus_and_several_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    most = int(20 * GIB / memory.OVERHEAD)
    assert memory.fits(most - 1) and not memory.fits(most + 1)
    assert not memory.fits(most - 1, "cuda") and memory.fits(most // 2, "cuda")
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    own = int(8 * GIB / memory.OVERHEAD)
    assert memory.fits(own - 1) and not memory.fits(own + 1)


@pytest.mark.usefixtures("host")
def test_every_process_of_the_machine_loads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    most = int(64 * GIB / memory.OVERHEAD)
    assert memory.fits(most - 1, "cpu") and not memory.fits(most + 1, "cpu")
    assert not memory.fits(GIB, "cpu", memory=GIB) and memory.fits(GIB, "cpu", memory=2 * GIB)
    alone = memory.budget()
    assert alone == int(memory.WALK_SHARE * 64 * GIB) and memory.budget(5) == 5
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.fits(most // 4, "cpu") and not memory.fits(most // 3, "cpu")
    assert memory.budget() == alone // 4
    monkeypatch.setattr(Processes, "agree", lambda self, value: value)
    assert Processes(0, 8).first(memory.budget) == alone, "the others wait"


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
