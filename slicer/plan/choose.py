"""A goal and what was measured -> the plan: which layers and sublayers to drop, for every command that chooses.

First the layers, then, of those that stay, attention and feed-forward parts. Pure standard library: the caller measures
the model, and answers whether the architecture can express a plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from slicer.errors import ArchitectureError, PlanError
from slicer.plan.amounts import SUBLAYERS, Goal
from slicer.plan.blocks import (
    Cut,
    Doubt,
    MeasuredDistances,
    best_cuts,
    deepest,
    doubt,
    rank_offset,
    rank_sublayers,
    tail,
)
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import RunnerUp, TextRecord

RUNNERS_UP = 3
_RANDOM_TRIES = 200
WhyNot = Callable[[Plan], str | None]


class Measurements(Protocol):
    """What choosing needs of an analysis."""

    @property
    def calibration(self) -> TextRecord | Mapping[str, object] | None:
        """The text measured on."""

    @property
    def greedy(self) -> Sequence[Mapping[str, float]]:
        """ "layer" and "loss" of each step of the greedy order of removal, where it was measured."""

    @property
    def sublayers(self) -> Mapping[str, MeasuredDistances]:
        """Metric -> its table of half-layers, as in `halves`."""

    def distances(self, metric: str) -> MeasuredDistances:
        """One metric between layers. Raises PlanError when it was not measured."""

    def halves(self, metric: str) -> MeasuredDistances:
        """One metric between half-layers: attention i is number 2i, feed-forward part i number 2i + 1."""


@dataclass(frozen=True)
class Chosen:
    """The plan, with its runners-up.

    Attributes:
        doubt: where the best two blocks of layers cannot be told apart.
        passed_over: the closest cut, where the architecture cannot express it and another was taken.
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
    """The plan that drops what `goal` asks of `depth` layers; of a budget, a single layer: its caller tries more.

    `measured` may be None where `goal.measured(strategy)` is False. `why_not` gives the reason why a plan cannot be
    expressed, or None. `strategy`: "similarity" (the least distance by `metric`; "greedy" takes the measured order),
    "deepest", "tail", "deepest_expressible" or "random" (by `seed`). `offset`: blocks of "whole" layers, in at most
    `blocks` of them, "half"-offset ones, or "auto": the closer of the two where both were measured. Layers of
    `protect` stay whole. `form`: see `Plan.in_form`.

    Raises PlanError where there is no such cut, ArchitectureError where none can be expressed.
    """
    chosen = Chosen(Plan.whole(depth))
    if goal.layers:
        if goal.named is not None and offset == "half":
            raise PlanError(
                "--offset half chooses the cut itself: give a fraction or a count of layers to --drop"
            )
        if goal.named is not None:
            found: Iterator[_Candidate] = iter([_Candidate(Plan.dropping(depth, goal.named))])
        elif strategy == "similarity":
            assert measured is not None
            found = _by_distance(goal.count(depth), depth, measured, metric, offset, blocks, protect)
        else:
            found = _unmeasured(goal.count(depth), depth, strategy, seed)
        chosen = _first_expressible(found, form, why_not)
    return _without_sublayers(chosen, goal, measured, why_not, metric, protect, form)


@dataclass(frozen=True)
class _Candidate:
    """A cut of layers; `block` in words and `cut` only of what was measured."""

    plan: Plan
    block: str = ""
    cut: Cut | None = None
    distances: MeasuredDistances | None = None

    @property
    def distance(self) -> float:
        return self.plan.distance or 0.0


def _unmeasured(n: int, depth: int, strategy: str, seed: int) -> Iterator[_Candidate]:
    """The cuts of n layers that a strategy tries, in its order."""
    tries: Iterator[Collection[int]]
    if strategy == "random":
        draw = random.Random(f"{seed} {n}")
        tries = (draw.sample(range(depth), n) for _ in range(_RANDOM_TRIES))
    elif strategy == "deepest_expressible":  # the final layer stays where it can
        tries = (range(start, start + n) for start in (*range(depth - n - 1, -1, -1), depth - n))
    else:
        tries = iter([{"deepest": deepest, "tail": tail}[strategy](depth, n)])
    for layers in tries:
        plan = replace(Plan.dropping(depth, layers), strategy=strategy)
        yield _Candidate(replace(plan, seed=seed) if strategy == "random" else plan)


def _by_distance(
    n: int,
    depth: int,
    measured: Measurements,
    metric: str,
    offset: str,
    blocks: int,
    protect: Collection[int],
) -> Iterator[_Candidate]:
    """All cuts of n layers by the least distance; of equals that of whole layers first."""

    if metric == "greedy":
        plan, loss = _greedy(n, depth, measured.greedy, protect)
        yield _Candidate(_because(plan, loss, metric, measured))
        return
    found: list[_Candidate] = []
    if offset != "half":
        distances = measured.distances(metric)
        for cut in best_cuts(distances, n, blocks, protect, depth if blocks == 1 else RUNNERS_UP + 1):
            plan = _because(Plan.dropping(depth, cut.dropped), cut.distance, metric, measured)
            found.append(_Candidate(plan, str(cut), cut, distances))
    if offset == "half" or (offset == "auto" and metric in measured.sublayers):
        for block in rank_offset(measured.halves(metric), n, protect):
            i, j = block.start, block.start + n
            plan = replace(Plan.dropping(depth, range(i + 1, j + 1)), joined=((i, j),))
            plan = _because(plan, block.distance, metric, measured)
            found.append(_Candidate(plan, f"half-offset {i}-{j}"))
    if not found:
        raise PlanError(f"no half-offset cut makes {depth} layers {n} fewer; drop at most {depth - 1}")
    yield from sorted(found, key=lambda candidate: candidate.distance)


def _because(plan: Plan, distance: float, metric: str, measured: Measurements) -> Plan:
    """`plan` with why it was chosen."""
    given = measured.calibration
    text = None if given is None else TextRecord.of(given, "the analysis: calibration")
    return replace(
        plan,
        strategy="similarity",
        distance=distance,
        metric=metric,
        calibration=text,
        seed=None if text is None else text.seed,
    )


def _greedy(
    n: int, depth: int, order: Sequence[Mapping[str, float]], protect: Collection[int]
) -> tuple[Plan, float]:
    """The first n layers of the greedy order, and the loss without them."""
    if len(order) < n:
        raise PlanError(
            f"this analysis has a greedy order of {len(order)} layers, not {n}; run slicer analyze with --greedy {n}"
        )
    layers = [int(step["layer"]) for step in order[:n]]
    if taken := set(layers) & set(protect):
        raise PlanError(f"the greedy order takes the protected layer {min(taken)}; choose another metric")
    return Plan.dropping(depth, layers), float(order[n - 1]["loss"])


def _first_expressible(found: Iterator[_Candidate], form: str | None, why_not: WhyNot) -> Chosen:
    """The first of `found` that can be expressed, beside those that follow; raises the first reason where none can."""
    passed: list[_Candidate] = []
    reason = ""
    for best in found:
        plan = best.plan.in_form(form)
        if (refused := why_not(plan)) is not None:
            reason = reason or refused
            passed.append(best)
            continue
        if best.plan.strategy != "similarity":
            return Chosen(plan)
        others = [*passed, *found][:RUNNERS_UP]
        unsure = None
        if not passed and others and best.distances and best.cut and others[0].cut:
            unsure = doubt(best.distances, best.cut, others[0].cut)
        runners_up = tuple(RunnerUp(other.block, other.distance) for other in others)
        return Chosen(replace(plan, runners_up=runners_up), unsure, passed[0].block if passed else None)
    raise ArchitectureError(reason)


def _without_sublayers(
    chosen: Chosen,
    goal: Goal,
    measured: Measurements | None,
    why_not: WhyNot,
    metric: str,
    protect: Collection[int],
    form: str | None,
) -> Chosen:
    """`chosen` without the attention and feed-forward parts that `goal` asks for: as named, or the closest."""
    if not goal.sublayers:
        return chosen
    plan, depth = chosen.plan, chosen.plan.depth
    gone = {
        what: set(goal.sublayers[what].layers or ()) if what in goal.sublayers else set[int]()
        for what in _KINDS
    }
    plan.without(*gone.values())  # raises where a sublayer goes twice
    amounts = {what: amount for what, amount in goal.sublayers.items() if amount.layers is None}
    if amounts:
        assert measured is not None
        first = (
            plan.sublayers[0][0] if form != "zeroed" else None
        )  # in the blockwise form its attention stays
        ranked = rank_sublayers(
            measured.halves(metric),
            (i for i, _ in plan.sublayers if i != first and i not in protect),
            (j for _, j in plan.sublayers if j not in protect),
        )
        left = [part for part in ranked if part[1] not in gone[part[0]]]
        distance = plan.distance or 0.0
        for what, amount in amounts.items():
            n = amount.resolve_sublayers(depth, what)
            taken = [part for part in left if what in (part[0], "sublayers")][:n]
            if len(taken) < n:
                raise PlanError(
                    f"--drop-{what} {n}: only {len(taken)} {SUBLAYERS[what]} can go (those of dropped layers are gone, "
                    "and in the blockwise form the first layer keeps its attention); drop fewer"
                )
            for kind, i, d in taken:
                gone[kind].add(i)
                distance += d
            left = [part for part in left if part not in taken]
        others = [part for part in left if part[0] in amounts or "sublayers" in amounts][:RUNNERS_UP]
        runners_up = tuple(RunnerUp(f"{_KINDS[kind]} of layer {i}", d) for kind, i, d in others)
        plan = replace(_because(plan, distance, metric, measured), runners_up=runners_up)
    plan = plan.without(*gone.values()).in_form(form)
    if (reason := why_not(plan)) is not None:
        raise ArchitectureError(reason)
    return replace(chosen, plan=plan)


_KINDS = {"attention": "attention", "ffn": "feed-forward part"}
