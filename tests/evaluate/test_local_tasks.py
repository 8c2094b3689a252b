"""Bad local files are named with their line; good ones reach lm-eval with the real task's prompt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slicer.errors import CalibrationError, EvaluationError
from slicer.evaluate import loss
from slicer.evaluate.lm_tasks import share
from slicer.evaluate.suite import Suite, SuiteSpec

pytestmark = pytest.mark.xdist_group("lm-eval")  # one process reads its tasks for all


def mmlu(root: Path, test: str, dev: str = "Q,a,b,c,d,A\n") -> Path:
    for split, text in (("dev", dev), ("test", test)):
        (root / "mmlu" / split).mkdir(parents=True)
        (root / "mmlu" / split / f"anatomy_{split}.csv").write_text(text)
    return root


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("Q,a,b,c,d,A\nQ,a,b,c,B\n", r"anatomy_test.csv, line 2: 5 fields"),
        ("Q,a,b,c,d,E\n", r"line 1: the answer 'E'"),
        ("Q,a,b,c,d,BC\n", r"line 1: the answer 'BC'"),
        ('"Q\nmore",a,b,c,d,A\nQ,a,b,c,d,\n', r"line 3: the answer ''"),
        ('Q,a,b,c,d,A\n"Q,a,b\n', r"line 2: not a CSV row"),
        ("", r"empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        Suite(SuiteSpec(tasks=("mmlu_anatomy",), data=mmlu(tmp_path, rows)))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own_tasks_read_once")
def test_what_is_missing_is_named(tmp_path: Path, data: Path) -> None:
    for tasks, message in (
        (("mmlu_anatomy",), "anatomy_test.csv: no such file"),
        (("mmlu",), "all 57 subjects"),
        (("mmlu_astronomi",), "no such task.*.*mmlu_astronomy"),
        (("mmlu@five",), "mmlu@5"),
        ((), "no tasks"),
    ):
        with pytest.raises(EvaluationError, match=message):
            Suite(SuiteSpec(tasks=tasks, data=data))
    with pytest.raises(EvaluationError, match="no such directory"):
        Suite(SuiteSpec(tasks=("boolq",), data=tmp_path / "none"))
    with pytest.raises(EvaluationError, match="no text for the loss"):
        Suite(SuiteSpec(tasks=("c4",), data=tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "q", "passage": "p"}', "line 2: not a row"),
        ('{"question": "q", "passage": "p", "answer": "yes"}', "line 2: not a row"),
        ("{broken", "line 2: not JSON"),
    ],
)
def test_a_bad_line_of_boolq_is_named(tmp_path: Path, row: str, message: str) -> None:
    good = '{"question": "q", "passage": "p", "answer": true}'
    (tmp_path / "boolq.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(EvaluationError, match=message):
        Suite(SuiteSpec(tasks=("boolq",), data=tmp_path))


def test_text_for_the_loss(tmp_path: Path) -> None:
    empty, blank, wrong = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.csv"
    empty.write_text("")
    blank.write_text("\n\n \n")
    wrong.write_text("text\n")
    for file, message in (
        (empty, "empty"),
        (blank, "no text"),
        (wrong, "not a .jsonl"),
        (tmp_path / "d.txt", "no such"),
    ):
        with pytest.raises(EvaluationError, match=message):
            loss.draw(file)
    bad = tmp_path / "e.jsonl"
    bad.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(CalibrationError, match="line 2"):
        loss.draw(bad)


def test_the_same_text_for_the_same_seed(data: Path) -> None:
    file = loss.find_text(data)
    a, b, c = (loss.draw(file, sequences=6, seed=seed) for seed in (0, 0, 1))
    assert a == b and a.digest != c.digest
    assert len(a.texts) == 6 and all(len(text) == loss.CHARACTERS for text in a.texts)


@pytest.mark.usefixtures("own_tasks_read_once")
def test_a_bad_file_of_any_task_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    file = folder / "validation.csv"
    for content, message in (
        (b"goal,sol1,sol2,label\na,b,c,0\na,b,0\n", "line 3: 3 fields.*4"),
        (b'goal,sol1,sol2,label\n"a,b,c,0\n', "line 2: not a CSV row"),
        (b"goal,sol1,sol2,label\n\xe9,b,c,0\n", "not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(EvaluationError, match=f"validation.csv.*{message}"):
            Suite(SuiteSpec(tasks=("piqa",), data=tmp_path))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    good = '{"question": "q", "passage": "p", "answer": true}\n'
    (tmp_path / "boolq.jsonl").write_bytes(b"\xef\xbb\xbf" + good.encode())
    Suite(SuiteSpec(tasks=("boolq",), data=tmp_path)).close()
    text = tmp_path / "c4.jsonl"
    text.write_bytes(b"\xef\xbb\xbf" + b'{"text": "' + b"word " * 400 + b'"}\n')
    assert loss.draw(text).texts


def test_which_text_is_measured_and_which_calibrates(tmp_path: Path) -> None:
    for name in ("c4-train.jsonl", "c4-validation.jsonl", "boolq.jsonl", "README.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    measured = loss.find_text(tmp_path)
    assert measured.name == "c4-validation.jsonl"
    other = loss.other_text(tmp_path, measured)
    assert other is not None and other.name == "c4-train.jsonl"
    other.unlink()
    assert loss.other_text(tmp_path, measured) is None  # questions and notes are no text to calibrate on
    measured.rename(tmp_path / "c4.jsonl")
    relative = Path(os.path.relpath(tmp_path / "c4.jsonl"))
    assert loss.other_text(tmp_path, relative) is None  # the same file by another name


def test_a_shared_limit_is_in_proportion() -> None:
    parts = share({"a": 100, "b": 300, "c": 1, "d": 600}, 100)
    assert sum(parts.values()) == 100 and parts["c"] == 1
    assert parts["d"] == pytest.approx(60, abs=1) and parts["b"] == pytest.approx(30, abs=1)
    assert share({"a": 5, "b": 5}, 1) == {"a": 1, "b": 1}
    assert share({"a": 2, "b": 5}, 100) == {"a": 2, "b": 5}
