"""Reading into buffers that are used again: the bytes of the file, and never those of another tensor."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import SourceError
from slicer.model import buffers
from slicer.model.buffers import Buffers, buffer_bytes
from tests.tiny import save_tiny


def without(flag: int, at: int, real: Callable[..., int]) -> Callable[..., int]:
    """The call on a system that refuses this flag in argument number `at`."""

    def call(*given: Any) -> int:
        if len(given) > at and given[at] & flag:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*given)

    return call


@pytest.fixture(params=["direct", "usual", "neither cached nor aligned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "usual":
        monkeypatch.setattr(os, "open", without(os.O_DIRECT, at=1, real=os.open))
    elif request.param.startswith("neither"):
        monkeypatch.setattr(os, "preadv", without(os.RWF_NOWAIT, at=3, real=os.preadv))
        monkeypatch.setattr(buffers, "_BLOCK", 8192)


@pytest.fixture
def spans(tmp_path: Path) -> dict[str, TensorSpan]:
    """Tensors of many sizes and dtypes, one after another, so that hardly any begins at a round offset."""
    torch.manual_seed(0)
    tensors = {
        f"t{i:02d}": torch.randint(-9, 9, (size,)).to(dtype)
        for i, (size, dtype) in enumerate(
            [(5, torch.int8), (4097, torch.float32), (1, torch.bfloat16), (70001, torch.bfloat16), (0, torch.int64),
             (333, torch.float64), (9000, torch.float16)]
        )
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    return Checkpoint.open(tmp_path).tensors


def test_reads_what_the_file_holds(spans: dict[str, TensorSpan], way: None) -> None:
    expected = load_file(next(iter(spans.values())).file)
    found = Buffers(0).read(spans)
    assert list(found) == list(spans)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_a_subset_leaves_the_rest_out(spans: dict[str, TensorSpan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_GAP", 0)
    wanted = {key: spans[key] for key in ("t06", "t01")}
    assert buffer_bytes(wanted.values()) < 4 * 4097 + 2 * 9000 + 4 * 4096
    found = Buffers(0).read(wanted)
    expected = load_file(spans["t01"].file)
    assert all(torch.equal(found[key], expected[key]) for key in wanted)


def test_memory_is_used_again_only_when_nothing_lies_in_it(spans: dict[str, TensorSpan]) -> None:
    pool = Buffers(buffer_bytes(spans.values()))
    first = pool.read({"t03": spans["t03"]})
    view, address, copy = first["t03"][:100], first["t03"].data_ptr(), first["t03"].clone()
    del first
    second = pool.read({"t01": spans["t01"]})  # a view of the first is still there
    assert torch.equal(view, copy[:100])
    assert second["t01"].data_ptr() != address
    del view
    third = pool.read({"t03": spans["t03"]})
    assert third["t03"].data_ptr() == address
    assert torch.equal(third["t03"], copy)
    assert torch.equal(second["t01"], load_file(spans["t01"].file)["t01"])


def test_a_file_that_ends_too_early(spans: dict[str, TensorSpan], way: None) -> None:
    file = spans["t06"].file
    with open(file, "r+b") as stream:
        stream.truncate(spans["t06"].start + 10)
    with pytest.raises(SourceError, match="ends before its last tensor"):
        Buffers(0).read(spans)


def test_a_file_that_is_gone(tmp_path: Path, way: None) -> None:
    path = save_tiny("llama", tmp_path)
    spans = Checkpoint.open(path).tensors
    next(iter(spans.values())).file.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        Buffers(0).read(spans)
