"""Results of an analysis: the tables of all metrics and what they were measured on, plain data with JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicer.errors import PlanError, unreadable
from slicer.measure.metrics import title_of
from slicer.plan.distances import SHARED
from slicer.plan.distances import Distances as Distances
from slicer.plan.plan import METRIC
from slicer.plan.records import TextRecord, plain

FORMAT = 1


def _tables_out(tables: Mapping[str, Distances]) -> dict[str, Any]:
    return {name: {"what": title_of(name), **table.rows} for name, table in tables.items()}


def _tables_in(record: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Distances]:
    return {name: Distances.of({**shared, **table, "metric": name}) for name, table in record.items()}


@dataclass(frozen=True)
class Analysis:
    """All results of `slicer analyze` for a model.

    Attributes:
        depth, samples, seq_len: as in `Distances`.
        metrics: name -> its table.
        greedy: SLEB's removal order with the loss after each step, if measured.
        positions: tokens of each sequence that token averages use.
        points: number of tokens that CKA and the fold residual use, over all sequences.
        sublayers: name -> a table over the model's 2L sublayers: 2i is attention i, 2i + 1 is feed-forward i; a block
            of even size with an odd start is a half-offset cut.
        base_loss: nats per token of the full model on the calibration text, if losses were measured.
        calibration: the text measured on.
        shapley: settings of the Shapley values: "against" (loss, kl or task:NAME), "pairs" of orders, "passes" of the
            full model; for a task also "questions", its "score" with all layers, and the score of "guessing".
    """

    depth: int
    samples: int
    seq_len: int
    metrics: Mapping[str, Distances]
    source: str | None = None
    revision: str | None = None
    model_type: str | None = None
    dtype: str | None = None
    positions: tuple[int, ...] = ()
    points: int = 0
    calibration: TextRecord | None = None
    base_loss: float | None = None
    shapley: Mapping[str, Any] | None = None
    greedy: tuple[Mapping[str, float], ...] = ()
    sublayers: Mapping[str, Distances] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    def distances(self, metric: str = METRIC) -> Distances:
        """One metric's table. Raises PlanError if it is missing."""
        if metric not in self.metrics:
            raise PlanError(f"no {metric} in this analysis; choose from {', '.join(self.metrics)}")
        return self.metrics[metric]

    def halves(self, metric: str = METRIC) -> Distances:
        """One metric's table over sublayers. Raises PlanError if it is missing."""
        if metric not in self.sublayers:
            known = ", ".join(self.sublayers)
            remedy = f"choose from {known}" if known else "run slicer analyze with --sublayers"
            raise PlanError(f"no {metric} of attention and feed-forward sublayers in this analysis; {remedy}")
        return self.sublayers[metric]

    def to_json(self) -> str:
        """As JSON; equal data gives equal bytes."""
        listed = (*_PLAIN, "positions", "greedy")
        record: dict[str, Any] = {"format": FORMAT, **{k: plain(getattr(self, k)) for k in listed}}
        record["metrics"] = _tables_out(self.metrics)
        if self.sublayers:
            record["sublayers"] = _tables_out(self.sublayers)
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "analysis") -> Analysis:
        """Read the output of `to_json`. Raises PlanError, with `where` in the message."""
        try:
            record = json.loads(text)
            if record.get("format") != FORMAT:
                raise ValueError(f"format {record.get('format')!r} is not {FORMAT}")
            shared = {k: record[k] for k in SHARED}
            metrics = _tables_in(record["metrics"], shared)
            sublayers = _tables_in(record.get("sublayers") or {}, {**shared, "depth": 2 * record["depth"]})
            for table in (*metrics.values(), *sublayers.values()):
                if any(len(row) != table.depth - n + 1 for n, row in table.mean.items()):
                    raise ValueError(f"{table.metric} has rows of the wrong length")
            given = {k: record[k] for k in _PLAIN if k in record}
            if given.get("calibration") is not None:
                given["calibration"] = TextRecord.of(given["calibration"], f"{where}: calibration")
            positions, greedy = (tuple(record.get(k) or ()) for k in ("positions", "greedy"))
            return cls(metrics=metrics, sublayers=sublayers, positions=positions, greedy=greedy, **given)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{where}: not an analysis file of slicer ({error}); run slicer analyze again") from None

    @classmethod
    def load(cls, path: Path) -> Analysis:
        """Read analysis.json, or the one in a directory. Raises PlanError."""
        file = path / "analysis.json" if path.is_dir() else path
        try:
            return cls.from_json(file.read_text("utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{file}: cannot read the analysis ({unreadable(error)}); create one with slicer analyze -o {path}"
            ) from None


_PLAIN = (
    "source", "revision", "model_type", "depth", "samples", "seq_len", "dtype", "points", "calibration", "base_loss",
    "shapley", "versions", "command",
)  # fmt: skip
