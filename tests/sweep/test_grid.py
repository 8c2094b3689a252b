"""Cells of a sweep, and the promise that bisection keeps."""

from __future__ import annotations

import random
from typing import Any

import pytest

from slicer.errors import EvaluationError, UsageError
from slicer.evaluate.results import Evaluation, Score
from slicer.sweep.bisect import Retained, bisect, check, retained
from slicer.sweep.grid import UNPRUNED, Grid, cells, paper


def test_cheap_cells_come_first_and_nothing_twice() -> None:
    grid = Grid("0,2,4", ("similarity", "random"), ("fold", "none"), (0, 1))
    found = cells(grid, 12)
    assert found[0] == UNPRUNED and len(set(c.name for c in found)) == len(found)
    heals = [c.heal for c in found[1:]]
    assert heals == sorted(heals, key=["none", "fold"].index)
    bare = [c.n for c in found[1:] if c.heal == "none"]
    assert bare == sorted(bare, reverse=True)
    assert len([c for c in found if c.strategy == "similarity" and c.heal == "none"]) == 2
    assert len([c for c in found if c.strategy == "random" and c.heal == "none"]) == 4


@pytest.mark.parametrize(
    "axes", [{"strategies": ("best",)}, {"heals": ("magic",)}, {"heals": ("fold@4",)}, {"strategies": ()}]
)
def test_unknown_axes(axes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Grid(**axes)


def test_the_papers_presets_yield_to_what_was_given() -> None:
    grid, tasks = paper(None, Grid(), ())
    assert grid.strategies == ("similarity", "deepest") and grid.heals == ("none", "qlora")
    assert tasks == ("mmlu@5", "boolq@0", "c4")
    grid, tasks = paper("shots", Grid("0,2"), {"drop"})
    assert grid.drop == "0,2" and grid.strategies == ("similarity",) and len(tasks) == 4


@pytest.mark.parametrize("deepest", [0, 1, 5, 11, 22, 23])
def test_bisection_finds_the_deepest_cut(deepest: int) -> None:
    asked = []

    def measure(n: int) -> Retained:
        asked.append(n)
        return Retained(n, 1.0 if n <= deepest else 0.5, 0.1 if n <= deepest else -0.1, 0.01)

    found = bisect(range(1, 24), measure)
    assert (found.best.n if found.best else 0) == deepest
    assert len(asked) == len(set(asked)) <= 8


def test_a_dip_does_not_end_the_search() -> None:
    """n = 12 fails by noise, 13 keeps the promise: the answer lies beyond the dip."""
    found = bisect(range(1, 24), lambda n: Retained(n, 1.0, 0.1 if n in range(12) or n == 13 else -0.1, 0.01))
    assert found.best is not None and found.best.n == 13


def test_cuts_that_cannot_be_are_passed_over() -> None:
    """Where only whole periods of four can go, the deepest multiple of four that keeps the promise is found."""
    asked = []

    def measure(n: int) -> Retained:
        asked.append(n)
        return Retained(n, 1.0, 0.1 if n <= 17 else -0.1, 0.01)

    found = bisect([4, 8, 12, 16, 20], measure)
    assert found.best is not None and found.best.n == 16 and all(n % 4 == 0 for n in asked)
    assert bisect([], measure).best is None


def evaluation(values: list[float]) -> Evaluation:
    score = Score("mmlu", "acc", sum(values) / len(values), 0.01, 0.25, len(values), 0)
    return Evaluation("m", (score,), None, None, {"mmlu/acc": {str(i): v for i, v in enumerate(values)}})


def test_the_margin_is_paired() -> None:
    """Both wrong on the same items: 2% less of 500 right answers is known far better than either score."""
    draw = random.Random(1)
    whole = [float(draw.random() < 0.5) for _ in range(1000)]
    at = [i for i, v in enumerate(whole) if v][:40]
    cut = [0.0 if i in at else v for i, v in enumerate(whole)]
    found = retained(4, evaluation(whole), evaluation(cut), 0.98, "mmlu")
    assert found.share == pytest.approx(1 - 40 / sum(whole))
    assert not found.kept and found.sure and found.standard_error < 0.008
    assert retained(0, evaluation(whole), evaluation(whole), 0.98, "mmlu").kept


def test_a_promise_needs_its_task() -> None:
    assert check(0.98, None, ("mmlu@5", "c4")) == "mmlu@5"
    with pytest.raises(EvaluationError, match="--metric mmlu@5"):
        check(0.98, "mmlu", ("mmlu@5", "c4"))
    with pytest.raises(EvaluationError, match="add it to --tasks"):
        check(0.98, "boolq", ("mmlu", "c4"))
    with pytest.raises(UsageError):
        check(98, "mmlu", ("mmlu",))
