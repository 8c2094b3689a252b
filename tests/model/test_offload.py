"""Layers that are streamed to a GPU, and states that stay there: on a pretended device, which finds races."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeCuda, fake_cuda, needs_fake_cuda
from fake_device.streams import Stream

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.model.offload import OffloadedModel
from slicer.model.walk import Walk, open_walk
from slicer.runtime.compute import Compute

pytestmark = needs_fake_cuda

BATCHES = [torch.arange(24).view(2, 12), torch.arange(36).view(3, 12)]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda(1, memory=1e9) as fake:
        yield fake


def streamed(device: str = "cuda", **memory: int) -> Walk:
    return Walk.out_of_core(DEMO, Compute(device), **memory)


def ends(walk: Walk) -> list[torch.Tensor]:
    """x(L) of each batch, on the host."""
    return [state.cpu() for state in walk.run(walk.start(BATCHES), range(walk.depth))]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return ends(streamed("cpu"))


def resident(layers: int) -> int:
    """Bytes of the modules outside the layers, and of so many layers."""
    return OffloadedModel(Checkpoint.open(DEMO), Compute("cpu")).device_bytes(layers)


@pytest.mark.parametrize("budget", ["one layer", "two layers", "two layers and half the states", "all"])
def test_states_are_those_of_the_cpu_wherever_they_lie(budget: str, cuda: FakeCuda, expected: Any) -> None:
    two, states = resident(2), sum(state.nbytes for state in expected)
    limit = {"one layer": resident(1), "two layers": two, "all": 10**9}.get(budget, int(1.3 * two) + states)
    walk = streamed(device_memory=limit)
    found = walk.run(walk.start(BATCHES), range(walk.depth))
    places = {"all": ["cuda", "cuda"], "two layers and half the states": ["cuda", "cpu"]}.get(budget, ["cpu", "cpu"])
    assert [state.device.type for state in found] == places
    assert all(state.is_cuda or state.is_pinned() for state in found)
    assert same([state.cpu() for state in found], expected)
    assert cuda.peak() < resident(1 if budget == "one layer" else 2) + 4 * states + 2e5


def test_what_a_job_reserves_is_left_free(cuda: FakeCuda, expected: Any) -> None:
    walk = streamed(device_memory=(budget := 2 * resident(2)))
    with walk.reserved(budget):
        kept = walk.start(BATCHES)
        walk.run(kept, range(walk.depth))
    assert {state.device.type for state in kept} == {"cpu"} and same(list(kept), expected)
    assert cuda.peak() < resident(1) + 4 * kept.nbytes + 2e5
    assert walk.start(BATCHES)[0].is_cuda


def test_the_next_layer_is_on_the_device_while_one_computes(cuda: FakeCuda) -> None:
    offloaded = OffloadedModel(Checkpoint.open(DEMO), Compute("cuda"))
    before = cuda.pinned
    offloaded.fetch(0, 1, copies=True)
    moved = offloaded.fetch(1, 2)
    assert all(tensor.is_cuda for tensor in moved.values()) and cuda.pinned > before
    stored = offloaded.fetch(2, None)
    assert all(tensor.is_pinned() for tensor in stored.values())  # the copy when it is placed is fast too
    del stored, moved, offloaded
    assert cuda.pinned == before


def test_memory_that_cannot_be_pinned_is_used_all_the_same(expected: Any) -> None:
    with fake_cuda(1, memory=1e9, pinnable=1e5) as cuda:
        assert same(ends(streamed(device_memory=10**9)), expected) and cuda.pinned < 1e5


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [(Stream, "synchronize", "uses what another stream still wrote"), (torch.Tensor, "record_stream", "freed without")],
)
def test_a_missing_wait_is_found(place: type, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=message), fake_cuda(1, memory=1e9):
        monkeypatch.setattr(place, name, lambda *_: None)
        ends(streamed(device_memory=10**9))


@pytest.mark.parametrize("memory", [10**9, 3 * 10**7])
def test_states_of_a_loaded_model_stay_on_its_device(memory: int, cuda: FakeCuda, expected: Any) -> None:
    compute = Compute("cuda", device_memory=memory)
    with open_walk(Checkpoint.open(DEMO), compute, loads=True) as walk:
        states = walk.run(walk.start(BATCHES), range(walk.depth))
        assert all(state.is_cuda for state in states) and same([state.cpu() for state in states], expected)


def test_those_of_one_that_is_spread_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("slicer.model.load._needs_several", lambda *_: True)
    with fake_cuda(2, memory=1e9, reported=6.5e6), open_walk(Checkpoint.open(DEMO), Compute(), loads=True) as walk:
        assert {state.device.type for state in walk.start(BATCHES)} == {"cpu"}
