"""A goal and what was measured -> the plan: which layers and sublayers to drop, for every command that chooses.

First the layers; then attention and feed-forward sublayers of the layers that stay. Pure standard library: the caller
measures the model, and passes a function that checks whether the architecture can express a plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from slicer.errors import ArchitectureError, PlanError
from slicer.plan import blocks as ranking
from slicer.plan.amounts import SUBLAYERS, Goal
from slicer.plan.blocks import Cut, Doubt
from slicer.plan.distances import Distances
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import RunnerUp, TextRecord

RUNNERS_UP = 3
_RANDOM_TRIES = 200
WhyNot = Callable[[Plan], str | None]


class Measurements(Protocol):
    """What `choose` needs from an analysis."""

    @property
    def calibration(self) -> TextRecord | None:
        """The text that was measured on."""

    @property
    def greedy(self) -> Sequence[Mapping[str, float]]:
        """ "layer" and "loss" of each step of the greedy removal order; empty if not measured."""

    @property
    def sublayers(self) -> Mapping[str, Distances]:
        """Metric -> its table over sublayers, as in `halves`."""

    def distances(self, metric: str) -> Distances:
        """One metric between layers. Raises PlanError if it was not measured."""

    def halves(self, metric: str) -> Distances:
        """One metric between sublayers: attention i is number 2i, feed-forward i is number 2i + 1."""


@dataclass(frozen=True)
class Chosen:
    """The plan, with its runners-up.

    Attributes:
        doubt: set if the best two blocks of layers cannot be distinguished.
        passed_over: the closest cut, if the architecture cannot express it and another was taken.
    """

    plan: Plan
    doubt: Doubt | None = None
    passed_over: str | None = None


def choose(
    goal: Goal,
    depth: int,
    measured: Measurements | None,
    why_not: WhyNot,
    *,
    strategy: str = "similarity",
    metric: str = METRIC,
    offset: str = "whole",
    blocks: int = 1,
    protect: Collection[int] = (),
    form: str | None = None,
    seed: int = 0,
) -> Chosen:
    """The plan for `goal` in a model of `depth` layers; for a budget, of one layer: the caller tries more.

    `measured` may be None if `goal.measured(strategy)` is False. `why_not` gives the reason why a plan cannot be
    expressed, or None. `strategy`: "similarity" (the least distance by `metric`; "greedy" takes the measured order),
    "deepest", "tail", "deepest_expressible" or "random" (by `seed`). `offset`: blocks of "whole" layers, in at most
    `blocks` of them, "half"-offset ones, or "auto": the closer of the two if both were measured. Layers of
    `protect` stay whole. `form`: see `Plan.in_form`.

    Raises PlanError if there is no such cut, ArchitectureError if none can be expressed.
    """
    plan, unsure, passed_over = Plan.whole(depth), None, None
    if goal.layers:
        if goal.named is not None and offset == "half":
            raise PlanError("--offset half chooses the cut itself: give a fraction or a count of layers to --drop")
        n = goal.count(depth)
        if goal.named is not None:
            found: Iterable[_Candidate] = [_Candidate(Plan.dropping(depth, goal.named))]
        elif strategy == "similarity":
            assert measured is not None
            found = _by_distance(n, depth, measured, metric, offset, blocks, protect)
        else:
            found = _unmeasured(n, depth, strategy, seed)
        passed, best, others = _first_expressible(iter(found), form, why_not)
        plan, passed_over = best.plan, passed[0].block or None if passed else None
        if best.distance is not None:
            plan = _because(plan, best.distance, [*passed, *others], metric, measured)
        if measured is not None and not passed and best.cut and others and others[0].cut:
            unsure = ranking.doubt(measured.distances(metric), best.cut, others[0].cut)
    if goal.sublayers:
        plan = _without_sublayers(plan, goal, measured, metric, protect, form)
        if (reason := why_not(plan)) is not None:
            raise ArchitectureError(reason)
    return Chosen(plan, unsure, passed_over)


@dataclass(frozen=True)
class _Candidate:
    """A cut of layers; its distance and its blocks in words, if they were measured."""

    plan: Plan
    distance: float | None = None
    block: str = ""
    cut: Cut | None = None


def _unmeasured(n: int, depth: int, strategy: str, seed: int) -> Iterator[_Candidate]:
    """The cuts of n layers that a strategy tries, in its order."""
    tries: Iterable[Collection[int]]
    if strategy == "random":
        draw = random.Random(f"{seed} {n}")
        tries = (draw.sample(range(depth), n) for _ in range(_RANDOM_TRIES))
    elif strategy == "deepest_expressible":  # keeps the final layer if possible
        tries = (range(start, start + n) for start in (*range(depth - n - 1, -1, -1), depth - n))
    else:
        tries = [{"deepest": ranking.deepest, "tail": ranking.tail}[strategy](depth, n)]
    for layers in tries:
        drawn = seed if strategy == "random" else None
        yield _Candidate(replace(Plan.dropping(depth, layers), strategy=strategy, seed=drawn))


def _by_distance(
    n: int, depth: int, measured: Measurements, metric: str, offset: str, blocks: int, protect: Collection[int]
) -> list[_Candidate]:
    """All cuts of n layers smallest distance first; of equal ones that of whole layers first."""
    if metric == "greedy":
        return [_greedy(n, depth, measured.greedy, protect)]
    found: list[_Candidate] = []
    if offset != "half":
        count = depth if blocks == 1 else RUNNERS_UP + 1
        for cut in ranking.best_cuts(measured.distances(metric), n, blocks, protect, count):
            found.append(_Candidate(Plan.dropping(depth, cut.dropped), cut.distance, str(cut), cut))
    if offset == "half" or (offset == "auto" and metric in measured.sublayers):
        for block in ranking.rank_offset(measured.halves(metric), n, protect):
            i, j = block.start, block.start + n
            plan = replace(Plan.dropping(depth, range(i + 1, j + 1)), joined=((i, j),))
            found.append(_Candidate(plan, block.distance, f"half-offset {i}-{j}"))
    if not found:
        raise PlanError(f"no half-offset cut makes {depth} layers {n} fewer; drop at most {depth - 1}")
    return sorted(found, key=lambda candidate: candidate.distance or 0.0)


def _because(
    plan: Plan, distance: float, others: Iterable[_Candidate], metric: str, measured: Measurements | None
) -> Plan:
    """`plan` with the reason for the choice and the runners-up."""
    text = measured.calibration if measured is not None else None
    runners_up = tuple(RunnerUp(o.block, o.distance or 0.0) for o in islice(others, RUNNERS_UP))
    plan = replace(plan, strategy="similarity", distance=distance, metric=metric, runners_up=runners_up)
    return replace(plan, calibration=text, seed=None if text is None else text.seed)


def _greedy(n: int, depth: int, order: Sequence[Mapping[str, float]], protect: Collection[int]) -> _Candidate:
    """The first n layers of the greedy order, and the loss without them."""
    if len(order) < n:
        raise PlanError(
            f"this analysis has a greedy order of {len(order)} layers, not {n}; run slicer analyze with --greedy {n}"
        )
    layers = [int(step["layer"]) for step in order[:n]]
    if taken := set(layers) & set(protect):
        raise PlanError(f"the greedy order takes the protected layer {min(taken)}; choose another metric")
    return _Candidate(Plan.dropping(depth, layers), float(order[n - 1]["loss"]))


def _first_expressible(
    found: Iterator[_Candidate], form: str | None, why_not: WhyNot
) -> tuple[list[_Candidate], _Candidate, list[_Candidate]]:
    """(those passed over, the first of `found` that can be expressed, the next); raises the first reason if none."""
    passed, reasons = list[_Candidate](), list[str]()
    for best in found:
        best = replace(best, plan=best.plan.in_form(form))
        if (reason := why_not(best.plan)) is None:
            return passed, best, list(islice(found, RUNNERS_UP))
        reasons.append(reason)
        passed.append(best)
    raise ArchitectureError(reasons[0])


def _without_sublayers(
    plan: Plan, goal: Goal, measured: Measurements | None, metric: str, protect: Collection[int], form: str | None
) -> Plan:
    """`plan` without the sublayers that `goal` also drops: the named ones, or those with the smallest distance."""
    gone: dict[str, set[int]] = {"attention": set(), "ffn": set()}
    for what, amount in goal.sublayers.items():
        gone.get(what, set()).update(amount.layers or ())
    plan.without(*gone.values())  # raises if a sublayer is named twice
    amounts = {what: amount for what, amount in goal.sublayers.items() if amount.layers is None}
    if amounts:
        assert measured is not None
        # In the blockwise form the first layer keeps its attention.
        first = plan.sublayers[0][0] if form != "zeroed" else None
        ranked = ranking.rank_sublayers(
            measured.halves(metric),
            (i for i, _ in plan.sublayers if i != first and i not in protect),
            (j for _, j in plan.sublayers if j not in protect),
        )
        left = [part for part in ranked if part[1] not in gone[part[0]]]
        distance = plan.distance or 0.0
        for what, amount in amounts.items():
            n = amount.resolve_sublayers(plan.depth, what)
            taken = [part for part in left if what in (part[0], "sublayers")][:n]
            if len(taken) < n:
                raise PlanError(
                    f"--drop-{what} {n}: only {len(taken)} {SUBLAYERS[what]} can be dropped (none of dropped "
                    "layers, and in the blockwise form not the first layer's attention); drop fewer"
                )
            for kind, i, d in taken:
                gone[kind].add(i)
                distance += d
            left = [part for part in left if part not in taken]
        names = {"attention": "attention", "ffn": "feed-forward"}
        next_best = (part for part in left if part[0] in amounts or "sublayers" in amounts)
        others = (_Candidate(plan, d, f"{names[kind]} of layer {i}") for kind, i, d in next_best)
        plan = _because(plan, distance, others, metric, measured)
    return plan.without(*gone.values()).in_form(form)
