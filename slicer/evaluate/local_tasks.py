"""lm-eval tasks on local files: the task's own YAML with only the location of its data replaced.

    DIR/mmlu/{dev,test}/SUBJECT_{dev,test}.csv      question, A, B, C, D, letter; no header (also DIR/{dev,test})
    DIR/boolq/{train,dev}.jsonl                     {"question", "passage", "answer": true}
    DIR/TASK/{train,validation,test}.SUFFIX         jsonl, json, csv or parquet with the columns of TASK's own data

MMLU and BoolQ rows are checked and rewritten with the columns of the Hub's data sets, so that lm-eval's own prompts,
choices, few-shot format and metrics apply unchanged.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError, unreadable

_LETTERS = "ABCD"
_SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Split name of a data set or task -> names it may have in a file name.
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "val"),
    "test": ("test",),
    "dev": ("dev", "validation", "valid", "val"),
}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def write_task(data: Path, name: str, config: Mapping[str, Any], yaml_path: Path | None, directory: Path) -> list[Path]:
    """Write `directory`/`name`.yaml, an lm-eval task that reads the files of `data`; returns these files. `config` and
    `yaml_path` are those of the original task. Raises EvaluationError: files missing, empty or malformed."""
    if yaml_path is None or "class" in config:
        raise EvaluationError(f"{name}: lm-eval implements this task in Python, so it cannot read --data {data}")
    if config.get("dataset_path") == "cais/mmlu":
        given, builder = _mmlu_files(data, str(config["dataset_name"])), "json"
        files = _converted(given, _mmlu_rows, directory / name)
    elif name == "boolq":
        given, builder = _boolq_files(data), "json"
        files = _converted(given, _boolq_rows, directory / name)
    else:
        given, builder = _plain_files(data, name, config)
        files = given
    record: dict[str, Any] = {
        "include": str(yaml_path),
        "task": name,
        "dataset_path": builder,
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file.resolve()) for split, file in files.items()},
            "cache_dir": str((directory / "cache").resolve()),
        },
    }
    for field in _SPLIT_FIELDS:
        if config.get(field) is not None and config[field] not in files:
            record[field] = None  # otherwise lm-eval fails on the missing split
    if not any(config.get(f) in files for f in ("validation_split", "test_split")):
        raise EvaluationError(
            f"{data}: {name} is scored on its {config.get('test_split') or config.get('validation_split')} split, "
            f"but only {', '.join(files)} was found; add the file"
        )
    import yaml

    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(record, sort_keys=False), "utf-8")
    return list(given.values())


def _converted(
    files: Mapping[str, Path], rows: Callable[[Path], Iterator[dict[str, Any]]], directory: Path
) -> dict[str, Path]:
    """Check the rows of each split and write them as jsonl into `directory`; returns the new files by split."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, file in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _read(file, rows)]
        written[split] = directory / f"{split}.jsonl"
        written[split].write_text("".join(lines), "utf-8")
    return written


def _read(file: Path, rows: Callable[[Path], Iterator[Any]]) -> list[Any]:
    """All `rows` of a file. Raises EvaluationError: there are none, or they cannot be read."""
    try:
        found = list(rows(file))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: cannot be read ({unreadable(error)}); pass UTF-8 text") from None
    if not found:
        raise EvaluationError(f"{file}: empty; add questions")
    return found


def _mmlu_files(data: Path, subject: str) -> dict[str, Path]:
    root = data / "mmlu" if (data / "mmlu").is_dir() else data
    files = {split: root / split / f"{subject}_{split}.csv" for split in ("test", "dev")}
    for file in files.values():
        if not file.is_file():
            raise EvaluationError(
                f"{file}: no such file; mmlu_{subject} needs it (mmlu needs the files of all 57 subjects)"
            )
    return files


def _mmlu_rows(file: Path) -> Iterator[dict[str, Any]]:
    for where, fields in _csv_rows(file):
        if len(fields) != 6:
            count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise EvaluationError(
                f"{where}: {count}, expected 6 (question, four choices, letter); fix or remove the row"
            )
        question, *choices, letter = fields
        if letter.strip() not in tuple(_LETTERS):
            raise EvaluationError(f"{where}: the answer {letter[:20]!r} is not one of A, B, C, D; fix the row")
        yield {"question": question, "choices": choices, "answer": _LETTERS.index(letter.strip())}


def _boolq_files(data: Path) -> dict[str, Path]:
    root = data / "boolq" if (data / "boolq").is_dir() else data
    files = {split: _split_file(root, split, (".jsonl",)) for split in ("train", "validation")}
    if files["validation"] is None and (data / "boolq.jsonl").is_file():
        files["validation"] = data / "boolq.jsonl"
    if files["validation"] is None:
        raise EvaluationError(f"{data}: boolq needs dev.jsonl, which is not in {root}")
    return {split: file for split, file in files.items() if file is not None}


def _boolq_rows(file: Path) -> Iterator[dict[str, Any]]:
    for where, row in _json_lines(file):
        answer = row.get("answer", row.get("label"))
        if not all(isinstance(row.get(name), str) for name in ("question", "passage")) or answer not in (0, 1):
            raise EvaluationError(
                f"{where}: not a row with question, passage and answer (true or false); fix or remove it"
            )
        yield {"question": row["question"], "passage": row["passage"], "label": int(answer)}


def _plain_files(data: Path, name: str, config: Mapping[str, Any]) -> tuple[dict[str, Path], str]:
    root = data / name
    wanted = sorted({str(config[f]) for f in _SPLIT_FIELDS if config.get(f)})
    if not root.is_dir():
        raise EvaluationError(f"{root}: no such directory; {name} needs its {' or '.join(wanted)} file there")
    found = {split: _split_file(root, split, tuple(_BUILDERS)) for split in wanted}
    files = {split: file for split, file in found.items() if file is not None}
    if not files:
        raise EvaluationError(f"{root}: no file with a split of {name}; add {wanted[-1]}.jsonl (or .csv, .parquet)")
    suffixes = {_BUILDERS[file.suffix] for file in files.values()}
    if len(suffixes) > 1:
        raise EvaluationError(f"{root}: files of several formats; use one format for all splits of {name}")
    for file in files.values():
        if file.stat().st_size == 0:
            raise EvaluationError(f"{file}: empty; add questions")
        if file.suffix == ".jsonl":
            _read(file, _json_lines)
        elif file.suffix == ".csv":
            (_, header), *rows = _read(file, _csv_rows)
            for where, fields in rows:
                if len(fields) != len(header):
                    raise EvaluationError(
                        f"{where}: {len(fields)} fields, but the header has {len(header)}; fix the row"
                    )
    return files, suffixes.pop()


def _csv_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """("FILE, line N", fields) of each row that is not empty."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        line = 1
        try:
            for fields in reader:
                if fields:
                    yield f"{file}, line {line}", fields
                line = reader.line_num + 1  # a quoted field may span several lines: report its first
        except csv.Error as error:
            raise EvaluationError(f"{file}, line {line}: not a CSV row ({error}); fix or remove it") from None


def _split_file(root: Path, split: str, suffixes: tuple[str, ...]) -> Path | None:
    names = (f"{word}{suffix}" for word in _SPLITS.get(split, (split,)) for suffix in suffixes)
    return next((root / name for name in names if (root / name).is_file()), None)


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", object) of each line that is not blank."""
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}, line {number}"
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    raise EvaluationError(f"{where}: not JSON; fix or remove the line") from None
                if not isinstance(row, dict):
                    raise EvaluationError(f"{where}: not a JSON object; fix or remove the line")
                yield where, row
