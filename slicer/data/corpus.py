"""Training text: packed sequences on disk, and held-out sequences that are never trained on.

The sources are those of `slicer.data.calibration`. Without separate validation text, one document in 16, chosen by
the hash of its text, is held out, so that copies of a document are on the same side. Conversations go through the chat
template; only the tokens of the answers are learned.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slicer.data.calibration import TokenBatches, sample_tokens
from slicer.data.packing import Packer, batched, mark_of, open_tokenizer
from slicer.data.sources import DEFAULT_DATASET, TextSpec, is_streamed, mixed, sources_of
from slicer.errors import CalibrationError, HealError
from slicer.heal.finetune.settings import TrainingSettings
from slicer.plan.records import CorpusRecord
from slicer.progress import Progress
from slicer.runtime.files import atomic_file, write_atomically

APART = (
    16,
    4,
    2,
)  # one document in this many is held out; the next value is used if that gives no full sequence
_OF_SAME = "one document in {} of the same source"
_SAMPLED = 1024  # maximum number of sequences sampled from the model; longer trainings repeat them
IGNORED = -100


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Packed sequences read from disk: int64 `input_ids` and `labels` [seq_len], and the number `index`.

    `labels` are the tokens, or `IGNORED` where nothing is learned.
    """

    def __init__(self, file: Path, seq_len: int) -> None:
        count = file.stat().st_size // (4 * seq_len)
        self._tokens = torch.from_file(str(file), shared=False, size=count * seq_len, dtype=torch.int32).view(
            count, seq_len
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        stored = self._tokens[index].long()
        learned = stored >= 0
        tokens = torch.where(
            learned, stored, -1 - stored
        )  # tokens that are not learned are stored as -1 - token
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

    def to_fold_on(self, spec: TextSpec) -> TokenBatches:
        """Batches of the training text, as many as `spec` requests: a fold must not use held-out text."""
        length = min(spec.seq_len, len(self.train[0]["input_ids"]))
        pieces: list[torch.Tensor] = []
        for i in range(len(self.train)):
            row = self.train[i]["input_ids"]
            pieces += list(torch.split(row[: len(row) // length * length], length))
            if len(pieces) >= spec.samples:
                break
        tokens = torch.stack(pieces[: spec.samples])
        return TokenBatches.of(tokens, replace(spec, source=self.record.source))


def prepare(
    spec: TextSpec,
    settings: TrainingSettings,
    validation: str | None,
    path: Path,
    directory: Path,
    *,
    sampler: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize the text of `spec` for the checkpoint at `path`; reuses what an earlier run left in `directory`.

    Makes as many sequences as the training needs, or all there are, which are then repeated. `sampler` returns the
    model for `self`. Raises CalibrationError for missing or too little text, HealError if a held-out sequence is among
    the training sequences.
    """
    progress = progress or Progress()
    done = directory / "corpus.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        wanted = settings.steps * settings.batch_size
        if spec.source == "self":
            progress.stage("Sampling text from the model")
            record = _sample(spec, settings, directory, wanted, sampler())
        else:
            progress.stage("Tokenizing", wanted, "sequences")
            tokenizer = open_tokenizer(path, trust_remote_code)
            for share in APART:
                record = _tokenize(spec, settings, validation, share, tokenizer, directory, wanted, progress)
                if record["held_out_sequences"]:
                    break
        record["train_sequences"] -= (twice := _without_held_out(directory, settings.seq_len))
        record["train_sequences_left_out_as_held_out"] = twice
        write_atomically(done, json.dumps(record))
    record = json.loads(done.read_text("utf-8"))
    if record["train_sequences"] < settings.batch_size or record["held_out_sequences"] < 1:
        done.unlink()
        raise CalibrationError(
            f"{record['source']}: too short: {record['train_sequences']} training sequences of {settings.seq_len} "
            f"tokens (one step needs {settings.batch_size}), {record['held_out_sequences']} held out (at least 1); "
            "pass more text, or lower --train-seq-len or --train-batch-size"
        )
    train, held_out = (
        Sequences(directory / f"{name}.bin", settings.seq_len) for name in ("train", "held-out")
    )
    if set(train.digests()) & set(held_out.digests()):
        raise HealError(
            f"{record['source']}: held-out sequences are among the training sequences; pass other --validation text"
        )
    return Corpus(train, held_out, CorpusRecord.of(record))


def _tokenize(
    spec: TextSpec,
    settings: TrainingSettings,
    validation: str | None,
    share: int,
    tokenizer: Any,
    directory: Path,
    wanted: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write both files; one document in `share` is held out, unless there is separate validation text."""
    source = spec.source or ":".join(DEFAULT_DATASET)
    known: set[str] = set()
    count = left_out = 0
    with (
        Packer(directory / "held-out.bin", tokenizer, settings.seq_len) as held,
        Packer(directory / "train.bin", tokenizer, settings.seq_len) as train,
    ):
        if validation is not None:
            endless = any(is_streamed(name) for name in sources_of(validation))
            for batch in batched(mixed(replace(spec, source=validation)), settings.seq_len):
                known.update(mark_of(text) for text, _ in batch)
                held.add(batch, validation, most=settings.validation_samples)
                if endless and len(held) >= settings.validation_samples:
                    break  # the training text must leave out all validation documents, so read them all
        for batch in batched(mixed(spec), settings.seq_len):
            count += len(batch)
            marks = [mark_of(text) for text, _ in batch]
            if validation is None:
                apart = [int(mark[:8], 16) % share == 0 for mark in marks]
                held.add(
                    [b for b, a in zip(batch, apart, strict=True) if a],
                    source,
                    most=settings.validation_samples,
                )
            else:
                apart = [mark in known for mark in marks]
                left_out += sum(apart)
            before = len(train)
            train.add([b for b, a in zip(batch, apart, strict=True) if not a], source, most=wanted)
            progress.advance(len(train) - before)
            if len(train) >= wanted and (validation is not None or len(held) >= settings.validation_samples):
                break
    if count == 0:
        raise CalibrationError(f"{source}: no text in it; pass a file with text")
    return _record(spec, source, train, held, validation or _OF_SAME.format(share)) | {
        "documents": count, "documents_left_out_as_validation": left_out,
        "learned": "answers" if train.talks else "all tokens",
    }  # fmt: skip


def _sample(
    spec: TextSpec, settings: TrainingSettings, directory: Path, wanted: int, model: Any
) -> dict[str, Any]:
    count = min(wanted, _SAMPLED) + settings.validation_samples
    drawn = sample_tokens(model, replace(spec, samples=count, seq_len=settings.seq_len))
    rows: dict[bytes, torch.Tensor] = {row.numpy().tobytes(): row for row in drawn}
    unique = list(rows.values())
    parts = {
        "held-out": unique[: settings.validation_samples],
        "train": unique[settings.validation_samples :],
    }
    for name, part in parts.items():
        data = (
            torch.stack(part).to(torch.int32).numpy() if part else torch.zeros(0, dtype=torch.int32).numpy()
        )
        (directory / f"{name}.bin").write_bytes(data.tobytes())
    return _record(spec, "self", parts["train"], parts["held-out"], "sampled alike") | {
        "learned": "all tokens"
    }


def _without_held_out(directory: Path, seq_len: int) -> int:
    """Remove training sequences that are also held out; returns their number."""
    if not all((directory / f"{name}.bin").stat().st_size for name in ("train", "held-out")):
        return 0
    train, held_out = (Sequences(directory / f"{name}.bin", seq_len) for name in ("train", "held-out"))
    known = set(held_out.digests())
    twice = {i for i, digest in enumerate(train.digests()) if digest in known}
    if twice:
        size = 4 * seq_len
        file = directory / "train.bin"
        with atomic_file(file) as new, open(file, "rb") as old, open(new, "wb") as out:
            for i in range(len(train)):
                row = old.read(size)
                if i not in twice:
                    out.write(row)
    return len(twice)


def _record(spec: TextSpec, source: str, train: Any, held: Any, validation: str | None) -> dict[str, Any]:
    return {
        "source": source,
        "validation": validation,
        "column": spec.column,
        "seed": spec.seed,
        "train_sequences": len(train),
        "held_out_sequences": len(held),
    }
