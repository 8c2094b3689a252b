"""A checkpoint is opened only when it is whole, consistent, and all inside its directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import files
import pytest
import sources
import torch

from slicer.checkpoint.reader import Checkpoint, read_header
from slicer.errors import SourceError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files.write_checkpoint(tmp_path / "source", shards=3)
    return tmp_path / "source"


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as error:
        Checkpoint.open(path).check_layers()
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_index(source: Path, **changes: str) -> None:
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update(changes)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_spans_are_where_the_bytes_are(tmp_path: Path, shards: int) -> None:
    tensors = files.write_checkpoint(tmp_path, shards=shards)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for key, span in checkpoint.tensors.items():
        assert span.file.read_bytes()[span.start : span.end] == tensors[key]
    assert checkpoint.total_bytes == sum(map(len, tensors.values()))
    assert checkpoint.depth == 4


def test_not_there_not_a_directory_no_config_no_weights(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "not a directory" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "no weights" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "model.gguf").write_text("x")
    assert "model.gguf" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{]")
    assert "config.json" in refused(tmp_path / "empty")


def test_truncated_shard(source: Path) -> None:
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "truncated" in refused(source) and shard.name in refused(source)


def test_missing_shard(source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors, which is missing" in refused(source)
    (source / "model.safetensors.index.json").unlink()
    assert "shard 2 of 3 is missing" in refused(source)


def test_index_naming_a_tensor_that_is_not_there(source: Path) -> None:
    edit_index(source, **{"model.layers.9.x": "model-00001-of-00003.safetensors"})
    assert "model.layers.9.x" in refused(source)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\x", ""])
def test_index_leading_out(source: Path, name: str) -> None:
    edit_index(source, **{"lm_head.weight": name})
    assert "outside" in refused(source)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json"])
def test_links_leading_out(source: Path, tmp_path: Path, name: str) -> None:
    os.rename(source / name, tmp_path / "outside")
    (source / name).symlink_to(tmp_path / "outside")
    assert "outside the directory" in refused(source)


def test_a_hub_snapshot_links_into_its_own_blobs_only(source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        os.rename(file, repo / "blobs" / f"b-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/b-{file.name}")
    assert Checkpoint.open(snapshot).depth == 4
    os.rename(repo / "blobs" / "b-config.json", tmp_path / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "config.json")
    assert "outside the directory" in refused(snapshot)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "too short"),
        (b"\1\0\0", "too short"),
        (files.header({}, length=10**6), "1000000 bytes"),
        (files.header({}, length=2**63), "9223372036854775808 bytes"),
        (b"\4\0\0\0\0\0\0\0{{{{", "not JSON"),
        (b"\2\0\0\0\0\0\0\0[]", "not a JSON object"),
        (files.header({"a": files.entry(0, 4), "b": files.entry(2, 6)}) + b"x" * 6, "overlaps"),
        (files.header({"a": files.entry(0, 4), "b": files.entry(6, 8)}) + b"x" * 8, "gap"),
        (files.header({"a": files.entry(0, 400)}) + b"x" * 8, "truncated"),
        (files.header({"a": files.entry(0, 4)}) + b"x" * 8, "after the last tensor"),
        (files.header({"a": files.entry(0, 4, [3])}) + b"x" * 4, r"\[3\]"),
        (files.header({"a": files.entry(0, 4, dtype="Q7")}) + b"x" * 4, "unknown dtype"),
        (files.header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}}), "malformed"),
        (files.header({"a": {"dtype": "U8", "shape": [1]}}) + b"x", "malformed"),
        (files.header({"a": 3}) + b"x", "malformed"),
    ],
)
def test_damaged_headers(source: Path, data: bytes, word: str) -> None:
    file = source / "model-00001-of-00003.safetensors"
    file.write_bytes(data)
    with pytest.raises(SourceError, match=word):
        read_header(file)
    assert file.name in refused(source)


def test_fewer_layers_than_the_config_says(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    assert "model.layers.4" in refused(source)


def test_pickled_weights_are_mapped_and_hostile_ones_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    files.write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {key: torch.arange(10.0) for key in files.contents()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.is_bin and checkpoint.tensors["lm_head.weight"].shape == (10,)

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"lm_head.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    os.utime(tmp_path / "pytorch_model.bin", (1, 1))
    from slicer.checkpoint import tensors

    tensors.load.cache_clear()
    assert "pytorch_model.bin" in refused(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_bin", [False, True])
def test_what_a_model_takes_depends_on_the_dtype_it_is_loaded_in(tmp_path: Path, is_bin: bool) -> None:
    path = sources.save_llama(tmp_path / "model")
    stored = Checkpoint.open(path).total_bytes
    if is_bin:
        from safetensors.torch import load_file

        shards = sorted(path.glob("*.safetensors"))
        torch.save({k: v for shard in shards for k, v in load_file(shard).items()}, path / "pytorch_model.bin")
        for file in (*shards, *path.glob("*.index.json")):
            file.unlink()
    opened = Checkpoint.open(path)
    assert opened.bytes_as() == opened.bytes_as("auto") == opened.bytes_as("float32") == stored
    assert opened.bytes_as("bfloat16") == stored / 2
