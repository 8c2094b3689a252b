"""The loss on text, measured on the same excerpts for every model.

An excerpt is a number of characters, so models with different vocabularies read the same text. The loss is given in
nats per token, as a share of log V (section 4.2 of the paper; 1 is a uniform guess) and in nats per byte.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from slicer.data.sources import DEFAULT_DATASET, TextSpec, read_documents, stream_hub
from slicer.errors import CalibrationError, EvaluationError
from slicer.evaluate.compare import mean_and_error

SEQUENCES = 64
CHARACTERS = 1024
_SPLIT = "validation"
_SUFFIXES = (".jsonl", ".json", ".txt", ".raw", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")


@dataclass(frozen=True)
class Excerpts:
    """`texts`, drawn from `source` with a seed; `digest` is equal if two runs read the same texts."""

    texts: tuple[str, ...]
    source: str
    digest: str


@dataclass(frozen=True)
class TextLoss:
    """The next-token loss.

    Attributes:
        nats_per_token: total loss / tokens; standard_error: of it, over excerpts (ratio estimator).
        normalised: nats_per_token / log(vocabulary); 1 is a uniform guess.
        nats_per_byte: comparable between tokenizers.
        excerpts: digest of the text; losses are comparable only if it is equal.
    """

    nats_per_token: float
    standard_error: float
    normalised: float
    nats_per_byte: float
    vocabulary: int
    tokens: int
    sequences: int
    source: str
    excerpts: str


def find_text(data: Path) -> Path:
    """The file of `data` to measure the loss on: c4*.SUFFIX in `data`, c4/ or text/. Prefers one named for validation
    or test; one named for training comes last. Raises EvaluationError."""
    for folder in (data / "c4", data / "text", data):
        files = [f for f in folder.glob("*" if folder.name == "c4" else "c4*") if _holds_text(f)]
        if files:
            return min(files, key=lambda f: (not _held_out(f), "train" in f.name, f.name))
    raise EvaluationError(
        f"{data}: no text for the loss: no c4*.jsonl (or .txt, .parquet) in it, c4/ or text/; pass --text FILE"
    )


def other_text(data: Path, measured: Path | None) -> Path | None:
    """A text file of `data` for calibration: any in c4/ or text/, or c4* or *train* in `data` itself; never `measured`,
    nor one named for validation or test. None if there is none."""
    for folder in (data / "c4", data / "text", data):
        files = [f for f in sorted(folder.glob("*")) if _holds_text(f) and not _held_out(f)]
        if folder == data:  # may also hold the questions of tasks
            files = [f for f in files if f.name.startswith("c4") or "train" in f.name]
        free = [f for f in files if measured is None or f.resolve() != measured.resolve()]
        if free:
            return min(free, key=lambda f: (not f.name.startswith("c4"), "train" not in f.name))
    return None


def _holds_text(file: Path) -> bool:
    return file.is_file() and file.name.endswith(_SUFFIXES)


def _held_out(file: Path) -> bool:
    return any(word in file.name for word in ("test", "val", "dev"))


def draw(
    file: Path | None, *, sequences: int = SEQUENCES, characters: int = CHARACTERS, seed: int = 0,
    column: str = "text",
) -> Excerpts:  # fmt: skip
    """Draw `sequences` excerpts of `characters` each from a local file, or from C4's validation split on the Hub.
    Deterministic in the file and the arguments. Raises EvaluationError (no text), CalibrationError (malformed)."""
    if file is None:
        documents, source = _stream(4 * sequences, seed), ":".join((*DEFAULT_DATASET, _SPLIT))
    else:
        if not file.is_file():
            raise EvaluationError(f"{file}: no such file; pass text for the loss with --text, or c4*.jsonl in --data")
        if not file.name.endswith(_SUFFIXES):
            raise EvaluationError(
                f"{file}: not a .jsonl, .json, .txt or .parquet file; convert the text to one of these"
            )
        if file.stat().st_size == 0:
            raise EvaluationError(f"{file}: empty; pass a file with text")
        # of a conversation, the contents of all turns
        documents = [text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
                     for text in read_documents(file, column)]  # fmt: skip
        source = file.name
    pieces = list(cut(documents, characters))
    if not pieces:
        raise EvaluationError(f"{file or source}: no text in the sample; pass another file")
    chosen = random.Random(seed).sample(range(len(pieces)), min(sequences, len(pieces)))
    texts = tuple(pieces[i] for i in chosen)
    return Excerpts(texts, source, hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16])


def cut(documents: Iterable[str], characters: int) -> Iterable[str]:
    """Yield consecutive pieces of `characters`; joins shorter documents and drops a short remainder."""
    waiting = ""
    for document in documents:
        text = document.strip()
        if not text:
            continue
        waiting = f"{waiting}\n\n{text}" if waiting else text
        while len(waiting) >= characters:
            yield waiting[:characters]
            waiting = waiting[characters:]
        if len(waiting) < characters // 4 and len(text) >= characters:
            waiting = ""
    if len(waiting) >= min(characters // 4, 64):
        yield waiting


def _stream(count: int, seed: int) -> list[str]:
    """Documents of C4's validation split."""
    try:
        return [str(text) for text in islice(stream_hub(TextSpec(seed=seed), _SPLIT), count)]
    except CalibrationError as error:
        reason = str(error).split("; ")[0]
        raise EvaluationError(f"{reason}; pass local text with --data DIR or --text FILE") from None


def summarise(
    excerpts: Excerpts, nats: Sequence[float], tokens: Sequence[int], vocabulary: int
) -> tuple[TextLoss, dict[str, float]]:
    """(overall loss, nats per token of each excerpt by id), from each excerpt's total `nats` and number of `tokens`."""
    n, total = len(nats), sum(tokens)
    mean = math.fsum(nats) / total
    weight = n / total  # with it, the mean over excerpts is the overall loss, for paired tests
    _, error = mean_and_error([weight * (x - mean * t) for x, t in zip(nats, tokens, strict=True)])
    size = sum(len(text.encode()) for text in excerpts.texts)
    loss = TextLoss(
        nats_per_token=mean, standard_error=error, normalised=mean / math.log(vocabulary),
        nats_per_byte=math.fsum(nats) / size, vocabulary=vocabulary, tokens=total, sequences=n,
        source=excerpts.source, excerpts=excerpts.digest,
    )  # fmt: skip
    return loss, {f"{excerpts.digest}-{i}": x * weight for i, x in enumerate(nats)}
