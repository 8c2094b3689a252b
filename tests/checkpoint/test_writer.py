"""Bytes are copied exactly, into whatever shards, by whatever way the file system has."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import files
import pytest

from slicer.checkpoint import writer
from slicer.checkpoint.reader import Checkpoint, read_header
from slicer.errors import OutputError
from slicer.runtime import files as runtime_files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 12_000, 100])
@pytest.mark.parametrize("reserves", [True, False])
@pytest.mark.parametrize("pad", [8, 1])
def test_the_same_bytes_whatever_the_shards(
    tmp_path: Path, shards: int, max_shard_bytes: int, reserves: bool, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reserves:  # a file system that cannot allocate ahead or copy in the kernel, and a small buffer
        monkeypatch.setattr(writer, "reserve", lambda *_: None)
        monkeypatch.setattr(runtime_files, "_BUFFER", 1000)
        monkeypatch.setattr(os, "copy_file_range", _other_file_system)
    monkeypatch.setattr(runtime_files, "_KERNEL_BYTES", 3000)
    tensors = files.write_checkpoint(tmp_path / "source", shards=shards, pad=pad)
    out = tmp_path / "out"
    out.mkdir()
    told: list[int] = []
    spans = Checkpoint.open(tmp_path / "source").tensors
    written = writer.write_tensors(out, spans, {"format": "pt"}, max_shard_bytes=max_shard_bytes, progress=told.append)
    assert files.read_tensors(out) == tensors
    assert sum(told) == sum(map(len, tensors.values()))
    for file in written:
        found, metadata = read_header(file)
        assert metadata == {"format": "pt"}
        assert len(found) == 1 or sum(span.nbytes for span in found.values()) <= max_shard_bytes
    if len(written) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(map(len, tensors.values()))


def _other_file_system(*_: object) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_shared_blocks_hold_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with reflinks, played by a plain copy: every call must be of whole blocks."""

    def share(source: int, start: int, target: int, position: int, length: int) -> bool:
        assert start % 4096 == position % 4096 == length % 4096 == 0 and length > 0
        shared.append(length)
        os.pwrite(target, os.pread(source, length, start), position)
        return True

    shared: list[int] = []
    monkeypatch.setattr(runtime_files, "_share", share)
    tensors = files.write_checkpoint(tmp_path / "source", size=30_000)
    out = tmp_path / "out"
    out.mkdir()
    spans = Checkpoint.open(tmp_path / "source").tensors
    kept = [key for key in spans if "layers.1." not in key]
    writer.write_tensors(out, {f"new.{key}": spans[key] for key in kept}, {"format": "pt"})
    assert files.read_tensors(out) == {f"new.{key}": tensors[key] for key in kept}
    assert sum(shared) > 20_000


@pytest.mark.parametrize("at", ["copy_file_range", "pwrite", "preadv"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_checkpoint(tmp_path / "source")
    spans = Checkpoint.open(tmp_path / "source").tensors

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", _other_file_system)
    monkeypatch.setattr(os, at, full)
    with (
        pytest.raises(OutputError, match="disk is full"),
        runtime_files.atomic_directory(tmp_path / "deep" / "out") as made,
    ):
        writer.write_tensors(made, spans, {})
    assert os.listdir(tmp_path) == ["source"]
