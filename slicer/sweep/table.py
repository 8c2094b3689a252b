"""The finished cells of a sweep as one table, without times, so that equal work gives equal bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError, PlanError
from slicer.evaluate.compare import Difference
from slicer.evaluate.results import Evaluation, differences
from slicer.figures.sweep import Curve
from slicer.plan.records import HealingRecord


@dataclass(frozen=True)
class Row:
    """One cell: the cut, its scores, and their difference from the unpruned model.

    `evaluation` is None if the architecture cannot express the cut; `error` is the reason.
    """

    name: str
    n: int
    fraction: float
    strategy: str
    heal: str
    seed: int
    dropped: tuple[int, ...]
    distance: float | None
    evaluation: Evaluation | None
    against_unpruned: tuple[Difference, ...]
    error: str | None = None
    healing: HealingRecord | None = None

    def change(self, measure: str) -> Difference | None:
        """Difference from the unpruned model in "task/metric", in a task's first metric, or in "c4"."""
        return next(
            (d for d in self.against_unpruned if d.measure == measure or d.measure.split("/")[0] == measure), None
        )


@dataclass(frozen=True)
class Table:
    """All finished cells of a sweep directory, in the order of the grid; `missing`: number of unfinished cells.

    `commands`: commands that requested cells, without repeats; `unfinished`: those with missing cells.
    """

    settings: Mapping[str, Any]
    commands: tuple[str, ...]
    depth: int
    rows: tuple[Row, ...]
    missing: int = 0
    unfinished: tuple[str, ...] = ()

    @property
    def unpruned(self) -> Evaluation | None:
        """The evaluation of the unpruned model."""
        return next((row.evaluation for row in self.rows if row.n == 0), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order scored, without c4."""
        return tuple(dict.fromkeys(s.task for r in self.rows if r.evaluation for s in r.evaluation.scores))


def read_table(directory: Path) -> Table:
    """Read the sweep in `directory`. Raises EvaluationError if there is none, or a file is damaged."""
    try:
        settings = json.loads((directory / "sweep.json").read_text("utf-8"))["settings"]
        grid = json.loads((directory / "grid.json").read_text("utf-8"))
        depth = int(settings["depth"])
        asked = {cell["name"]: cell.get("command") or grid.get("command") for cell in grid["cells"]}
        names = list(asked)
        records = {}
        for name in names:
            file = directory / "cells" / f"{name}.json"
            if file.is_file():
                records[name] = json.loads(file.read_text("utf-8"))
        whole = records.get("unpruned")
        unpruned = Evaluation.from_dict(whole["evaluation"]) if whole else None
        rows = [_row(name, records[name], depth, unpruned) for name in names if name in records]
    except OSError as error:
        raise EvaluationError(f"{directory}: no sweep in it ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError, TypeError, AttributeError, PlanError) as error:
        raise EvaluationError(f"{directory}: the sweep in it is damaged ({error})") from None
    commands = tuple(dict.fromkeys(c for c in (*asked.values(), grid.get("command")) if c))
    left = [name for name in names if name not in records]
    unfinished = tuple(dict.fromkeys(asked[name] for name in left if asked[name]))
    return Table(settings, commands, depth, tuple(rows), len(left), unfinished)


def _row(name: str, record: Mapping[str, Any], depth: int, unpruned: Evaluation | None) -> Row:
    cell = record["cell"]
    evaluation = Evaluation.from_dict(record["evaluation"]) if record["evaluation"] else None
    compared = differences(unpruned, evaluation) if unpruned and evaluation and cell["n"] else []
    return Row(
        name=name,
        n=cell["n"],
        fraction=cell["n"] / depth,
        strategy=cell["strategy"],
        heal=cell["heal"],
        seed=cell["seed"],
        dropped=tuple(record.get("dropped") or ()),
        distance=record.get("distance"),
        evaluation=evaluation,
        against_unpruned=tuple(compared),
        error=record.get("error"),
        healing=HealingRecord.of(record["healing"], name) if record.get("healing") else None,
    )


def to_dict(table: Table) -> dict[str, Any]:
    """For JSON: every cell with its scores and tests, without item values."""
    rows = []
    for row in table.rows:
        record = asdict(row)
        if row.evaluation is not None:
            record["evaluation"] = {k: v for k, v in row.evaluation.to_dict().items() if k not in ("items", "seconds")}
        record["healing"] = row.healing and row.healing.to_dict()
        record["against_unpruned"] = [d.to_dict() for d in row.against_unpruned]
        rows.append(record)
    return {"settings": dict(table.settings), "commands": list(table.commands), "rows": rows, "missing": table.missing}


def to_csv(table: Table) -> str:
    """One line per cell; floats at full precision, so that equal tables give equal bytes."""
    header = ["n", "fraction", "strategy", "heal", "seed", "dropped", "distance"]
    for task in table.tasks:
        header += [task, f"{task} standard error", f"{task} chance", f"{task} p"]
    has_loss = any(row.evaluation and row.evaluation.loss for row in table.rows)
    if has_loss:
        header += ["loss", "loss standard error", "loss / log V", "loss p"]
    header += ["repetition", "distinct-2", "length", "error"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in sorted(table.rows, key=lambda r: (r.strategy != "none", r.strategy, r.heal, r.seed, r.n)):
        writer.writerow(_line(row, table.tasks, has_loss))
    return out.getvalue()


def _line(row: Row, tasks: Sequence[str], has_loss: bool) -> list[Any]:
    found = row.evaluation
    line: list[Any] = [
        row.n, repr(row.fraction), row.strategy, row.heal, row.seed, " ".join(map(str, row.dropped)), row.distance,
    ]  # fmt: skip
    for task in tasks:
        score = found.primary(task) if found else None
        change = row.change(task)
        line += [score and score.value, score and score.standard_error, score and score.chance]
        line.append(change and change.p_value)
    if has_loss:
        loss, change = found.loss if found else None, row.change("c4")
        line += [loss and loss.nats_per_token, loss and loss.standard_error, loss and loss.normalised]
        line.append(change and change.p_value)
    health = found.health if found else None
    line += [health and health.repetition[0], health and health.distinct_2[0], health and health.length[0]]
    return ["" if value is None else value for value in [*line, row.error]]


def value_of(row: Row, measure: str) -> tuple[float, float] | None:
    """(value, standard error) of a task's first metric, or, for "c4", of the loss as a share of log V."""
    if row.evaluation is None:
        return None
    if measure == "c4":
        loss = row.evaluation.loss
        if loss is None:
            return None
        return loss.normalised, loss.standard_error * loss.normalised / loss.nats_per_token
    score = row.evaluation.primary(measure)
    return (score.value, score.standard_error or 0.0) if score else None


def curves_of(table: Table, measure: str) -> tuple[list[Curve], float | None]:
    """The curves of a measure, each starting at the unpruned model, and the value of that model."""
    whole = next((value_of(row, measure) for row in table.rows if row.n == 0), None)
    found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for row in table.rows:
        value = value_of(row, measure)
        if row.n and value is not None:
            found.setdefault((row.strategy, row.heal), {}).setdefault(row.n, []).append(value)
    curves = []
    for (strategy, heal), by_n in sorted(found.items()):
        points = [(0.0, *whole)] if whole else []
        each: list[tuple[float, float]] = []
        for n, values in sorted(by_n.items()):
            k, x = len(values), n / table.depth
            mean = sum(v for v, _ in values) / k
            spread = sum((v - mean) ** 2 for v, _ in values) / (k - 1) if k > 1 else 0.0
            points.append((x, mean, (sum(e * e for _, e in values) / k + spread) ** 0.5))
            each += [(x, v) for v, _ in values] if k > 1 else []
        curves.append(Curve(strategy, heal, tuple(points), tuple(each)))
    return curves, whole and whole[0]
