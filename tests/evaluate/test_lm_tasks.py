"""Questions of a task are lm-eval's: the share answered wrongly is 1 less its accuracy, whatever the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import slicer, succeeds

from slicer.checkpoint.hub import DEMO
from slicer.errors import EvaluationError
from slicer.evaluate.lm_tasks import draw
from slicer.evaluate.suite import Suite, SuiteSpec, evaluate
from slicer.figures import layers
from slicer.measure.shapley import Coalitions
from slicer.model.load import load_model
from slicer.model.walk import Walk

pytestmark = pytest.mark.xdist_group("lm-eval")  # one process reads its tasks for all


@pytest.mark.parametrize("task, count", [("boolq", 10), ("mmlu_astronomy@5", 12)])
def test_errors_are_one_less_lm_evals_accuracy(data: Path, task: str, count: int) -> None:
    options = SuiteSpec(tasks=(task,), data=data, dtype="float32", device="cpu")
    with Suite(options) as suite:
        score = evaluate("demo", suite).primary(task)
    model = load_model(DEMO, dtype="float32", device="cpu")
    questions = draw(task, 1000, model, DEMO, data=data)
    coalitions = Coalitions(Walk.in_memory(model), questions, sublayers=True)
    assert score is not None and len(questions.right) == score.items == count
    assert 1 - float(coalitions.base.mean()) == pytest.approx(score.value)
    assert 1 - questions.guessing == pytest.approx(1 / len(questions.choices[0]))
    rows = {tuple(batch[0].tolist()) for batch in questions.batches}
    assert len(rows) == len(questions.batches)  # none is run twice


def test_shapley_values_of_a_score(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "analysis_figures", lambda *_: [])  # tested elsewhere, and slow
    text = data / "text" / "c4-docs.jsonl"
    common = ["--calibration", text, "--samples", 2, "--seq-len", 16, "--shapley", 4, "--sublayers", "--data", data]
    asked = ["--against", "task:boolq", "--questions", 3]
    for where, more in (("a", []), ("b", ["--memory", "3MB", "--beside", tmp_path / "a"])):  # the second from disk
        succeeds("analyze", DEMO, *common, *asked, *more, "-o", tmp_path / where)
    one, two = (json.loads((tmp_path / where / "analysis.json").read_text()) for where in "ab")
    assert one["shapley"]["against"] == "task:boolq" and one["shapley"]["questions"] == 3
    assert one["shapley"]["pairs"] >= 1 and one["shapley"]["guessing"] == 0.5
    row = one["sublayers"]["shapley_score"]["distances"]["1"]
    assert row == two["sublayers"]["shapley_score"]["distances"]["1"] and len(row) == 24
    assert (tmp_path / "b" / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    succeeds("plan", tmp_path / "a", "--drop-attention", 3, "--metric", "shapley_score")


@pytest.mark.usefixtures("own_tasks_read_once")
def test_only_multiple_choice_is_scored(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "2 + 3?", "answer": "#### 5"}\n')
    model = load_model(DEMO, dtype="float32", device="cpu")
    with pytest.raises(EvaluationError, match="gsm8k@0: not multiple choice"):
        draw("gsm8k@0", 1, model, DEMO, data=tmp_path)


BAD = {
    "text": (["--against", "task:c4"], 1, "--against loss"),
    "no task": (["--against", "task:"], 2, "task:NAME"),
    "files of no task": (["--data", "."], 2, "--against task:NAME"),
    "no such directory": (["--against", "task:boolq", "--data", "nowhere"], 1, "no such directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions(name: str, data: Path, tmp_path: Path) -> None:
    given, code, words = BAD[name]
    text = data / "text" / "c4-docs.jsonl"
    short = ["--calibration", text, "--samples", 2, "--seq-len", 16, "--shapley", 4]
    result = slicer("analyze", DEMO, *short, *given, "-o", tmp_path / "out")
    assert result.exit_code == code and words in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out" / "analysis.json").exists()
