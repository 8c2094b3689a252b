"""A promise kept: bisection run on a sweep, and the plan that comes out of it."""

from __future__ import annotations

import math
from dataclasses import replace

from slicer.judge import promise
from slicer.judge.grid import UNPRUNED, Cell, Grid
from slicer.judge.journal import write_atomically
from slicer.judge.sweep import Sweep, record_cells


def keep(sweep: Sweep, share: float, metric: str, grid: Grid, command: str | None) -> promise.Found:
    """The deepest cut by the grid's first strategy and healing that keeps `share` of `metric`.

    Writes its plan to plan.json in the sweep's directory, for `slicer convert --plan`.
    """
    strategy, heal, seed = grid.strategies[0], grid.heals[0], grid.seeds[0]
    cells: list[Cell] = [UNPRUNED]

    def measure(n: int) -> promise.Kept:
        cell = Cell(n, strategy, heal, seed if strategy == "random" else 0)
        cells.append(cell)
        record_cells(sweep.journal, cells, command)
        sweep.run([UNPRUNED, cell])
        cut, whole = sweep.result(cell), sweep.result(UNPRUNED)
        if cut is None or whole is None:  # the architecture cannot express this cut
            return promise.Kept(n, 0.0, -math.inf, 0.0)
        return promise.kept(n, whole, cut, share, metric)

    found = promise.bisect(sweep.depth, measure)
    if found.best is not None:
        plan = sweep.plan(next(cell for cell in cells if cell.n == found.best.n))
        plan = replace(
            plan, source=sweep.source, revision=sweep.found.revision, command=command,
            model_type=sweep.checkpoint.config.get("model_type"),
        )  # fmt: skip
        write_atomically(sweep.journal.directory / "plan.json", plan.to_json())
    return found
