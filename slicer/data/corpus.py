"""Training text: packed sequences on disk, and held-out sequences that are never trained on.

The sources are those of `slicer.data.calibration`. Without separate validation text, one document in 16, chosen by
the hash of its text, is held out, so that copies of a document are on the same side. Conversations go through the chat
template; only the tokens of the answers are learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.architectures.table import text_config
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import TokenBatches, sample_tokens
from slicer.data.packing import Packer, batched, check_vocabulary, mark_of, open_tokenizer
from slicer.data.sources import TextSpec, is_streamed, mixed, sources_of
from slicer.errors import CalibrationError, HealError
from slicer.plan.records import CorpusRecord
from slicer.progress import SILENT, Progress
from slicer.runtime.files import atomic_file, write_atomically

# One document in this many is held out; the next value is used if that gives no full sequence.
APART = (16, 4, 2)
_SAMPLED = 1024  # maximum number of sequences sampled from the model; longer trainings repeat them
IGNORED = -100  # the label that torch's cross entropy ignores


@dataclass(frozen=True)
class CorpusSize:
    """How much text a training needs.

    Attributes:
        steps: of the training; batch_size: sequences of a step; seq_len: tokens of a sequence.
        validation_samples: sequences that are held out.
    """

    steps: int
    batch_size: int
    seq_len: int
    validation_samples: int

    @property
    def sequences(self) -> int:
        """Sequences of all steps together."""
        return self.steps * self.batch_size


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Packed sequences read from disk: int64 `input_ids` and `labels` [seq_len], and the number `index`.

    `labels` are the tokens, or `IGNORED` where nothing is learned.
    """

    def __init__(self, file: Path, seq_len: int) -> None:
        size = file.stat().st_size // (4 * seq_len) * seq_len
        self._tokens = torch.from_file(str(file), shared=False, size=size, dtype=torch.int32).view(-1, seq_len)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stored = self._tokens[index].long()
        learned = stored >= 0
        tokens = torch.where(learned, stored, -1 - stored)  # stored as -1 - token: not learned
        labels = torch.where(learned, tokens, torch.full_like(tokens, IGNORED))
        return {"input_ids": tokens, "labels": labels, "index": torch.tensor(index)}

    @property
    def largest(self) -> int:
        """The largest token id."""
        tokens = self._tokens
        return int(torch.where(tokens < 0, -1 - tokens, tokens).max())

    def digests(self) -> list[bytes]:
        """SHA-256 of the tokens of each sequence."""
        return [hashlib.sha256(self[i]["input_ids"].numpy().tobytes()).digest() for i in range(len(self))]


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` sequences; `record`: their sources and numbers, for the plan."""

    train: Sequences
    held_out: Sequences
    record: CorpusRecord

    def held_out_batches(self, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) of the held-out sequences, int64 [batch, seq_len] each."""
        # Not by a DataLoader, which draws from the generator that dropout and the order of the batches use.
        rows = [self.held_out[i] for i in range(len(self.held_out))]
        tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
        return list(zip(torch.split(tokens, batch_size), torch.split(labels, batch_size), strict=True))

    def to_fold_on(self, spec: TextSpec) -> TokenBatches:
        """Batches of the training text, as many as `spec` requests: a fold must not use held-out text."""
        length = min(spec.seq_len, len(self.train[0]["input_ids"]))
        rows = (self.train[i]["input_ids"] for i in range(len(self.train)))
        pieces = (piece for row in rows for piece in row.unfold(0, length, length))
        tokens = torch.stack(list(islice(pieces, spec.samples)))
        return TokenBatches.of(tokens, replace(spec, source=self.record.source))


def prepare(
    spec: TextSpec,
    size: CorpusSize,
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress = SILENT,
    *,
    validation: str | None = None,
    sampler: Callable[[], Any] | None = None,
    trust_remote_code: bool = False,
) -> Corpus:
    """Tokenize the text of `spec` for `checkpoint` into `directory`; reuses what an earlier run left there.

    Makes as many sequences as the training needs, or all there are, which are then repeated. `validation`: text to hold
    out, named as in `spec`; None: documents of the same text. `sampler` returns the model for the source `self`. Raises
    CalibrationError for missing or too little text, or a tokenizer of another model; HealError if a held-out sequence
    is among the training sequences.
    """
    done = directory / "corpus.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        if spec.source == "self":
            assert sampler is not None
            progress.stage("Sampling text from the model")
            record = _sample(spec, size, directory, sampler())
        else:
            progress.stage("Tokenizing", size.sequences, "sequences")
            tokenizer = open_tokenizer(checkpoint.path, trust_remote_code)
            for share in APART:
                record = _tokenize(spec, size, validation, share, tokenizer, directory, progress)
                if record.held_out_sequences:
                    break
        twice = _without_held_out(directory, size.seq_len)
        record = replace(record, train_sequences=record.train_sequences - twice, left_out=twice)
        write_atomically(done, json.dumps(record.to_dict()))
        if (times := size.sequences / max(1, record.train_sequences)) > 1.5:
            progress.note(f"the text has {record.train_sequences} training sequences: each is used {times:.0f} times")
    record = CorpusRecord.of(json.loads(done.read_text("utf-8")))
    if record.train_sequences < size.batch_size or record.held_out_sequences < 1:
        done.unlink()
        raise CalibrationError(
            f"{record.source}: too short: {record.train_sequences} training sequences of {size.seq_len} tokens (one "
            f"step needs {size.batch_size}), {record.held_out_sequences} held out (at least 1); pass more text, or "
            "lower --train-seq-len or --train-batch-size"
        )
    train, held_out = (Sequences(directory / f"{name}.bin", size.seq_len) for name in ("train", "held-out"))
    if (len(train), len(held_out)) != (record.train_sequences, record.held_out_sequences):
        raise CalibrationError(f"{directory}: damaged: its files are not as long as they were; remove it to start over")
    if set(train.digests()) & set(held_out.digests()):
        raise HealError(
            f"{record.source}: held-out sequences are among the training sequences; pass other --validation text"
        )
    largest = max(train.largest, held_out.largest)
    check_vocabulary(checkpoint.path, largest, text_config(checkpoint.config).get("vocab_size"))
    return Corpus(train, held_out, record)


def _tokenize(
    spec: TextSpec,
    size: CorpusSize,
    validation: str | None,
    share: int,
    tokenizer: Any,
    directory: Path,
    progress: Progress,
) -> CorpusRecord:
    """Write both files; one document in `share` is held out, unless there is separate validation text."""
    source, most = spec.name, size.validation_samples
    known: set[str] = set()
    count = left_out = 0
    with (
        Packer(directory / "held-out.bin", tokenizer, size.seq_len) as held,
        Packer(directory / "train.bin", tokenizer, size.seq_len) as train,
    ):
        if validation is not None:
            endless = any(is_streamed(name) for name in sources_of(validation))
            for batch in batched(mixed(replace(spec, source=validation)), size.seq_len):
                known.update(mark_of(text) for text, _ in batch)
                held.add(batch, validation, most=most)
                if endless and len(held) >= most:
                    break  # the training text must leave out all validation documents, so read them all
        for batch in batched(mixed(spec), size.seq_len):
            count += len(batch)
            marks = [mark_of(text) for text, _ in batch]
            if validation is None:
                apart = [int(mark[:8], 16) % share == 0 for mark in marks]
                held.add([b for b, a in zip(batch, apart, strict=True) if a], source, most=most)
            else:
                apart = [mark in known for mark in marks]
                left_out += sum(apart)
            before = len(train)
            train.add([b for b, a in zip(batch, apart, strict=True) if not a], source, most=size.sequences)
            progress.advance(len(train) - before)
            if len(train) >= size.sequences and (validation is not None or len(held) >= most):
                break
    if count == 0:
        raise CalibrationError(f"{source}: no text in it; pass a file with text")
    apart_from = validation or f"one document in {share} of the same source"
    return CorpusRecord(
        source, len(train), len(held), "answers" if train.stream.talks else "all tokens", apart_from, count, left_out,
        seed=spec.seed, column=spec.column,
    )  # fmt: skip


def _sample(spec: TextSpec, size: CorpusSize, directory: Path, model: Any) -> CorpusRecord:
    held = size.validation_samples
    count = min(size.sequences, _SAMPLED) + held
    drawn = sample_tokens(model, replace(spec, samples=count, seq_len=size.seq_len))
    unique = list({row.numpy().tobytes(): row for row in drawn}.values())
    for name, rows in (("held-out", unique[:held]), ("train", unique[held:])):
        (directory / f"{name}.bin").write_bytes(b"".join(row.to(torch.int32).numpy().tobytes() for row in rows))
    return CorpusRecord(
        "self", max(0, len(unique) - held), min(held, len(unique)), validation="sampled alike",
        seed=spec.seed, column=spec.column,
    )  # fmt: skip


def _without_held_out(directory: Path, seq_len: int) -> int:
    """Remove training sequences that are also held out; returns their number."""
    if not all((directory / f"{name}.bin").stat().st_size for name in ("train", "held-out")):
        return 0
    train, held_out = (Sequences(directory / f"{name}.bin", seq_len) for name in ("train", "held-out"))
    known = set(held_out.digests())
    twice = {i for i, digest in enumerate(train.digests()) if digest in known}
    if twice:
        file = directory / "train.bin"
        with atomic_file(file) as new, open(file, "rb") as old, open(new, "wb") as out:
            rows = iter(partial(old.read, 4 * seq_len), b"")
            out.writelines(row for i, row in enumerate(rows) if i not in twice)
    return len(twice)
