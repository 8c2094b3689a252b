"""Documents of text from the sources that a `TextSpec` names: local files, Hub data sets, prompts of lm-eval tasks."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from slicer.errors import CalibrationError, reason_of
from slicer.plan.records import TextRecord

if TYPE_CHECKING:
    import torch

DEFAULT_DATASET = ("allenai/c4", "en")
_SHUFFLE_BUFFER = 1000  # documents of a stream that are shuffled together
_CONVERSATIONS = ("messages", "conversations", "conversation")  # columns with a list of turns
_ROLES = {"human": "user", "gpt": "assistant"}
Conversation = list[dict[str, str]]
Document = str | Conversation
_SUFFIXES = (".jsonl", ".json", ".txt", ".raw", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
_REMEDY = "use --calibration self (text sampled from the model) or a local .jsonl, .txt or .parquet file"


@dataclass(frozen=True)
class TextSpec:
    """What calibration text to use.

    Attributes:
        source: None for allenai/c4 (English, streamed), "self" for sequences sampled from the model, a local file, a
            Hub data set (`name` or `name:config`), or `task:NAME` for the prompts and answers of an lm-eval task.
            Several, separated by commas, get equal numbers of samples.
            Conversations (a column `messages` or `conversations`) go through the chat template.
        samples: number of sequences; seq_len: tokens in each, with BOS; batch_size: sequences per forward pass.
        seed: for the choice of documents, or for sampling.
        column: the column that holds the text.
    """

    source: str | None = None
    samples: int = 64
    seq_len: int = 256
    batch_size: int = 4
    seed: int = 0
    column: str = "text"

    @property
    def name(self) -> str:
        """The name of the source: that of the default data set if none is given."""
        return self.source or ":".join(DEFAULT_DATASET)

    @classmethod
    def of_record(cls, record: TextRecord) -> TextSpec:
        """The text that a record describes, to read it again."""
        return cls(**{f.name: getattr(record, f.name) for f in fields(cls)})

    def record(self, tokens: torch.Tensor) -> TextRecord:
        """The record of `tokens`, int64 [samples, seq_len], which were made of this text."""
        given = {**asdict(self), "source": self.name, "samples": len(tokens), "seq_len": tokens.shape[1]}
        return TextRecord(**given, sha256=hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest())

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to resume another: the values, and sizes and dates of local files."""
        files = [(path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(self)]
        return {**asdict(self), "files": files}


def check_sources(spec: TextSpec) -> None:
    """Raise CalibrationError early if a source of `spec` cannot be read or is empty."""
    for part in parts_of(spec):
        if part.source != "self" and next(iter(documents(part)), None) is None:
            raise CalibrationError(f"{part.source}: no text in it; pass another --calibration")


def local_files(spec: TextSpec) -> list[Path]:
    """The local files among the sources of `spec`."""
    paths = [Path(part.source) for part in parts_of(spec) if part.source is not None]
    return [path for path in paths if path.is_file()]


def sources_of(source: str | None) -> list[str | None]:
    """The sources in a comma-separated list. Raises CalibrationError for an empty name."""
    if source is None or "," not in source or Path(source).exists():
        return [source]
    names: list[str | None] = [name.strip() for name in source.split(",")]
    if "" in names:
        raise CalibrationError(f"{source}: name one source between two commas")
    return names


def parts_of(spec: TextSpec) -> list[TextSpec]:
    """One spec per source of `spec`; they share the samples, and the first ones get the remainder."""
    names = sources_of(spec.source)
    if len(names) == 1:
        return [spec]
    if len(names) > spec.samples:
        raise CalibrationError(
            f"--calibration {spec.source}: {len(names)} sources; pass --samples {len(names)} or more"
        )
    share, over = divmod(spec.samples, len(names))
    return [replace(spec, source=name, samples=share + (at < over)) for at, name in enumerate(names)]


def documents(spec: TextSpec) -> Iterator[Document]:
    """The documents of one source, shuffled with the seed. Raises CalibrationError if it cannot be read."""
    if spec.source is None or is_streamed(spec.source):
        return stream_hub(spec)
    if spec.source.startswith("task:"):
        texts: list[Document] = list(prompts(spec.source.removeprefix("task:")))
    else:
        texts = read_documents(Path(spec.source), spec.column)
    random.Random(spec.seed).shuffle(texts)
    return iter(texts)


def mixed(spec: TextSpec) -> Iterator[Document]:
    """The documents of `spec`; several sources are interleaved by amount of text, until each ends.

    Raises CalibrationError if one of several is "self", or cannot be read.
    """
    names = sources_of(spec.source)
    if len(names) > 1 and "self" in names:
        raise CalibrationError(f"{spec.source}: use self only alone")
    streams = [documents(replace(spec, source=name)) for name in names]
    taken = [0] * len(streams)
    while streams:
        at = taken.index(min(taken))
        document = next(streams[at], None)
        if document is None:
            del streams[at], taken[at]
            continue
        taken[at] += len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
        yield document


def is_streamed(source: str | None) -> bool:
    """Whether the documents of `source` are streamed from the Hub."""
    return source is None or not (source.startswith("task:") or Path(source).exists() or source.endswith(_SUFFIXES))


def read_documents(file: Path, column: str) -> list[Document]:
    """Every document of a local file; .txt and .raw files are split at blank lines. Raises CalibrationError."""
    if not file.is_file():
        raise CalibrationError(f"{file}: no such file; {_REMEDY}")
    readers: dict[str, Callable[[Path, str], list[Document]]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_text, ".raw": _read_text,
        ".parquet": _read_parquet,
    }  # fmt: skip
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix not in readers:
        raise CalibrationError(f"{file}: not a .jsonl, .json, .txt or .parquet file; {_REMEDY}")
    if file.stat().st_size == 0:
        raise CalibrationError(f"{file}: empty; pass a file with text, or --calibration self")
    try:
        return readers[suffix](file, column)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise CalibrationError(f"{file}: cannot be read ({reason_of(error)})") from None


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


def _read_text(file: Path, column: str) -> list[Document]:
    with _open(file) as stream:
        return [part for part in re.split(r"\n[ \t\r]*\n", stream.read()) if part.strip()]


def _read_jsonl(file: Path, column: str) -> list[Document]:
    texts: list[Document] = []
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    texts.append(_text_of(json.loads(line), column, f"{file}, line {number}"))
                except ValueError:
                    raise CalibrationError(f"{file}, line {number}: not JSON; fix or remove the line") from None
    return texts


def _read_json(file: Path, column: str) -> list[Document]:
    with _open(file) as stream:
        try:
            rows = json.load(stream)
        except ValueError:
            return _read_jsonl(file, column)
    rows = rows if isinstance(rows, list) else [rows]
    return [_text_of(row, column, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _read_parquet(file: Path, column: str) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
        wanted = column if column in names else next((c for c in _CONVERSATIONS if c in names), None)
        if wanted is None:
            raise CalibrationError(f"{file}: no column {column!r} (columns: {', '.join(names)}); name it with --column")
        rows = parquet.read_table(file, columns=[wanted])[wanted].to_pylist()
        return [_text_of({wanted: row}, column, str(file)) for row in rows if row]
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{file}: not a parquet file ({reason_of(error)})") from None


def _text_of(row: Any, column: str, where: str | None) -> Document:
    """The row's text, or its conversation if it has no such column or the column holds a list of turns."""
    if isinstance(row, str):
        return row
    columns = row if isinstance(row, dict) else {}
    found = next((columns[name] for name in (column, *_CONVERSATIONS) if name in columns), None)
    if isinstance(found, str):
        return found
    if isinstance(found, list) and (messages := _messages(found)):
        return messages
    if column not in columns:
        names = ", ".join(columns) if isinstance(row, dict) else "none"
        raise CalibrationError(f"{where}: no column {column!r} ({names}); name it with --column")
    raise CalibrationError(f"{where}: column {column!r} has no text; name another one with --column")


def _messages(found: list[Any]) -> Conversation:
    """Convert to [{role, content}] from that form or from ShareGPT's (from, value); empty for anything else."""
    messages = []
    for turn in found:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return []
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def stream_hub(spec: TextSpec, split: str = "train") -> Iterator[Document]:
    """Documents of a Hub data set, streamed and shuffled with the seed. Raises CalibrationError if unreachable."""
    name, config = DEFAULT_DATASET if spec.source is None else (*spec.source.split(":", 1), None)[:2]
    offline = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    if any(value in ("1", "TRUE", "YES", "ON") for value in offline):
        raise CalibrationError(f"{name}: cannot be streamed offline (HF_HUB_OFFLINE is set); {_REMEDY}")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows.shuffle(seed=spec.seed, buffer_size=_SHUFFLE_BUFFER):
            yield _text_of(row, spec.column, name)
    except CalibrationError:
        raise
    except Exception as error:  # the network, the Hub and the data set's format raise different kinds
        raise CalibrationError(f"{name}: cannot be streamed ({reason_of(error)}); {_REMEDY}") from None


def prompts(name: str) -> Iterator[str]:
    """Each document of the task as text: prompt, then answer. `name`: an lm-eval task, or DIRECTORY/TASK for own YAML
    files. Uses training documents if the task has them, so the scored ones stay unseen.

    Raises CalibrationError if lm-eval, the task or its data is missing.
    """
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise CalibrationError(f"task:{name}: lm-eval is not installed; pip install slicer-llm[eval]") from None
    datasets.disable_progress_bars()
    directory, _, short = name.rpartition("/")
    if directory and not Path(directory).is_dir():
        raise CalibrationError(f"task:{name}: no directory {directory}; use task:TASK or task:DIRECTORY/TASK")
    try:
        found = TaskManager(include_path=directory or None).load(short)
        for task in found["tasks"].values():  # all tasks of a group
            for doc in _documents(task):
                yield _text(task, doc)
    except Exception as error:  # lm-eval, datasets and the task's own code raise many kinds
        raise CalibrationError(
            f"task:{name}: cannot load its prompts ({reason_of(error)}); `lm-eval ls tasks` lists the names"
        ) from None


def _documents(task: Any) -> Any:
    if task.has_training_docs():
        return task.training_docs()
    return task.validation_docs() if task.has_validation_docs() else task.test_docs()


def _text(task: Any, doc: Any) -> str:
    answer = task.doc_to_target(doc)
    if isinstance(answer, int) and task.config.doc_to_choice is not None:
        answer = task.doc_to_choice(doc)[answer]
    answer = answer[0] if isinstance(answer, list) else answer
    return f"{task.doc_to_text(doc)}{task.config.target_delimiter}{answer}"
