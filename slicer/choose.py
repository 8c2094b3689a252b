"""The goal -> the layers to drop: named, by a heuristic, or by what the calibration text shows of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.export import DTYPES
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.errors import PlanError
from slicer.materials import CalibrationData, Configs, SourceModel
from slicer.options import Goal, Options
from slicer.plan import Plan
from slicer.progress import Progress
from slicer.select import deepest, rank, tail

if TYPE_CHECKING:
    from slicer.measure.analysis import Distances

RUNNERS_UP = 3


def choose(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    model: SourceModel,
    data: CalibrationData,
    config_of: Configs,
    progress: Progress,
) -> tuple[Plan, Distances | None]:
    """The plan that reaches the goal, and the distances it was chosen by (similarity only)."""
    depth = checkpoint.depth
    if goal.drop is not None and goal.drop.layers is not None:
        plan = Plan.dropping(depth, goal.drop.layers)
        config_of(plan.kept)
        return plan, None
    counts = goal.counts(depth)
    cast = DTYPES[options.dtype] if options.dtype else None
    if goal.met(measure_sizes(checkpoint, cast=cast)) and (goal.max_params or goal.max_bytes):
        raise PlanError(f"{goal}: the model already meets it with all {depth} layers; nothing to drop")
    _check_reach(checkpoint, goal, cast)
    best: Callable[[int], Plan]
    distances: Distances | None = None
    if options.strategy == "similarity":
        distances, calibration = _measure(model, data, progress)
        best = _by_similarity(distances, calibration, options, config_of, progress)
    else:
        dropped = {"deepest": deepest, "tail": tail}[options.strategy]

        def best(n: int) -> Plan:
            plan = Plan.dropping(depth, dropped(depth, n), strategy=options.strategy)
            config_of(plan.kept)
            return plan

    for n in counts:
        plan = best(n)
        if goal.met(measure_sizes(checkpoint, plan.kept, cast)):
            return plan, distances
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
    distances: Distances,
    calibration: Mapping[str, Any],
    options: Options,
    config_of: Configs,
    progress: Progress,
) -> Callable[[int], Plan]:
    depth = distances.depth

    def best(n: int) -> Plan:
        """Equation 6, among the blocks that the architecture's config can express."""
        ranked = rank(distances, n)
        cuts = [(c, tuple(i for i in range(depth) if not c.start <= i < c.start + n)) for c in ranked]
        at = next((i for i, (_, kept) in enumerate(cuts) if config_of.expresses(kept)), None)
        if at is None:
            config_of(cuts[0][1])  # raises the reason
            raise AssertionError
        if at:
            first = ranked[0]
            progress.note(
                f"layers {first.start}-{first.start + n - 1} lie closest, but this architecture's config "
                "cannot express that cut; the closest block that it can express was taken"
            )
        others = [c for i, c in enumerate(ranked) if i != at][:RUNNERS_UP]
        return Plan(
            depth,
            cuts[at][1],
            strategy="similarity",
            distance=ranked[at].distance,
            runners_up=tuple(
                {"block": f"{c.start}-{c.start + n - 1}", "distance": c.distance} for c in others
            ),
            calibration=dict(calibration),
            seed=options.calibration.seed,
        )

    return best


def _measure(
    model: SourceModel, data: CalibrationData, progress: Progress
) -> tuple[Distances, dict[str, Any]]:
    from slicer.measure.summary import measure, measure_walk

    walk, found = model.walk(), data.get()
    if walk.streamed:
        with tempfile.TemporaryDirectory(prefix="slicer-") as work:
            return measure_walk(walk, found.batches, Path(work), progress=progress), found.provenance
    progress.stage("Measuring layers", len(found.batches), "batches")
    done = 0

    def tick(now: int, _total: int) -> None:
        nonlocal done
        progress.advance(now - done)
        done = now

    return measure(walk.model, found.batches, progress=tick), found.provenance
