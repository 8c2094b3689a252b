"""lm-eval's results -> scores with their errors and what guessing gets, and each item's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slicer.judge.results import Score


def scores(
    task: str, label: str, leaves: Sequence[str], tasks: Mapping[str, Any], found: Mapping[str, Any]
) -> list[Score]:
    """The metrics of one task, or of a group or tag: a tag's, which lm-eval does not add up, by its leaves."""
    table = found["results"]
    names = [task] if task in table else list(leaves)
    found_scores = []
    for name in names:
        inside = leaves if name == task else [name]
        docs = sum(table[leaf]["sample_len"] for leaf in inside)
        for key, value in table[name].items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = table[name].get(f"{metric}_stderr,{kind}")
            chance = _chance(inside, tasks, found["samples"]) if metric.startswith("acc") else None
            found_scores.append(
                Score(
                    task=label if name == task else name,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    chance=chance,
                    items=docs,
                    shots=int(tasks[inside[0]].get_config("num_fewshot") or 0),
                    higher_is_better=bool(found["higher_is_better"].get(name, {}).get(metric, True)),
                )
            )
    return found_scores


def _chance(leaves: Sequence[str], tasks: Mapping[str, Any], samples: Mapping[str, Any]) -> float | None:
    """The expected accuracy of guessing: the mean over items of 1 / choices."""
    chances = []
    for leaf in leaves:
        task = tasks[leaf]
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        chances += [1.0 / len(task.doc_to_choice(sample["doc"])) for sample in samples[leaf]]
    return sum(chances) / len(chances) if chances else None


def items(metric: str, leaves: Sequence[str], samples: Mapping[str, Any]) -> dict[str, float]:
    """The metric of each item by its id; empty where items have no value of their own (corpus metrics)."""
    name, _, kind = metric.partition(",")
    pairs = {}
    for leaf in leaves:
        for sample in samples.get(leaf, ()):
            value = sample.get(name)
            if sample["filter"] == (kind or "none") and isinstance(value, bool | int | float):
                pairs[f"{leaf}:{sample['doc_id']}:{sample['doc_hash'][:8]}"] = float(value)
    return pairs
