"""The finished cells of a sweep as one table, without times, so that equal work gives equal bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError, PlanError
from slicer.evaluate.compare import Difference
from slicer.evaluate.generation import GenerationHealth
from slicer.evaluate.loss import TextLoss
from slicer.evaluate.results import Evaluation, Score, differences
from slicer.figures.sweep import Curve
from slicer.plan.records import HealingRecord


@dataclass(frozen=True)
class Row:
    """One cell: the cut, its scores, and their difference from the unpruned model. `evaluation` is None if the
    architecture cannot express the cut; `error` is the reason."""

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

    @property
    def loss(self) -> TextLoss | None:
        """The loss on text, if it is measured."""
        return self.evaluation.loss if self.evaluation else None

    @property
    def health(self) -> GenerationHealth | None:
        """The health of generated text, if it is measured."""
        return self.evaluation.health if self.evaluation else None

    @property
    def label(self) -> str:
        """The strategy, with the seed where it matters."""
        return self.strategy + (f" (seed {self.seed})" if self.strategy == "random" or self.seed else "")

    def score(self, task: str) -> Score | None:
        """The first metric of a task, if it is measured."""
        return self.evaluation.primary(task) if self.evaluation else None

    def change(self, measure: str) -> Difference | None:
        """Difference from the unpruned model in "task/metric", in a task's first metric, or in "c4"."""
        return next(
            (d for d in self.against_unpruned if d.measure == measure or d.measure.split("/")[0] == measure), None
        )

    def printed(self, measure: str) -> str | None:
        """ "value ± standard error" of a task or, for "c4", of the loss in nats per token; a star marks a significant
        difference from the unpruned model. None if it is not measured."""
        loss, score, change = self.loss, self.score(measure), self.change(measure)
        if measure == "c4" and loss is not None:
            text = f"{loss.nats_per_token:.3f} ± {loss.standard_error:.3f}"
        elif score is not None:
            text = f"{score.value:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}")
        else:
            return None
        return text if change is None or change.within_noise else f"{text}*"


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
    def by_depth(self) -> list[Row]:
        """The rows in the order that they are shown in."""
        return sorted(self.rows, key=lambda row: (row.n, row.strategy, row.heal, row.seed))

    @property
    def has_loss(self) -> bool:
        """Whether the loss on text is measured."""
        return any(row.loss for row in self.rows)

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
        files = {name: directory / "cells" / f"{name}.json" for name in asked}
        records = {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.is_file()}
        whole = records.get("unpruned")
        unpruned = Evaluation.from_dict(whole["evaluation"]) if whole else None
        rows = [_row(name, record, depth, unpruned) for name, record in records.items()]
    except OSError as error:
        raise EvaluationError(f"{directory}: no sweep in it ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError, TypeError, AttributeError, PlanError) as error:
        raise EvaluationError(f"{directory}: the sweep in it is damaged ({error})") from None
    commands = tuple(dict.fromkeys(c for c in (*asked.values(), grid.get("command")) if c))
    left = [name for name in asked if name not in records]
    unfinished = tuple(dict.fromkeys(asked[name] for name in left if asked[name]))
    return Table(settings, commands, depth, tuple(rows), len(left), unfinished)


def _row(name: str, record: Mapping[str, Any], depth: int, unpruned: Evaluation | None) -> Row:
    cell = record["cell"]
    evaluation = Evaluation.from_dict(record["evaluation"]) if record["evaluation"] else None
    compared = differences(unpruned, evaluation) if unpruned and evaluation and cell["n"] else []
    return Row(
        name=name,
        **cell,
        fraction=cell["n"] / depth,
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
    rows = sorted(table.rows, key=lambda r: (r.strategy != "none", r.strategy, r.heal, r.seed, r.n))
    lines = [_line(row, table) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _line(row: Row, table: Table) -> dict[str, Any]:
    line = {name: getattr(row, name) for name in ("n", "fraction", "strategy", "heal", "seed")}
    line |= {"dropped": " ".join(map(str, row.dropped)), "distance": row.distance}
    for task in table.tasks:
        score, change = row.score(task), row.change(task)
        line |= {task: score and score.value, f"{task} standard error": score and score.standard_error}
        line |= {f"{task} chance": score and score.chance, f"{task} p": change and change.p_value}
    if table.has_loss:
        loss, change = row.loss, row.change("c4")
        line |= {"loss": loss and loss.nats_per_token, "loss standard error": loss and loss.standard_error}
        line |= {"loss / log V": loss and loss.normalised, "loss p": change and change.p_value}
    for name in ("repetition", "distinct_2", "length"):
        line[name.replace("_", "-")] = row.health and getattr(row.health, name)[0]
    return {**line, "error": row.error}


def value_of(row: Row, measure: str) -> tuple[float, float] | None:
    """(value, standard error) of a task's first metric, or, for "c4", of the loss as a share of log V."""
    loss, score = row.loss, row.score(measure)
    if measure == "c4" and loss is not None:
        return loss.normalised, loss.standard_error * loss.normalised / loss.nats_per_token
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
