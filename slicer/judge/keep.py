"""Runs the bisection for the deepest cut that retains a share of a score, and writes its plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from slicer.errors import ArchitectureError, EvaluationError, PlanError
from slicer.judge import promise
from slicer.judge.grid import UNPRUNED, Cell, Grid, is_random
from slicer.judge.sweep import Sweep, record_cells
from slicer.runtime.files import write_atomically

PROMISE = "promise.json"


def keep(sweep: Sweep, share: float, metric: str, grid: Grid, command: str | None) -> promise.Found:
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

    def measure(n: int) -> promise.Kept:
        cell = cell_of(n)
        cells.append(cell)
        record_cells(sweep.journal, cells, command)
        sweep.run([UNPRUNED, cell])
        cut, whole = sweep.result(cell), sweep.result(UNPRUNED)
        if cut is None or whole is None:
            reason = (sweep.journal.get(cell.name) or {}).get("error")
            return promise.Kept(n, 0.0, -1.0, 0.0, error=str(reason))
        return promise.kept(n, whole, cut, share, metric)

    record_cells(sweep.journal, cells, command)
    sweep.check_text([cell_of(1)])
    sweep.run([UNPRUNED])
    found = promise.bisect([n for n in range(1, sweep.depth) if _expressible(sweep, cell_of(n))], measure)
    if found.tried and all(kept.error for kept in found.tried):
        raise EvaluationError(f"--heal {heal}: no cut could be made: {found.tried[0].error}")
    record = {"share": share, "metric": metric, **asdict(found)}
    write_atomically(sweep.journal.directory / PROMISE, json.dumps(record, indent=1) + "\n")
    if found.best is not None:
        cell = cell_of(found.best.n)
        plan = replace(
            sweep.plan(cell), source=sweep.source, revision=sweep.found.revision, command=command,
            model_type=sweep.checkpoint.config.get("model_type"),
            healing=(sweep.journal.get(cell.name) or {}).get("healing"),
        )  # fmt: skip
        write_atomically(sweep.journal.directory / "plan.json", plan.to_json())
    return found


def _expressible(sweep: Sweep, cell: Cell) -> bool:
    try:
        sweep.plan(cell)
    except (ArchitectureError, PlanError):
        return False
    return True
