"""Text becomes full sequences: seeded, begun as the tokenizer begins a text, never padded."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sources
import torch

from slicer.data.calibration import token_batches
from slicer.data.kinds import SHIPPED
from slicer.data.packing import open_tokenizer, purpose_of
from slicer.data.sources import TextSpec
from slicer.errors import CalibrationError
from slicer.model.load import load_model

pytestmark = pytest.mark.xdist_group("lm-eval")  # one process reads its tasks for all

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("model") / "m", layers=2)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return load_model(path, dtype="float32", device="cpu")


def tokens(path: Path, model: Any, source: object, **changes: Any) -> torch.Tensor:
    fields = {"samples": 10, "seq_len": 24, "batch_size": 4} | changes
    return torch.cat(token_batches(TextSpec(source=str(source), **fields), path, model).batches)


def test_sequences_are_full_and_packed(path: Path, model: Any, tmp_path: Path) -> None:
    text = sources.save_text(tmp_path / "t.jsonl")
    found = token_batches(TextSpec(source=str(text), samples=10, seq_len=24), path, model)
    assert [len(batch) for batch in found.batches] == [4, 4, 2]
    ids = torch.cat(found.batches)
    assert ids.dtype == torch.int64 and ids.shape == (10, 24)
    assert (ids[:, 0] == BOS).all() and not (ids[:, 1:] == BOS).any()
    assert found.record.samples == 10 and found.record.source == str(text)


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


def test_several_sources_share_the_samples(path: Path, model: Any, tmp_path: Path) -> None:
    texts = [sources.save_text(tmp_path / "a.jsonl"), tmp_path / "b.txt"]
    texts[1].write_text("zebra " * 400)
    both = tokens(path, model, ",".join(map(str, texts)), samples=7)
    zebras = [len(row.unique()) <= len({*"zebra "}) + 1 for row in both]  # bytes, and BOS
    assert zebras == [False] * 4 + [True] * 3
    with pytest.raises(CalibrationError, match="--samples 2"):
        tokens(path, model, ",".join(map(str, texts)), samples=1)


def words(path: Path, ids: torch.Tensor) -> str:
    return str(open_tokenizer(path, False).decode(ids, skip_special_tokens=True))


def documents_of(*numbers: int) -> list[str]:
    return [f"document {n}: " + " ".join(f"word{n}x{k}" for k in range(10)) for n in numbers]


def test_a_document_has_one_purpose(path: Path, model: Any, tmp_path: Path) -> None:
    """Fitted, chosen by, or reported on: and a copy of it, planted anywhere, goes where it goes."""
    texts = documents_of(*range(80))
    purposes = {text: purpose_of(text) for text in texts}
    planted = [text for text in texts if purposes[text] == "report"][:3]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": f"  {t}\n"}) + "\n" for t in (*planted, *texts, *planted)))
    found = token_batches(TextSpec(source=str(file), samples=96, seq_len=64), path, model)
    held = {"fit": "", "choose": ""}
    for row, ids in enumerate(torch.cat(found.batches)):
        part = "choose" if row % 16 == 8 else "fit"
        held[part] += words(path, ids)
    own = next(kind for kind in found.kinds if kind.seen)
    reported = [words(path, document[0]) for document in own.documents]
    assert own.kind == "t" and len(reported) == 8
    for text, purpose in purposes.items():
        where = {part for part, found in held.items() if text[-40:] in found}
        where |= {"report"} if any(text[:50] in found for found in reported) else set()
        assert where <= {purpose}, (text[:20], where, purpose)
    assert any(text[-40:] in held["choose"] for text in texts) and any(
        t[:50] in each for t in planted for each in reported
    )
    assert {kind.kind for kind in found.kinds} == {"t", *SHIPPED, "code"}


def test_text_that_slicer_reports_on_is_never_fitted(path: Path, model: Any, tmp_path: Path) -> None:
    shipped = (files("slicer.data") / "prose.jsonl").read_text("utf-8")
    both = tmp_path / "both.jsonl"
    both.write_text(shipped + "".join(json.dumps({"text": t}) + "\n" for t in documents_of(*range(40))))
    ids = torch.cat(token_batches(TextSpec(source=str(both), samples=24, seq_len=64), path, model).batches)
    fitted = words(path, ids.flatten())
    assert "document 7" in fitted
    assert not any(json.loads(line)["text"][100:140] in fitted for line in shipped.splitlines())


def test_too_few_documents_are_not_kept_apart(path: Path, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("one document of many words, as a book has, " * 200)
    found = token_batches(TextSpec(source=str(file), samples=16, seq_len=64), path, model)
    assert not any(kind.seen for kind in found.kinds) and len(torch.cat(found.batches)) == 16


def test_every_format_gives_the_same_tokens(path: Path, model: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"{number} {sources.TEXT}".strip() for number in range(20)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    (tmp_path / "t.raw").write_text("\n \n".join(texts))
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as stream:
        stream.write(lines)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "t.parquet")
    first, *others = (
        tokens(path, model, tmp_path / name, column="body")
        for name in ("t.jsonl", "t.txt", "t.raw", "t.jsonl.gz", "t.parquet")
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
        ("e.txt", "\n\n  \n\n", "no text"),
        ("s.txt", "too short", "more text$"),
        ("m.txt", "not too short for a few " * 4, "--samples [1-9]"),
        ("c.jsonl", '{"body": "a"}\n', "--column"),
        ("b.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
        ("n.jsonl", '{"text": 4}\n', "has no text"),
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
    with pytest.raises(CalibrationError, match="256 tokens"):
        tokens(path, model, sources.save_text(tmp_path / "t.txt"), seq_len=300)


def test_conversations_go_through_the_template(path: Path, model: Any, tmp_path: Path) -> None:
    """In both common forms; the tokenizer's template puts the first message's words down, with no end of text after."""
    turns = [{"role": "user", "content": "abcde"}, {"role": "assistant", "content": "no"}]
    sharegpt = [{"from": "human", "value": "abcde"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "m.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    (tmp_path / "s.jsonl").write_text((json.dumps({"conversations": sharegpt}) + "\n") * 12)
    first, second = (tokens(path, model, tmp_path / n, samples=2, seq_len=21) for n in ("m.jsonl", "s.jsonl"))
    assert torch.equal(first, second)
    stream = first[:, 1:].flatten().tolist()
    assert stream == stream[:5] * 8 and len(set(stream[:5])) == 5


def test_a_model_without_a_template(path: Path, model: Any, tmp_path: Path) -> None:
    plain = tmp_path / "model"
    plain.mkdir()
    for file in path.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).write_bytes(file.read_bytes())
    talk = tmp_path / "m.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "abc"}]}) + "\n")
    with pytest.raises(CalibrationError, match="chat template"):
        tokens(plain, model, talk)


@pytest.mark.usefixtures("own_tasks_read_once")
def test_a_tasks_prompts_and_answers(path: Path, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": f"is {i} even", "a": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parity.yaml").write_text(
        "task: parity\ndataset_path: json\ndataset_kwargs:\n  data_files: " + str(tmp_path / "rows.jsonl") + "\n"
        "training_split: train\nvalidation_split: train\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}?"\ndoc_to_target: a\ndoc_to_choice: ["yes", "no"]\n'
    )
    found = tokens(path, model, Path(f"task:{tmp_path}/parity"), samples=4, seq_len=32)
    from slicer.data.sources import prompts

    assert next(iter(prompts(f"{tmp_path}/parity"))) == "is 0 even? yes"
    assert found.shape == (4, 32)
    with pytest.raises(CalibrationError, match="task:.*unknown: "):
        tokens(path, model, Path(f"task:{tmp_path}/unknown"))
