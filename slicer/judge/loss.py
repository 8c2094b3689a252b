"""The loss on text: the same excerpts for every model, whatever its tokenizer.

An excerpt is a number of characters, so that models with different vocabularies read the same text; nats a token are
then also given as a share of log V (the paper's normalisation, section 4.2: 1 is guessing) and as nats a byte.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError
from slicer.measure.calibration import read_documents

SEQUENCES = 64
CHARACTERS = 1024
_DATASET = ("allenai/c4", "en", "validation")
_SUFFIXES = (".jsonl", ".json", ".txt", ".raw", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")


@dataclass(frozen=True)
class Excerpts:
    """`texts`, drawn from `source` with a seed; `digest` tells whether two runs read the same."""

    texts: tuple[str, ...]
    source: str
    digest: str


@dataclass(frozen=True)
class Loss:
    """The next-token loss.

    Attributes:
        nats_per_token: total loss / tokens; standard_error: of it, over excerpts (ratio estimator).
        normalised: nats_per_token / log(vocabulary); 1 is guessing.
        nats_per_byte: comparable between tokenizers.
        excerpts: digest of the text; two losses compare only where it is the same.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_text(data: Path) -> Path:
    """The file of `data` that the loss is measured on: c4*.SUFFIX in it, in c4/ or in text/; of several the one named
    for validation or test, and one named for training last. Raises EvaluationError."""
    for folder in (data / "c4", data / "text", data):
        files = [f for f in folder.glob("*" if folder.name == "c4" else "c4*") if _holds_text(f)]
        for file in sorted(files, key=lambda f: (not _held_out(f), "train" in f.name, f.name)):
            return file
    raise EvaluationError(
        f"{data}: no text for the loss: no c4*.jsonl (or .txt, .parquet) in it, in c4/ or in text/; name a file: --text"
    )


def other_text(data: Path, measured: Path | None) -> Path | None:
    """A text file of `data` to calibrate on: any of c4/ or text/, or c4* or *train* beside them; not the one measured,
    nor one named for validation or test; or None."""
    for folder in (data / "c4", data / "text", data):
        files = [f for f in sorted(folder.glob("*")) if _holds_text(f) and not _held_out(f)]
        if folder == data:  # where the questions of tasks may lie too
            files = [f for f in files if f.name.startswith("c4") or "train" in f.name]
        free = [f for f in files if measured is None or f.resolve() != measured.resolve()]
        for file in sorted(free, key=lambda f: (not f.name.startswith("c4"), "train" not in f.name)):
            return file
    return None


def _holds_text(file: Path) -> bool:
    return file.is_file() and file.name.endswith(_SUFFIXES)


def _held_out(file: Path) -> bool:
    return any(word in file.name for word in ("test", "val", "dev"))


def draw(
    file: Path | None, *, sequences: int = SEQUENCES, characters: int = CHARACTERS, seed: int = 0,
    column: str = "text",
) -> Excerpts:  # fmt: skip
    """`sequences` excerpts of `characters` each from a local file, or from C4's validation split on the Hub.

    The same for the same file and arguments. Raises EvaluationError (no file, no text), CalibrationError (malformed).
    """
    if file is None:
        documents, source = _stream(4 * sequences, seed), ":".join(_DATASET)
    else:
        if not file.is_file():
            raise EvaluationError(
                f"{file}: no such file; the loss needs text (--text, or c4*.jsonl in --data)"
            )
        if not file.name.endswith(_SUFFIXES):
            raise EvaluationError(
                f"{file}: not a .jsonl, .json, .txt or .parquet file; give text in one of them"
            )
        if file.stat().st_size == 0:
            raise EvaluationError(f"{file}: empty; the loss needs text")
        # a conversation counts by what is said in it
        documents = [text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
                     for text in read_documents(file, column)]  # fmt: skip
        source = file.name
    pieces = list(cut(documents, characters))
    if not pieces:
        raise EvaluationError(f"{file or source}: an empty sample: there is no text in it")
    chosen = random.Random(seed).sample(range(len(pieces)), min(sequences, len(pieces)))
    texts = tuple(pieces[i] for i in chosen)
    return Excerpts(texts, source, hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16])


def cut(documents: Iterable[str], characters: int) -> Iterable[str]:
    """Consecutive pieces of `characters`; shorter documents are joined, and a short rest is left out."""
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
    import datasets

    datasets.disable_progress_bars()
    name, config, split = _DATASET
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        return [str(row["text"]) for row in rows.shuffle(seed=seed, buffer_size=1000).take(count)]
    except Exception as error:  # the network, the Hub and the data set's format each raise their own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise EvaluationError(
            f"{name}: cannot be streamed ({reason}); give text: --data DIR or --text FILE"
        ) from None


def summarise(
    excerpts: Excerpts, nats: Sequence[float], tokens: Sequence[int], vocabulary: int
) -> tuple[Loss, dict[str, float]]:
    """The loss of all excerpts from each one's total `nats` and number of `tokens`; and nats a token of each by id."""
    n, total = len(nats), sum(tokens)
    mean = math.fsum(nats) / total
    residuals = [x - mean * t for x, t in zip(nats, tokens, strict=True)]
    error = math.sqrt(math.fsum(r * r for r in residuals) / (n - 1) * n) / total if n > 1 else 0.0
    size = sum(len(text.encode()) for text in excerpts.texts)
    loss = Loss(
        nats_per_token=mean,
        standard_error=error,
        normalised=mean / math.log(vocabulary),
        nats_per_byte=math.fsum(nats) / size,
        vocabulary=vocabulary,
        tokens=total,
        sequences=n,
        source=excerpts.source,
        excerpts=excerpts.digest,
    )
    # An excerpt's share of the overall loss, so that the mean of these is the loss itself and pairs add up.
    weight = n / total
    return loss, {f"{excerpts.digest}-{i}": x * weight for i, x in enumerate(nats)}
