"""How much every block of layers changes the residual stream, by one metric: plain data, with JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slicer.errors import PlanError
from slicer.plan.plan import METRIC

SHARED = ("depth", "samples", "seq_len")  # fields that all tables of an analysis have in common
_ROWS = ("distances", "standard_error", "difference_error")  # names in JSON


@dataclass(frozen=True)
class Distances:
    """One metric of every block measured; smaller means less change.

    Attributes:
        depth: L, the number of layers; samples: sequences averaged over; seq_len: tokens of each.
        mean: n -> [d(0, n), d(1, 1+n), ..., d(L-n, L)]; angular distances in units of pi. NaN if not measured.
        standard_error: of `mean` over samples, in the same form.
        metric: its name in `slicer.measure.metrics.METRICS`.
        difference_error: n -> standard errors of d(l, l+n) minus the smallest d of that n, paired by sample.
    """

    depth: int
    samples: int
    seq_len: int
    mean: Mapping[int, Sequence[float]]
    standard_error: Mapping[int, Sequence[float]]
    metric: str = METRIC
    difference_error: Mapping[int, Sequence[float]] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The measured block sizes n, ascending."""
        return tuple(sorted(self.mean))

    def block(self, n: int) -> Sequence[float]:
        """d(l, l+n) for l = 0..L-n. Raises PlanError if blocks of n were not measured."""
        if n not in self.mean:
            known = ", ".join(map(str, self.sizes))
            raise PlanError(
                f"{self.metric} was measured for blocks of {known} layers, not {n}; choose another metric, "
                "or combine smaller blocks with --blocks"
            )
        return self.mean[n]

    @property
    def rows(self) -> dict[str, Any]:
        """The three tables as JSON values."""
        tables = zip(_ROWS, (self.mean, self.standard_error, self.difference_error), strict=True)
        return {
            name: {str(n): [None if math.isnan(v) else v for v in row] for n, row in rows.items()}
            for name, rows in tables
        }

    def to_json(self) -> str:
        """As JSON; equal data gives equal bytes."""
        about = {"metric": self.metric, "unit": "pi radians" if self.metric.startswith("angular") else "1"}
        record = {**about, **{name: getattr(self, name) for name in SHARED}, **self.rows}
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Distances:
        """Read the output of `to_json`. Raises PlanError."""
        try:
            return cls.of(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a distances file of slicer ({error}); measure again") from None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Distances:
        """The table of JSON values: `rows`, and the fields of `SHARED`. Raises KeyError, TypeError, ValueError."""
        mean, error, difference = (
            {int(n): [math.nan if v is None else float(v) for v in row] for n, row in rows.items()}
            for rows in (record["distances"], record["standard_error"], record.get("difference_error", {}))
        )
        shared = {name: record[name] for name in SHARED}
        metric = record.get("metric", METRIC)
        return cls(mean=mean, standard_error=error, metric=metric, difference_error=difference, **shared)
