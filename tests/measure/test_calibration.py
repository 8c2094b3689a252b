"""Text becomes full sequences: seeded, begun as the tokenizer begins a text, never padded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import sources
import torch

from slicer.checkpoint.model import load_model
from slicer.errors import CalibrationError
from slicer.measure.calibration import CalibrationSpec, token_batches

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("model") / "m", layers=2)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return load_model(path, dtype="float32", device="cpu")


def tokens(path: Path, model: Any, source: object, **changes: Any) -> torch.Tensor:
    fields = {"samples": 10, "seq_len": 24, "batch_size": 4} | changes
    return torch.cat(token_batches(CalibrationSpec(source=str(source), **fields), path, model).batches)


def test_sequences_are_full_and_packed(path: Path, model: Any, tmp_path: Path) -> None:
    text = sources.save_text(tmp_path / "t.jsonl")
    found = token_batches(CalibrationSpec(source=str(text), samples=10, seq_len=24), path, model)
    assert [len(batch) for batch in found.batches] == [4, 4, 2]
    ids = torch.cat(found.batches)
    assert ids.dtype == torch.int64 and ids.shape == (10, 24)
    assert (ids[:, 0] == BOS).all() and not (ids[:, 1:] == BOS).any()
    assert found.provenance["samples"] == 10 and found.provenance["source"] == str(text)


def test_documents_follow_each_other_with_an_end_between(path: Path, model: Any, tmp_path: Path) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps({"text": letter * 5}) + "\n" for letter in "abcdef"))
    stream = tokens(path, model, text, samples=2, seq_len=13)[:, 1:].flatten().tolist()
    documents = [stream[at : at + 5] for at in range(0, 24, 6)]
    assert stream[5::6] == [EOS] * 4
    assert all(len(set(document)) == 1 for document in documents)
    assert len({document[0] for document in documents}) == 4


def test_the_seed_decides(path: Path, model: Any, tmp_path: Path) -> None:
    text = sources.save_text(tmp_path / "t.jsonl")
    assert torch.equal(tokens(path, model, text, seed=3), tokens(path, model, text, seed=3))
    assert not torch.equal(tokens(path, model, text, seed=3), tokens(path, model, text, seed=4))


def test_every_format_gives_the_same_tokens(path: Path, model: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"{number} {sources.TEXT}".strip() for number in range(20)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as stream:
        stream.write(lines)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "t.parquet")
    first, *others = (
        tokens(path, model, tmp_path / name, text_column="body")
        for name in ("t.jsonl", "t.txt", "t.jsonl.gz", "t.parquet")
    )
    assert all(torch.equal(first, other) for other in others)


def test_self_samples_come_from_the_model(path: Path, model: Any) -> None:
    first = tokens(path, model, "self", seed=1)
    assert first.shape == (10, 24) and (first[:, 0] == BOS).all()
    assert torch.equal(first, tokens(path, model, "self", seed=1))
    assert not torch.equal(first, tokens(path, model, "self", seed=2))
    with torch.no_grad():
        logits = model(input_ids=first).logits[:, :-1]
    surprise = torch.nn.functional.cross_entropy(logits.flatten(0, 1), first[:, 1:].flatten())
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert abs(float(surprise - entropy)) < 0.5  # what it samples surprises it as much as it expects


def _write(file: Path, content: str) -> Path:
    file.write_text(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("e.jsonl", "", "empty"),
        ("e.txt", "\n\n  \n\n", "empty"),
        ("s.txt", "too short", "give more text$"),
        ("m.txt", "not too short for a few " * 4, "at most --samples [1-9]"),
        ("c.jsonl", '{"body": "a"}\n', "--text-column"),
        ("b.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
        ("n.jsonl", '{"text": 4}\n', "holds no text"),
        ("x.parquet", "not parquet", "not a parquet file"),
        ("x.csv", "a,b", "not a .jsonl"),
    ],
)
def test_bad_files_say_what_to_do(
    path: Path, model: Any, tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    file = tmp_path / name if content is None else _write(tmp_path / name, content)
    with pytest.raises(CalibrationError, match=words):
        tokens(path, model, file)


def test_longer_than_the_model_reads_is_refused(path: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at most 256"):
        tokens(path, model, sources.save_text(tmp_path / "t.txt"), seq_len=300)
