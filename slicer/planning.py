"""A saved analysis + amount -> Plan, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slicer.errors import PlanError, UsageError
from slicer.measure.analysis import METRIC, Analysis
from slicer.plan.plan import Amount, Plan
from slicer.select import (
    Cut,
    Doubt,
    best_cuts,
    doubt,
    pick_sublayers,
    rank_sublayers,
    spell_sublayer,
    without_sublayers,
)

RUNNERS_UP = 3


@dataclass(frozen=True)
class Planned:
    """A plan from an analysis: the chosen cut, the next best, and whether the best two can be told apart."""

    plan: Plan
    metric: str
    cuts: tuple[Cut, ...]
    doubt: Doubt | None
    samples: int


def plan(
    analysis: Analysis,
    amount: Amount,
    *,
    metric: str = METRIC,
    blocks: int = 1,
    protect: frozenset[int] = frozenset(),
    command: str | None = None,
) -> Planned:
    """The best cut of `amount` by `metric` in at most `blocks` separate blocks. Pure. Raises PlanError.

    `metric` "greedy" takes the measured order of removal instead.
    """
    if amount.layers is not None:
        raise UsageError(
            "--drop: give a fraction or a count; convert --drop takes named layers without a plan"
        )
    n = amount.resolve(analysis.depth)
    shared: dict[str, Any] = {
        "source": analysis.source,
        "revision": analysis.revision,
        "model_type": analysis.model_type,
        "calibration": analysis.calibration,
        "seed": (analysis.calibration or {}).get("seed"),
        "versions": analysis.versions,
        "command": command,
        "metric": metric,
    }
    if metric == "greedy":
        if len(analysis.greedy) < n:
            raise PlanError(
                f"this analysis has a greedy order of {len(analysis.greedy)} layers, not {n}; "
                f"run slicer analyze with --greedy {n}"
            )
        order = [int(step["layer"]) for step in analysis.greedy[:n]]
        if set(order) & protect:
            taken = min(set(order) & protect)
            raise PlanError(f"the greedy order takes the protected layer {taken}; choose another metric")
        loss = float(analysis.greedy[n - 1]["loss"])
        chosen = Plan.dropping(analysis.depth, order, strategy="similarity", distance=loss, **shared)
        return Planned(chosen, metric, (), None, analysis.samples)
    distances = analysis.distances(metric)
    cuts = best_cuts(distances, n, blocks, protect, RUNNERS_UP + 1)
    best, *others = cuts
    chosen = Plan.dropping(
        analysis.depth,
        best.dropped,
        strategy="similarity",
        distance=best.distance,
        runners_up=tuple({"block": spell(cut), "distance": cut.distance} for cut in others),
        **shared,
    )
    unsure = doubt(distances, best, others[0]) if others else None
    return Planned(chosen, metric, tuple(cuts), unsure, distances.samples)


def plan_parts(
    analysis: Analysis,
    amounts: Mapping[str, Amount],
    *,
    layers: Planned | None = None,
    metric: str = METRIC,
    protect: frozenset[int] = frozenset(),
    command: str | None = None,
) -> Planned:
    """The attention and feed-forward parts to drop by `metric`, beside the layers already planned. Pure.

    `amounts`: "attention", "ffn" or "sublayers" -> how many. Raises PlanError.
    """
    if any(amount.layers is not None for amount in amounts.values()):
        raise UsageError(
            "give a fraction or a count; convert --drop-attention and --drop-ffn take named layers without a plan"
        )
    depth = analysis.depth
    base = layers.plan if layers is not None else None
    parts = base.parts if base is not None else tuple((i, i) for i in range(depth))
    first = parts[0][0]  # in the blockwise form it keeps its attention
    ranked = rank_sublayers(
        analysis.halves(metric),
        (i for i, _ in parts if i != first and i not in protect),
        (j for _, j in parts if j not in protect),
    )
    chosen, left = pick_sublayers(ranked, amounts, depth)
    gone = {what: {i for kind, i, _ in chosen if kind == what} for what in ("attention", "ffn")}
    result = without_sublayers(depth, base, gone["attention"], gone["ffn"])
    result = replace(
        result,
        form="blockwise" if result.no_attention or result.no_ffn else "native",
        strategy="similarity",
        metric=metric,
        distance=sum(d for *_, d in chosen) + (base.distance or 0.0 if base is not None else 0.0),
        runners_up=tuple(
            {"block": spell_sublayer(what, i), "distance": d} for what, i, d in left[:RUNNERS_UP]
        ),
        source=analysis.source,
        revision=analysis.revision,
        model_type=analysis.model_type,
        calibration=analysis.calibration,
        seed=(analysis.calibration or {}).get("seed"),
        versions=analysis.versions,
        command=command,
    )
    return Planned(result, metric, (), None, analysis.samples)


def spell(cut: Cut) -> str:
    """`9-12` or `3, 9-12`."""
    return ", ".join(f"{b.start}-{b.start + b.n - 1}" if b.n > 1 else f"{b.start}" for b in cut.blocks)
