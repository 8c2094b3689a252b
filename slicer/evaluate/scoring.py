"""Scores, standard errors, chance levels and item values from lm-eval's results."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slicer.evaluate.compare import mean_and_error
from slicer.evaluate.results import Score

_LOG_LIKELIHOODS = {"perplexity"}  # metrics whose items are log-likelihoods in lm-eval
_WEIGHTED = {"word_perplexity", "byte_perplexity", "bits_per_byte"}  # items are (log-likelihood, weight)


def scores(
    task: str, label: str, leaves: Sequence[str], tasks: Mapping[str, Any], found: Mapping[str, Any]
) -> list[Score]:
    """The metrics of a task, group or tag; those of its leaves where lm-eval gives no aggregate.

    A leaf keeps the number of examples in `label`: `arc_easy@5` of `ai2_arc@5`.
    """
    table = found["results"]
    added_up = any("," in key for key in table.get(task, ()))  # else the row is missing or has only names
    names = [task] if added_up else list(leaves)
    found_scores = []
    for name in names:
        inside = leaves if name == task else [name]
        docs = sum(table[leaf]["sample_len"] for leaf in inside)
        for key, value in table[name].items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = table[name].get(f"{metric}_stderr,{kind}")
            score = Score(
                task=name + label.removeprefix(task),
                metric=metric if kind == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                chance=_chance(inside, tasks, found["samples"]) if metric.startswith("acc") else None,
                items=docs,
                shots=int(tasks[inside[0]].get_config("num_fewshot") or 0),
                higher_is_better=bool(found["higher_is_better"].get(name, {}).get(metric, True)),
            )
            found_scores.append(score)
    return found_scores


def _chance(leaves: Sequence[str], tasks: Mapping[str, Any], samples: Mapping[str, Any]) -> float | None:
    """The expected accuracy of a random guess: mean over items of 1 / choices; None if not multiple choice."""
    chances = []
    for leaf in leaves:
        task = tasks[leaf]
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        chances += [1.0 / len(task.doc_to_choice(sample["doc"])) for sample in samples[leaf]]
    return sum(chances) / len(chances) if chances else None


def with_error(score: Score, values: Collection[float]) -> Score:
    """`score` with the standard error of the mean of the item `values`, if lm-eval gives none (for a group in which
    some task has only one item)."""
    if (score.standard_error is not None and math.isfinite(score.standard_error)) or len(values) < 2:
        return score
    mean, error = mean_and_error(values)
    is_mean_of_items = abs(mean - score.value) <= 1e-9
    return replace(score, standard_error=error if is_mean_of_items else None)


def items(metric: str, leaves: Sequence[str], samples: Mapping[str, Any]) -> dict[str, float]:
    """The metric of each item by id; empty if items have no value of their own (corpus metrics).

    Items of a perplexity are losses in nats (lower is better). For word and byte perplexity they are weighted by the
    item's number of words or bytes, so that their mean is the overall value.
    """
    name, _, kind = metric.partition(",")
    pairs: dict[str, float] = {}
    weights: list[float] = []
    for leaf in leaves:
        for sample in samples.get(leaf, ()):
            value = sample.get(name)
            if sample["filter"] != (kind or "none"):
                continue
            key = f"{leaf}:{sample['doc_id']}:{sample['doc_hash'][:8]}"
            if name in _WEIGHTED:  # (log-likelihood, words or bytes)
                pairs[key] = -float(value[0])
                weights.append(float(value[1]))
            elif isinstance(value, bool | int | float):
                pairs[key] = -float(value) if name in _LOG_LIKELIHOODS else float(value)
    if weights and sum(weights) > 0:
        mean = sum(weights) / len(weights)
        pairs = {key: value / mean for key, value in pairs.items()}
    return pairs
