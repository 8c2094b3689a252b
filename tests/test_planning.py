"""From distances to layers: exact over every way to cut, and honest about what cannot be told apart."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from slicer.errors import PlanError, UsageError
from slicer.measure.analysis import Analysis, Distances
from slicer.plan.plan import parse_amount
from slicer.planning import plan
from slicer.select import Choice, Cut, best_cuts, doubt, protected

DEPTH = 8


def table(
    seed: int = 0, depth: int = DEPTH, metric: str = "angular_last_token", error: float = 0.01
) -> Distances:
    draw = random.Random(seed)
    mean = {n: [draw.random() * n for _ in range(depth - n + 1)] for n in range(1, depth + 1)}
    errors = {n: [error] * len(row) for n, row in mean.items()}
    return Distances(depth, 16, 64, mean, errors, metric, dict(errors))


def every_cut(distances: Distances, n: int, blocks: int, stay: frozenset[int]) -> dict[frozenset[int], float]:
    """Every set of n layers that falls into at most so many runs, with the sum of its runs' distances."""
    found = {}
    for layers in itertools.combinations(range(distances.depth), n):
        if stay & set(layers):
            continue
        runs = [list(g) for _, g in itertools.groupby(layers, key=lambda i: i - layers.index(i))]
        if len(runs) <= blocks:
            found[frozenset(layers)] = sum(distances.block(len(run))[run[0]] for run in runs)
    return found


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("stay", [frozenset(), frozenset({0, 5, 7})])
def test_no_way_to_cut_is_better(n: int, blocks: int, stay: frozenset[int]) -> None:
    for seed in range(4):
        distances = table(seed)
        expected = sorted(every_cut(distances, n, blocks, stay).items(), key=lambda item: item[1])[:4]
        if not expected:
            with pytest.raises(PlanError):
                best_cuts(distances, n, blocks, stay)
            continue
        found = best_cuts(distances, n, blocks, stay)
        assert [(frozenset(cut.dropped), pytest.approx(cut.distance)) for cut in found] == expected


def test_blocks_side_by_side_are_one_block() -> None:
    """Two neighbours are scored as the block they make, never as a cheaper sum."""
    mean = {1: [0.0] * 4, 2: [1.0] * 3, 3: [1.0] * 2, 4: [1.0]}
    distances = Distances(4, 4, 8, mean, mean)
    best = best_cuts(distances, 2, 2)[0]
    assert best.distance == 0 and best.dropped[1] - best.dropped[0] > 1


def test_of_equals_the_deeper_goes() -> None:
    flat = {n: [0.5] * (7 - n) for n in range(1, 7)}
    assert best_cuts(Distances(6, 4, 8, flat, flat), 2, 1)[0].dropped == (4, 5)
    assert best_cuts(Distances(6, 4, 8, flat, flat), 2, 2)[0].dropped == (4, 5)


def test_layers_that_stay() -> None:
    assert protected("0,1,-1", 8) == {0, 1, 7}
    assert protected("0-2,-2", 8) == {0, 1, 2, 6}
    for text in ("8", "-9", "a", "3-1", "1,,2"):
        with pytest.raises(PlanError, match="--protect"):
            protected(text, 8)


def test_what_cannot_be_told_apart_and_how_many_samples_would() -> None:
    distances = Distances(2, 16, 8, {1: [0.30, 0.31]}, {1: [0.02, 0.02]}, difference_error={1: [0.0, 0.01]})
    best, other = (Cut((Choice(i, 1, distances.block(1)[i]),)) for i in (0, 1))
    found = doubt(distances, best, other)
    assert found is not None and found.error == 0.01
    # 2 standard errors of 0.01 / sqrt(m / 16) are 0.01 at m = 64
    assert found.samples == pytest.approx(64, abs=1)
    sure = Distances(2, 16, 8, {1: [0.30, 0.33]}, {1: [0.02, 0.02]}, difference_error={1: [0.0, 0.01]})
    best, other = (Cut((Choice(i, 1, sure.block(1)[i]),)) for i in (0, 1))
    assert doubt(sure, best, other) is None


def analysis() -> Analysis:
    losses = table(1, metric="loss")
    few = Distances(DEPTH, 16, 64, {1: losses.mean[1]}, {1: losses.standard_error[1]}, "loss")
    order = ({"layer": 6, "loss": 2.0}, {"layer": 3, "loss": 2.1})
    return Analysis(
        DEPTH, 16, 64, {"angular_last_token": table(), "loss": few}, source="org/name", greedy=order,
        calibration={"source": "text", "seed": 3}, positions=(15, 63),
    )  # fmt: skip


def test_an_analysis_comes_back_from_json() -> None:
    whole = analysis()
    holes = Distances(DEPTH, 16, 64, {1: [math.nan] + [0.1] * 7}, {1: [0.0] * 8}, "healed_loss")
    whole = Analysis(**{**whole.__dict__, "metrics": {**whole.metrics, "healed_loss": holes}})
    again = Analysis.from_json(whole.to_json())
    assert again.to_json() == whole.to_json()
    assert again.distances() == whole.distances()
    assert math.isnan(again.distances("healed_loss").block(1)[0])
    for bad in ("", "[]", "{}", '{"format": 1}', whole.to_json().replace('"depth": 8', '"depth": 9')):
        with pytest.raises(PlanError):
            Analysis.from_json(bad)


def test_a_plan_says_why(tmp_path: Path) -> None:
    planned = plan(analysis(), parse_amount("3"), blocks=2, protect=frozenset({0}), command="slicer plan")
    made = planned.plan
    assert len(made.dropped) == 3 and 0 not in made.dropped
    assert made.source == "org/name" and made.seed == 3 and made.metric == "angular_last_token"
    assert made.distance == pytest.approx(planned.cuts[0].distance)
    assert [r["distance"] for r in made.runners_up] == sorted(r["distance"] for r in made.runners_up)


def test_the_greedy_order() -> None:
    assert plan(analysis(), parse_amount("2"), metric="greedy").plan.dropped == (3, 6)
    with pytest.raises(PlanError, match="--greedy 3"):
        plan(analysis(), parse_amount("3"), metric="greedy")


def test_sizes_that_were_not_measured() -> None:
    with pytest.raises(PlanError, match="--blocks"):
        plan(analysis(), parse_amount("3"), metric="loss")
    single = plan(analysis(), parse_amount("3"), metric="loss", blocks=3).plan
    assert len(single.dropped) == 3
    with pytest.raises(PlanError, match="no cka"):
        plan(analysis(), parse_amount("3"), metric="cka")
    with pytest.raises(UsageError, match="named layers"):
        plan(analysis(), parse_amount("3-5"))
