"""Results of an evaluation as plain data, to JSON and back, and the comparison of two results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError, unreadable
from slicer.evaluate.compare import Difference, paired
from slicer.evaluate.generation import GenerationHealth
from slicer.evaluate.loss import TextLoss

FORMAT = 2


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: as given, `mmlu` or `mmlu@5`; metric: lm-eval's name, with the filter if there is one.
        standard_error: lm-eval's, over items; None if the metric has none.
        chance: expected value of a random guess; None if it cannot be computed.
        items: number of questions; shots: examples before each.
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
    """All results of a model. `items`: value of each item by "task/metric" and item id, for paired tests."""

    model: str
    scores: tuple[Score, ...]
    loss: TextLoss | None
    health: GenerationHealth | None
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def primary(self, task: str) -> Score | None:
        """The first metric of a task, used in tables."""
        return next((score for score in self.scores if score.task == task), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """Read the output of `to_dict`. Raises ValueError, KeyError or TypeError for anything else."""
        values = dict(record)
        if values.pop("format") != FORMAT:
            raise ValueError(f"not in format {FORMAT}")
        scores, loss, health = (values.pop(name) for name in ("scores", "loss", "health"))
        if health:
            samples = tuple((prompt, text) for prompt, text in health["samples"])
            health = GenerationHealth(**{name: tuple(pair) for name, pair in health.items()} | {"samples": samples})
        return cls(
            scores=tuple(Score(**score) for score in scores),
            loss=TextLoss(**loss) if loss else None,
            health=health or None,
            **values,
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
                        f"{file}: contains the results of several models ({named}); write one file per model with -o"
                    )
                record = record["results"][0]
            return cls.from_dict(record)
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{file}: cannot be read ({unreadable(error)})") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise EvaluationError(f"{file}: not a result of `slicer eval --json`; run it again") from None


def differences(a: Evaluation, b: Evaluation) -> list[Difference]:
    """B minus A for the first metric of each task and for the loss, over the items that both have.

    Tasks with different numbers of examples are skipped. Losses of different vocabularies are compared in nats per byte
    ("c4/nats_per_byte").
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
        else:  # a different tokenization of the same text
            found.append(paired("c4/nats_per_byte", _by_byte(one, a.loss), _by_byte(two, b.loss)))
    return [difference for difference in found if difference is not None]


def _by_byte(items: Mapping[str, float], loss: TextLoss) -> dict[str, float]:
    scale = loss.nats_per_byte / loss.nats_per_token
    return {key: value * scale for key, value in items.items()}
