"""What an evaluation found: plain data, to JSON and back, and how two of them compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError
from slicer.judge.compare import Difference, paired
from slicer.judge.health import Health
from slicer.judge.loss import Loss

FORMAT = 2  # in 1, the items of a perplexity were log-likelihoods


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: as asked for, `mmlu` or `mmlu@5`; metric: lm-eval's name, with the filter where there is one.
        standard_error: lm-eval's, over items; None where the metric has none.
        chance: expected value of guessing; None where guessing gets nothing.
        items: questions asked; shots: examples before each.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    chance: float | None
    items: int
    shots: int
    higher_is_better: bool = True


@dataclass(frozen=True)
class Evaluation:
    """All figures of a model. `items` holds each item's value by "task/metric" and item id, for paired tests."""

    model: str
    scores: tuple[Score, ...]
    loss: Loss | None
    health: Health | None
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def primary(self, task: str) -> Score | None:
        """The first metric of a task, the one its tables report."""
        return next((score for score in self.scores if score.task == task), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """Read what `to_dict` gave. Raises KeyError or TypeError for anything else."""
        given, items = record["health"], dict(record["items"])
        if record.get("format") == 1:
            for key in items:
                if key.endswith("/perplexity"):
                    items[key] = {name: -value for name, value in items[key].items()}
        return cls(
            model=str(record["model"]),
            scores=tuple(Score(**score) for score in record["scores"]),
            loss=Loss(**record["loss"]) if record["loss"] else None,
            health=Health(
                **{k: tuple(v) for k, v in given.items() if k != "samples"},
                samples=tuple((str(a), str(b)) for a, b in given["samples"]),
            )
            if given
            else None,
            items=items,
            options=record["options"],
            versions=record["versions"],
            seconds=float(record["seconds"]),
        )

    @classmethod
    def load(cls, file: Path) -> Evaluation:
        """Read a result file of `slicer eval`. Raises EvaluationError."""
        try:
            record = json.loads(file.read_text("utf-8"))
            if isinstance(record, dict) and "results" in record:
                if len(record["results"]) != 1:
                    named = ", ".join(str(result["model"]) for result in record["results"])
                    raise EvaluationError(
                        f"{file}: holds the results of {named}; write those of each model with an -o of its own"
                    )
                record = record["results"][0]
            return cls.from_dict(record)
        except OSError as error:
            raise EvaluationError(f"{file}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise EvaluationError(f"{file}: not a result of `slicer eval --json`; run it again") from None


def differences(a: Evaluation, b: Evaluation) -> list[Difference]:
    """B minus A for each task's first metric and for the loss, over the items both were asked.

    Tasks asked with another number of examples are not compared. Losses of different vocabularies are compared in nats
    a byte ("c4/nats_per_byte").
    """
    found = []
    for score in a.scores:
        other = b.primary(score.task)
        if a.primary(score.task) is not score or other is None or other.shots != score.shots:
            continue
        key = f"{score.task}/{score.metric}"
        if key in a.items and key in b.items:
            found.append(paired(key, a.items[key], b.items[key]))
    if a.loss and b.loss and "c4" in a.items and "c4" in b.items:
        one, two = a.items["c4"], b.items["c4"]
        if a.loss.tokens == b.loss.tokens:
            found.append(paired("c4", one, two))
        else:  # other tokens of the same text
            found.append(paired("c4/nats_per_byte", _by_byte(one, a.loss), _by_byte(two, b.loss)))
    return [difference for difference in found if difference is not None]


def _by_byte(items: Mapping[str, float], loss: Loss) -> dict[str, float]:
    scale = loss.nats_per_byte / loss.nats_per_token
    return {key: value * scale for key, value in items.items()}
