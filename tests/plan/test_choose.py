"""From a goal and distances to a plan: one function for every command, with a doubt where the best two are close."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from slicer.errors import ArchitectureError, PlanError
from slicer.measure.analysis import Analysis, Distances
from slicer.plan.amounts import Amount, Goal, parse_amount
from slicer.plan.choose import choose
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import TextRecord

DEPTH = 8
TEXT = TextRecord("text", 16, 64, seed=3)


def expressible(plan: Plan) -> str | None:
    return None


def table(seed: int = 0, depth: int = DEPTH, metric: str = METRIC) -> Distances:
    draw = random.Random(seed)
    mean = {n: [draw.random() * n for _ in range(depth - n + 1)] for n in range(1, depth + 1)}
    errors = {n: [0.01] * len(row) for n, row in mean.items()}
    return Distances(depth, 16, 64, mean, errors, metric, dict(errors))


def analysis() -> Analysis:
    losses = table(1, metric="loss")
    few = Distances(DEPTH, 16, 64, {1: losses.mean[1]}, {1: losses.standard_error[1]}, "loss")
    order = ({"layer": 6, "loss": 2.0}, {"layer": 3, "loss": 2.1})
    return Analysis(
        DEPTH, 16, 64, {METRIC: table(), "loss": few}, source="org/name", greedy=order, calibration=TEXT,
        sublayers={METRIC: table(2, 2 * DEPTH)}, positions=(15, 63),
    )  # fmt: skip


def goal(drop: int) -> Goal:
    return Goal(drop=Amount(count=drop))


def test_a_plan_tells_why() -> None:
    made = choose(goal(3), DEPTH, analysis(), expressible, blocks=2, protect={0}).plan
    assert len(made.dropped) == 3 and 0 not in made.dropped and made.strategy == "similarity"
    assert made.calibration == TEXT and made.seed == 3 and made.metric == METRIC
    distances = [other.distance for other in made.runners_up]
    assert made.distance is not None and [made.distance, *distances] == sorted([made.distance, *distances])
    assert len(distances) == 3


def test_the_greedy_order() -> None:
    made = choose(goal(2), DEPTH, analysis(), expressible, metric="greedy").plan
    assert made.dropped == (3, 6) and made.distance == 2.1
    with pytest.raises(PlanError, match="--greedy 3"):
        choose(goal(3), DEPTH, analysis(), expressible, metric="greedy")
    with pytest.raises(PlanError, match="protected layer 6"):
        choose(goal(2), DEPTH, analysis(), expressible, metric="greedy", protect={6})


def test_sizes_that_were_not_measured() -> None:
    with pytest.raises(PlanError, match="--blocks"):
        choose(goal(3), DEPTH, analysis(), expressible, metric="loss")
    assert len(choose(goal(3), DEPTH, analysis(), expressible, metric="loss", blocks=3).plan.dropped) == 3
    with pytest.raises(PlanError, match="no cka"):
        choose(goal(3), DEPTH, analysis(), expressible, metric="cka")


@pytest.mark.parametrize("offset", ["whole", "half", "auto"])
def test_the_closest_cut_that_can_be_expressed(offset: str) -> None:
    """What is passed over is named and comes first among the others."""
    first = choose(goal(2), DEPTH, analysis(), expressible, offset=offset)
    assert first.passed_over is None and bool(first.plan.joined) <= (offset != "whole")
    next_best = choose(
        goal(2), DEPTH, analysis(), lambda p: "no" if p.dropped == first.plan.dropped else None, offset=offset
    )
    assert next_best.passed_over == next_best.plan.runners_up[0].block
    assert next_best.plan.runners_up[0].distance == first.plan.distance and next_best.doubt is None
    with pytest.raises(ArchitectureError, match="first reason"):
        reasons = iter(["the first reason"])
        choose(goal(2), DEPTH, analysis(), lambda plan: next(reasons, "another"), offset=offset)


def test_the_closer_of_whole_and_half_offset_wins() -> None:
    plans = {o: choose(goal(2), DEPTH, analysis(), expressible, offset=o).plan for o in ("whole", "half", "auto")}
    assert plans["half"].joined and not plans["whole"].joined
    assert plans["auto"].distance == min(plans["whole"].distance or 0, plans["half"].distance or 0)
    unmeasured = replace(analysis(), sublayers={})
    assert choose(goal(2), DEPTH, unmeasured, expressible, offset="auto").plan == plans["whole"]
    ((i, j),) = plans["half"].joined
    moved = choose(goal(2), DEPTH, analysis(), expressible, offset="half", protect={i}).plan
    assert moved.joined != plans["half"].joined and not moved.joined[0][0] <= i <= moved.joined[0][1]


def test_of_equals_whole_layers_win() -> None:
    flat = {n: [0.5] * (4 - n + 1) for n in range(1, 5)}
    halves = {n: [0.5] * (8 - n + 1) for n in range(1, 9)}
    tables = {METRIC: Distances(4, 1, 2, flat, flat)}
    measured = Analysis(4, 1, 2, tables, sublayers={METRIC: Distances(8, 1, 2, halves, halves)})
    assert choose(goal(1), 4, measured, expressible, offset="auto").plan == replace(
        Plan.dropping(4, [3]), strategy="similarity", distance=0.5, metric=METRIC,
        runners_up=choose(goal(1), 4, measured, expressible).plan.runners_up,
    )  # fmt: skip


def test_named_layers_need_no_measurements() -> None:
    made = choose(Goal(drop=parse_amount("2-3")), DEPTH, None, expressible).plan
    assert made.dropped == (2, 3) and made.strategy == "explicit"
    with pytest.raises(PlanError, match="--offset half"):
        choose(Goal(drop=parse_amount("2-3")), DEPTH, None, expressible, offset="half")
    with pytest.raises(ArchitectureError, match="cannot"):
        choose(Goal(drop=parse_amount("2-3")), DEPTH, None, lambda plan: "cannot")


def test_strategies_that_measure_nothing() -> None:
    def plan(strategy: str, seed: int = 0) -> Plan:
        return choose(goal(3), DEPTH, None, expressible, strategy=strategy, seed=seed).plan

    assert plan("deepest").dropped == (4, 5, 6) == plan("deepest_expressible").dropped
    assert plan("tail").dropped == (5, 6, 7)
    assert plan("random", 1) == plan("random", 1) and plan("random", 1).seed == 1
    assert len({plan("random", seed).dropped for seed in range(5)}) > 1


def test_the_deepest_cut_that_can_be_expressed() -> None:
    def no_late_ones(plan: Plan) -> str | None:
        return "late" if max(plan.dropped) > 4 else None

    found = choose(goal(3), DEPTH, None, no_late_ones, strategy="deepest_expressible").plan
    assert found.dropped == (2, 3, 4)
    only_last = choose(goal(3), DEPTH, None, lambda p: None if 7 in p.dropped else "no", strategy="deepest_expressible")
    assert only_last.plan.dropped == (5, 6, 7)
    with pytest.raises(ArchitectureError, match="late"):
        choose(goal(7), DEPTH, None, no_late_ones, strategy="deepest_expressible")


def test_random_cuts_pass_over_what_cannot_be() -> None:
    found = choose(goal(2), DEPTH, None, lambda p: None if p.dropped == (2, 5) else "no", strategy="random")
    assert found.plan.dropped == (2, 5)


def test_sublayers_by_distance_beside_layers() -> None:
    """The first layer keeps its attention in the blockwise form; protected layers keep both."""
    asked = Goal(drop=Amount(count=1), drop_attention=Amount(count=2), drop_ffn=parse_amount("0-0"))
    made = choose(asked, DEPTH, analysis(), expressible, protect={4}).plan
    assert len(made.dropped) == 1 and len(made.no_attention) == 2 and made.no_ffn == (0,)
    assert made.form == "blockwise" and 0 not in made.no_attention and 4 not in made.no_attention
    row = analysis().halves().block(1)
    assert made.distance == pytest.approx(
        analysis().distances().block(1)[made.dropped[0]] + sum(row[2 * i] for i in made.no_attention)
    )
    assert all(other.block.startswith("attention of layer") for other in made.runners_up)
    either = choose(Goal(drop_sublayers=Amount(count=3)), DEPTH, analysis(), expressible, form="zeroed").plan
    attention, ffn = either.gone  # both of one layer are the layer
    assert sorted([row[2 * i] for i in attention] + [row[2 * i + 1] for i in ffn]) == sorted(row)[:3]
    assert either.form == "zeroed" and len(either.dropped) == 1
    with pytest.raises(PlanError, match="only 7 attention"):
        choose(Goal(drop_attention=Amount(count=8)), DEPTH, analysis(), expressible)
    with pytest.raises(ArchitectureError, match="not so"):
        choose(Goal(drop_ffn=parse_amount("1-2")), DEPTH, None, lambda plan: "not so" if plan.no_ffn else None)
    with pytest.raises(PlanError, match="twice"):
        choose(Goal(parse_amount("1-2"), drop_ffn=parse_amount("2-2")), DEPTH, None, expressible)


def test_doubt_where_the_best_two_are_alike() -> None:
    mean = {1: [0.5, 0.30, 0.31, 0.5]}
    close = Distances(4, 16, 8, mean, {1: [0.02] * 4}, difference_error={1: [0.0, 0.0, 0.01, 0.1]})
    chosen = choose(goal(1), 4, Analysis(4, 16, 8, {METRIC: close}), expressible)
    assert chosen.plan.dropped == (1,) and chosen.doubt is not None
    assert chosen.doubt.samples == pytest.approx(64, abs=1)
