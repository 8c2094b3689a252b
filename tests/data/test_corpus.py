"""What is trained on and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sources
import torch

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.corpus import IGNORED, Corpus, CorpusSize, prepare
from slicer.data.packing import answers
from slicer.data.sources import TextSpec, mixed
from slicer.errors import CalibrationError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus(
    source: Path | str, directory: Path, path: Path | None = None, *, seq_len: int = 32, validation: str | None = None
) -> Corpus:
    size = CorpusSize(steps=10, batch_size=4, seq_len=seq_len, validation_samples=4)
    checkpoint = Checkpoint.open(path or DEMO)
    return prepare(TextSpec(source=str(source)), size, checkpoint, directory, validation=validation)


def documents(path: Path, count: int, start: int = 0) -> Path:
    words = (DEMO.parent / "heldout.txt").read_text("utf-8").split()
    texts = [" ".join(words[i * 60 : i * 60 + 60]) for i in range(start, start + count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    """Also where documents occur twice, under other spacing; and a second look gives the same sequences."""
    file = documents(tmp_path / "a.jsonl", 100)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    twice = rows + [{"text": row["text"].replace(" ", "  ")} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in twice))
    found = corpus(file, tmp_path / "work")
    assert len(found.train) == 40 and len(found.held_out) == 4
    assert not set(found.train.digests()) & set(found.held_out.digests())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    learned = " ".join(tokenizer.decode(found.train[i]["input_ids"]) for i in range(len(found.train)))
    kept = " ".join(tokenizer.decode(found.held_out[i]["input_ids"]) for i in range(len(found.held_out)))
    pieces = [row["text"][:40] for row in rows]
    assert not [piece for piece in pieces if piece in kept and piece in learned]
    again = corpus(file, tmp_path / "work")
    assert again.train.digests() == found.train.digests() and again.record == found.record
    assert torch.equal(found.train[3]["input_ids"], found.train[3]["labels"])


def test_named_validation_text_is_left_out_of_what_is_trained_on(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 60)
    validation = documents(tmp_path / "b.jsonl", 20, start=10)
    found = corpus(file, tmp_path / "work", validation=str(validation))
    assert found.record.documents_left_out > 0 and found.record.validation == str(validation)
    assert len(found.train) + found.record.left_out <= 40


def test_validation_text_that_is_streamed_is_read_as_far_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import itertools

    import slicer.data.sources as texts

    words = (DEMO.parent / "heldout.txt").read_text("utf-8").split()
    endless = (f"{i} " + " ".join(words[i % 900 : i % 900 + 60]) for i in itertools.count())
    monkeypatch.setattr(texts, "stream_hub", lambda spec: endless)
    found = corpus(documents(tmp_path / "a.jsonl", 60), tmp_path / "work", validation="org/data")
    assert len(found.held_out) == 4 and next(endless).startswith("256 ")  # one batch of documents


def test_several_sources_share_the_text(tmp_path: Path) -> None:
    """As much of one as of the other, while both last."""
    a, b = documents(tmp_path / "a.jsonl", 40), tmp_path / "b.txt"
    b.write_text("\n\n".join(f"{i} " + "zyx " * 90 for i in range(200)))
    spec = TextSpec(source=f"{a},{b}")
    sizes = {True: 0, False: 0}
    for at, document in enumerate(mixed(spec)):
        assert isinstance(document, str)
        sizes["zyx" in document] += len(document)
        if at == 30:
            assert 0.8 < sizes[True] / sizes[False] < 1.25
    record = corpus(f"{a},{b}", tmp_path / "work").record
    assert record.train_sequences + record.left_out == 40
    with pytest.raises(CalibrationError, match="self only alone"):
        list(mixed(TextSpec(source=f"{a},self")))


def test_a_short_text_is_seen_again_and_one_too_short_refused(tmp_path: Path) -> None:
    found = corpus(documents(tmp_path / "a.jsonl", 30), tmp_path / "work")
    assert 4 <= len(found.train) < 100
    with pytest.raises(CalibrationError, match=r"too short.*--train-batch-size"):
        corpus(documents(tmp_path / "b.jsonl", 1), tmp_path / "other")


def test_a_file_that_was_cut_short_is_no_corpus(tmp_path: Path) -> None:
    text = documents(tmp_path / "text.jsonl", 40)
    corpus(text, tmp_path / "work")
    file = tmp_path / "work" / "train.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="work: damaged.* remove it"):
        corpus(text, tmp_path / "work")


def test_one_long_document_can_be_split(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text((DEMO.parent / "heldout.txt").read_text("utf-8").replace("\n", " "))
    found = corpus(file, tmp_path / "work")
    assert len(found.train) == 40 and len(found.held_out) >= 1


def talk(i: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": f"What is {i} and {i}?"},
        {"role": "assistant", "content": f"It is {2 * i}."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": f"Gladly, friend {i}."},
    ]


def test_of_conversations_the_answers_are_learned(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = sources.save_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    parts = answers(talk(3), tokenizer, "chat")
    assert "".join(text for text, _ in parts) == tokenizer.apply_chat_template(talk(3), tokenize=False)
    assert [text for text, learned in parts if learned] == ["It is 6.<|end|>\n", "Gladly, friend 3.<|end|>\n"]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(200)))
    found = corpus(file, tmp_path / "work", path, seq_len=64)
    assert found.record.learned == "answers"
    ids, learned = [], []
    for i in range(len(found.train)):
        row = found.train[i]
        assert row["input_ids"][0] == tokenizer.bos_token_id and (row["labels"] != IGNORED).any()
        same = row["labels"] == row["input_ids"]
        assert (same | (row["labels"] == IGNORED)).all()
        ids += row["input_ids"][1:].tolist()
        learned += row["labels"][1:].tolist()
    text = tokenizer.decode([i for i in learned if i != IGNORED])
    assert "Gladly" in text and "What is" not in text and "kind" not in text and "<|assistant|>" not in text
    assert "What is" in tokenizer.decode(ids)


def test_a_template_that_rewrites_earlier_turns_still_shows_the_answers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.save_llama(tmp_path / "model"))
    tokenizer.chat_template = (  # the last turn is marked, so no beginning of the text stands as it was
        "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    parts = answers(talk(3), tokenizer, "chat")
    assert [text for text, learned in parts if learned] == ["It is 6.", "Gladly, friend 3."]
