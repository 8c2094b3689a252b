"""A saved analysis + amount -> Plan, without the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.errors import OutputError, PlanError, UsageError
from slicer.measure.analysis import METRIC, Analysis
from slicer.plan import Amount, Plan
from slicer.select import Cut, Doubt, best_cuts, doubt

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


def write_plan(plan: Plan, file: Path) -> None:
    """Write `plan`, whole or not at all. Raises OutputError."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(plan.to_json(), "utf-8")
        part.replace(file)
    except OSError as error:
        raise OutputError(
            f"{file}: cannot be written ({error.strerror}); choose another place with -o"
        ) from None


def spell(cut: Cut) -> str:
    """`9-12` or `3, 9-12`."""
    return ", ".join(f"{b.start}-{b.start + b.n - 1}" if b.n > 1 else f"{b.start}" for b in cut.blocks)
