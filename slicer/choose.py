"""The goal -> what to drop: named, by a heuristic, or by what the calibration text shows of the model.

First the layers, then, of those that stay, attention and feed-forward parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint import blockwise, sublayers
from slicer.checkpoint.export import DTYPES
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.errors import ArchitectureError, PlanError
from slicer.materials import CalibrationData, Configs, SourceModel
from slicer.options import Goal, Options
from slicer.plan.plan import Amount, Plan
from slicer.progress import Progress
from slicer.select import (
    Choice,
    deepest,
    pick_sublayers,
    rank,
    rank_offset,
    rank_sublayers,
    spell_sublayer,
    tail,
    without_sublayers,
)

if TYPE_CHECKING:
    from slicer.measure.analysis import Distances

RUNNERS_UP = 3


@dataclass(frozen=True)
class Measured:
    """What the calibration text showed: distances between layers and, where the stream was tapped within them,
    between half-layers (a table of depth 2L); what it was."""

    layers: Distances
    halves: Distances | None
    calibration: Mapping[str, Any]


def choose(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    model: SourceModel,
    data: CalibrationData,
    config_of: Configs,
    progress: Progress,
) -> tuple[Plan, Measured | None]:
    """The plan that reaches the goal, and what it was chosen by (similarity only)."""
    measured: Measured | None = None

    def measure() -> Measured:
        nonlocal measured
        if measured is None:
            measured = _measure(checkpoint, goal, options, model, data, progress)
        return measured

    plan = _choose_layers(checkpoint, goal, options, measure, config_of, progress) if goal.layers else None
    if goal.parts:
        plan = _choose_parts(checkpoint, plan, goal.parts, options, measure, config_of)
    assert plan is not None
    return plan, measured


def _choose_layers(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    measure: Callable[[], Measured],
    config_of: Configs,
    progress: Progress,
) -> Plan:
    depth = checkpoint.depth
    if goal.drop is not None and goal.drop.layers is not None:
        if options.offset == "half":
            raise PlanError(
                "--offset half chooses the cut itself: give a fraction or a count of layers to --drop"
            )
        plan = Plan.dropping(depth, goal.drop.layers)
        config_of(plan)
        return plan
    counts = goal.counts(depth)
    cast = DTYPES[options.dtype] if options.dtype else None
    if goal.met(measure_sizes(checkpoint, cast=cast)) and (goal.max_params or goal.max_bytes):
        raise PlanError(f"{goal}: the model already meets it with all {depth} layers; nothing to drop")
    _check_reach(checkpoint, goal, cast)
    best: Callable[[int], Plan]
    if options.strategy == "similarity":
        best = _by_similarity(checkpoint, measure(), options, config_of, progress)
    else:
        dropped = {"deepest": deepest, "tail": tail}[options.strategy]

        def best(n: int) -> Plan:
            plan = Plan.dropping(depth, dropped(depth, n), strategy=options.strategy)
            config_of(plan)
            return plan

    for n in counts:
        plan = best(n)
        if goal.met(measure_sizes(checkpoint, plan.kept, cast)):
            return plan
    raise PlanError(f"{goal}: out of reach of the strategy {options.strategy}; name the layers to drop")


def _check_reach(checkpoint: Checkpoint, goal: Goal, cast: str | None) -> None:
    """Raise PlanError, before anything is measured, when not even a single layer meets the budget."""
    layers = measure_sizes(checkpoint, cast=cast).layer_bytes
    lightest = measure_sizes(checkpoint, (min(range(len(layers)), key=layers.__getitem__),), cast)
    if not goal.met(lightest):
        raise PlanError(
            f"{goal}: out of reach; one layer alone still has {lightest.parameters} parameters "
            f"and {lightest.total_bytes} bytes"
        )


def _by_similarity(
    checkpoint: Checkpoint,
    measured: Measured,
    options: Options,
    config_of: Configs,
    progress: Progress,
) -> Callable[[int], Plan]:
    depth, halves = checkpoint.depth, measured.halves
    if options.offset == "half":
        sublayers.check_joinable(checkpoint)  # raises the reason

    def whole(choice: Choice) -> Plan:
        return Plan.dropping(depth, choice.dropped)

    def half(choice: Choice) -> Plan:
        i, j = choice.start, choice.start + choice.n
        return replace(Plan.dropping(depth, range(i + 1, j + 1)), joined=((i, j),))

    def best(n: int) -> Plan:
        """Equation 6, among the blocks that the architecture's config can express."""
        ranked = [(choice, whole) for choice in rank(measured.layers, n)] if options.offset != "half" else []
        if halves is not None and options.offset != "whole":
            # Of equals the cut of whole layers comes first.
            ranked = sorted(
                ranked + [(choice, half) for choice in rank_offset(halves, n)],
                key=lambda entry: (entry[0].distance, entry[1] is half),
            )
        if not ranked:
            raise PlanError(f"no half-offset cut makes {depth} layers {n} fewer; drop at most {depth - 1}")
        at = next((i for i, (c, make) in enumerate(ranked) if config_of.expresses(make(c))), None)
        if at is None:
            config_of(ranked[0][1](ranked[0][0]))  # raises the reason
            raise AssertionError
        if at:
            progress.note(
                f"layers {_spell(*ranked[0])} lie closest, but this architecture's config "
                "cannot express that cut; the closest block that it can express was taken"
            )
        others = [entry for i, entry in enumerate(ranked) if i != at][:RUNNERS_UP]
        choice, make = ranked[at]
        return replace(
            make(choice),
            strategy="similarity",
            distance=choice.distance,
            runners_up=tuple({"block": _spell(*entry), "distance": entry[0].distance} for entry in others),
            calibration=dict(measured.calibration),
            seed=options.calibration.seed,
        )

    def _spell(choice: Choice, make: Callable[[Choice], Plan]) -> str:
        if make is half:
            return f"half-offset {choice.start}-{choice.start + choice.n}"
        return f"{choice.start}-{choice.start + choice.n - 1}"

    return best


def _choose_parts(
    checkpoint: Checkpoint,
    plan: Plan | None,
    amounts: Mapping[str, Amount],
    options: Options,
    measure: Callable[[], Measured],
    config_of: Configs,
) -> Plan:
    """Attention and feed-forward parts to go too, beside the layers of `plan`: as named, or the closest."""
    depth = checkpoint.depth
    parts = plan.parts if plan is not None else tuple((i, i) for i in range(depth))
    named = {what: amount.layers for what, amount in amounts.items() if amount.layers is not None}
    gone = {"attention": set(named.get("attention", ())), "ffn": set(named.get("ffn", ()))}
    whole = set(plan.dropped) if plan is not None else set()
    if named:
        Plan.cutting(depth, whole, *gone.values())  # raises where a part goes twice
    open_amounts = {what: amount for what, amount in amounts.items() if amount.layers is None}
    chosen: list[tuple[str, int, float]] = []
    left: list[tuple[str, int, float]] = []
    if open_amounts:
        measured = measure()
        assert measured.halves is not None
        first = parts[0][0] if options.format != "zeroed" else None  # in the blockwise form it stays
        ranked = rank_sublayers(measured.halves, (i for i, _ in parts if i != first), (j for _, j in parts))
        ranked = [part for part in ranked if part[1] not in gone[part[0]]]
        chosen, left = pick_sublayers(ranked, open_amounts, depth)
        for what, i, _ in chosen:
            gone[what].add(i)
    provenance: dict[str, Any] = {}
    if chosen:
        assert measured is not None
        distance = sum(part[2] for part in chosen)
        provenance = {
            "strategy": "similarity",
            "distance": distance + (plan.distance or 0.0 if plan is not None else 0.0),
            "runners_up": tuple(
                {"block": spell_sublayer(what, i), "distance": d} for what, i, d in left[:RUNNERS_UP]
            ),
            "calibration": dict(measured.calibration),
            "seed": options.calibration.seed,
        }
    result = without_sublayers(depth, plan, gone["attention"], gone["ffn"])
    result = replace(result, **provenance)
    result = replace(result, form=blockwise.form_for(checkpoint, result, options.format))
    config_of(result)  # raises where it cannot be expressed
    return result


def _measure(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    model: SourceModel,
    data: CalibrationData,
    progress: Progress,
) -> Measured:
    """One pass: within the layers too where that is needed, or may win."""
    needed = bool(goal.parts) or options.offset == "half"
    bare = options.heal == "none" or options.emulate is not None
    as_well = bare or (options.fold == "resolve" and sublayers.adds_directly(checkpoint))
    wanted = needed or (options.offset == "auto" and as_well)  # the closer of the two: docs/guide/convert.md
    if wanted and not needed:
        try:
            sublayers.check_joinable(checkpoint)
        except ArchitectureError:
            wanted = False
    walk, found = model.walk(), data.get()
    if wanted:
        from slicer.measure.halves import measure_halves

        try:
            layers, halves = measure_halves(walk, found.batches, progress=progress)
            return Measured(layers, halves, found.provenance)
        except ArchitectureError:
            if needed:
                raise
    return Measured(_measure_layers(model, data, progress), None, found.provenance)


def _measure_layers(model: SourceModel, data: CalibrationData, progress: Progress) -> Distances:
    from slicer.measure.summary import measure, measure_walk

    walk, found = model.walk(), data.get()
    if walk.streamed:
        with tempfile.TemporaryDirectory(prefix="slicer-") as work:
            return measure_walk(walk, found.batches, Path(work), progress=progress)
    progress.stage("Measuring layers", len(found.batches), "batches")
    done = 0

    def tick(now: int, _total: int) -> None:
        nonlocal done
        progress.advance(now - done)
        done = now

    return measure(walk.model, found.batches, progress=tick)
