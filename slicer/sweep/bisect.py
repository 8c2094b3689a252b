"""Runs the bisection for the deepest cut that retains a share of a score, and writes its plan."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from slicer.errors import ArchitectureError, EvaluationError, PlanError, UsageError
from slicer.evaluate.compare import mean_and_error
from slicer.evaluate.lm_tasks import LOSS
from slicer.evaluate.results import Evaluation
from slicer.plan.records import HealingRecord
from slicer.runtime.files import write_atomically
from slicer.sweep.grid import UNPRUNED, Cell, Grid, is_random
from slicer.sweep.run import OpenSweep, check_text, plan_of, record_cells, run_cells
from slicer.sweep.verdict import is_informative

PROMISE = "promise.json"


def deepest_cut(sweep: OpenSweep, share: float, metric: str, grid: Grid, command: str | None) -> Deepest:
    """Find the deepest cut, with the grid's first strategy and healing, that retains `share` of `metric`.

    Writes its plan (with the healing of the cell) to plan.json in the sweep's directory, for `slicer convert --plan`,
    and the target and all cuts tried to promise.json, for the report. Skips cuts that the architecture cannot express.
    Raises EvaluationError, before any measurement, if `metric` has no score of its own.
    """
    strategy, heal, seed = grid.strategies[0], grid.heals[0], grid.seeds[0]
    if metric not in sweep.suite.scored:
        raise EvaluationError(
            f"--metric {metric}: lm-eval reports no score for it; choose from {', '.join(sweep.suite.scored)}"
        )
    cells: list[Cell] = [UNPRUNED]

    def cell_of(n: int) -> Cell:
        return Cell(n, strategy, heal, seed if is_random(strategy, heal) else 0)

    def expressible(n: int) -> bool:
        with contextlib.suppress(ArchitectureError, PlanError):
            plan_of(sweep, cell_of(n))
            return True
        return False

    def measure(n: int) -> Retained:
        cell = cell_of(n)
        cells.append(cell)
        record_cells(sweep.store, cells, command)
        run_cells(sweep, [UNPRUNED, cell])
        whole, cut = sweep.record(UNPRUNED)["evaluation"], sweep.record(cell)
        if not whole or not cut["evaluation"]:
            return Retained(n, 0.0, -1.0, 0.0, error=str(cut["error"]))
        return retained(n, Evaluation.from_dict(whole), Evaluation.from_dict(cut["evaluation"]), share, metric)

    record_cells(sweep.store, cells, command)
    check_text(sweep, [cell_of(1)])
    run_cells(sweep, [UNPRUNED])
    whole = sweep.record(UNPRUNED)["evaluation"]
    if metric != LOSS and not is_informative(metric, Evaluation.from_dict(whole)):
        sweep.progress.note(
            f"{metric}: the whole model is at chance, or there are too few items; every cut may retain that"
        )
    found = bisect([n for n in range(1, sweep.depth) if expressible(n)], measure)
    if found.tried and all(cut.error for cut in found.tried):
        raise EvaluationError(f"--heal {heal}: no cut could be made: {found.tried[0].error}")
    record = {"share": share, "metric": metric, **asdict(found)}
    write_atomically(sweep.store.directory / PROMISE, json.dumps(record, indent=1) + "\n")
    if found.best is not None:
        cell = cell_of(found.best.n)
        healing = sweep.record(cell).get("healing")
        plan = replace(
            plan_of(sweep, cell), source=sweep.source.name, revision=sweep.source.revision, command=command,
            model_type=sweep.source.checkpoint.config.get("model_type"),
            healing=healing and HealingRecord.of(healing, cell.name),
        )  # fmt: skip
        write_atomically(sweep.store.directory / "plan.json", plan.to_json())
    return found


_ONE_SIDED = 1.645  # 95%


@dataclass(frozen=True)
class Retained:
    """The share of the unpruned model's score that a cut of n layers retains.

    Attributes:
        share: cut / unpruned for a score; unpruned / cut for the loss, or for the nats of a perplexity.
        margin: mean over items of the distance above the target; standard_error: of the margin, paired.
        error: why the cut could not be made or healed.
    """

    n: int
    share: float
    margin: float
    standard_error: float
    error: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the point estimate reaches the target."""
        return self.error is None and self.margin >= 0

    @property
    def sure(self) -> bool:
        """Whether `kept` is significant at 95%, one-sided; if not, more items are needed."""
        return abs(self.margin) >= _ONE_SIDED * self.standard_error


@dataclass(frozen=True)
class Deepest:
    """`best`: the deepest cut that reaches the target (None: not even one layer can go); `tried`: all cuts measured."""

    best: Retained | None
    tried: tuple[Retained, ...]


def check(keep: float, metric: str | None, tasks: tuple[str, ...]) -> str:
    """The task to measure. Raises UsageError for an invalid share, EvaluationError if the task is not measured."""
    if not 0 < keep <= 1:
        raise UsageError(f"--retain {keep:g}: pass a share of the unpruned score, 0 to 1, as in 0.98")
    metric = metric or tasks[0]
    if metric not in tasks:
        near = next((task for task in tasks if task.split("@")[0] == metric), None)
        hint = f"use --metric {near}" if near else f"add it to --tasks {','.join(tasks)}"
        raise EvaluationError(f"--metric {metric}: the task is not measured; {hint}")
    return metric


def retained(n: int, whole: Evaluation, cut: Evaluation, keep: float, metric: str) -> Retained:
    """Compare a cut of n layers with the unpruned model, item by item; `keep`: the target. Raises EvaluationError."""
    score = whole.primary(metric)
    key = LOSS if metric == LOSS else f"{metric}/{score.metric}" if score else ""
    a, b = whole.items.get(key), cut.items.get(key)
    if not a or not b:
        raise EvaluationError(f"--metric {metric}: it has no value per item; choose another task")
    fewer = metric == LOSS or (score is not None and not score.higher_is_better)
    pairs = [(a[i], b[i]) for i in a if i in b]
    margin, error = mean_and_error([x / keep - y if fewer else y - keep * x for x, y in pairs])
    total_a, total_b = math.fsum(x for x, _ in pairs), math.fsum(y for _, y in pairs)
    share = (total_a / total_b if total_b else math.inf) if fewer else (total_b / total_a if total_a else 1.0)
    return Retained(n, share, margin, error)


def bisect(depths: Sequence[int], measure: Callable[[int], Retained]) -> Deepest:
    """The deepest n of `depths` (ascending) that reaches the target, in about log2(len(depths)) measurements.

    Bisection assumes that the score falls with n. Noise can break this, so two cuts deeper than the answer are measured
    as well, and used if they reach the target.
    """
    seen: dict[int, Retained] = {}

    def keeps(at: int) -> bool:
        n = depths[at]
        if n not in seen:
            seen[n] = measure(n)
        return seen[n].kept

    low, high = -1, len(depths)  # low reaches the target, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    while low >= 0 and (deeper := next((at for at in (low + 2, low + 1) if at < len(depths) and keeps(at)), None)):
        low = deeper
    return Deepest(seen[depths[low]] if low >= 0 else None, tuple(seen[n] for n in sorted(seen)))
