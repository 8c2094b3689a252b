"""Summarises a sweep table in sentences: the recommended cut, where scores break down, and what healing recovers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicer.evaluate.results import Evaluation
from slicer.plan.amounts import spell_layers
from slicer.sweep.table import Row, Table, curves_of

_LOSS_SHARE = 0.95  # without informative tasks: the loss may grow by 1/19 (about 5%)
_LOSS_CAP = 0.9  # with informative tasks: by 1/9; multiple-choice scores hold long after generated text degrades
_FEWEST = 20  # items that a task needs to be informative


@dataclass(frozen=True)
class Verdict:
    """`row`: the recommended cut, None if every cut is harmful; `sentences`: recommendation, knees and caveats."""

    row: Row | None
    sentences: tuple[str, ...]


def judge(table: Table) -> Verdict:
    """Find the deepest harmless cut, and the knee of each measure.

    A cut is harmless if all scores are within noise of the unpruned model's or better, and the loss is at most 1/9
    higher. Tasks on which the unpruned model is at chance, or with fewer than 20 items, are uninformative; if all are,
    only the loss decides, and may grow by 1/19.
    """
    if table.unpruned is None:
        return Verdict(None, ("The unpruned model is not measured yet, so there is no recommendation.",))
    cuts = [row for row in table.rows if row.n and row.evaluation is not None]
    if not cuts:
        return Verdict(None, ("No cut is measured yet.",))
    informative = tuple(task for task in table.tasks if is_informative(task, table.unpruned))
    if not informative and table.unpruned.loss is None:
        why = "There is no recommendation: on every task the unpruned model is within two standard errors of chance, or"
        return Verdict(None, (f"{why} fewer than {_FEWEST} items were used, and no loss was measured.",))
    harmless = [row for row in cuts if _harmless(row, table.unpruned, informative)]
    best = max(harmless, key=lambda r: (r.n, -_loss(r)), default=None)
    sentences = [_recommend(best, table, informative)]
    if weak := [task for task in table.tasks if task not in informative]:
        sentences.append(
            f"{', '.join(weak)} {'is' if len(weak) == 1 else 'are'} not informative: the unpruned model is not "
            f"significantly above chance, or fewer than {_FEWEST} items were used."
        )
    found = [*(_knee(table, measure) for measure in (*informative, "c4")), _healing(table)]
    sentences += [sentence for sentence in found if sentence]
    if informative and best is not None and (few := min(s.items for s in table.unpruned.scores)) < 1000:
        sentences.append(
            f"With {few} items, differences below about {2 * 0.5 / few**0.5:.0%} cannot be detected: "
            "measure more items before relying on this."
        )
    sentences.append(
        "Multiple-choice scores hold longer than generation and reasoning: read the samples, and measure your own task."
    )
    return Verdict(best, tuple(sentences))


def is_informative(task: str, unpruned: Evaluation) -> bool:
    """Whether the score is informative: enough items, and the unpruned model is significantly above chance."""
    score = unpruned.primary(task)
    if score is None or score.items < _FEWEST or f"{task}/{score.metric}" not in unpruned.items:
        return False
    if not score.higher_is_better:
        return True
    return score.value > (score.chance or 0.0) + 2 * (score.standard_error or 0.0)


def _harmless(row: Row, unpruned: Evaluation, informative: Sequence[str]) -> bool:
    whole, here = unpruned.loss, row.loss
    share = _LOSS_CAP if informative else _LOSS_SHARE
    # Written so that a NaN loss counts as missing.
    if whole is not None and not (here and here.nats_per_token <= whole.nats_per_token / share):
        return False
    return all(_holds(row, task, unpruned) for task in informative)


def _holds(row: Row, task: str, unpruned: Evaluation) -> bool:
    change, score = row.change(task), unpruned.primary(task)
    if change is None or score is None or not math.isfinite(change.delta):
        return False
    return change.within_noise or (change.delta > 0) == score.higher_is_better


def _loss(row: Row) -> float:
    return row.loss.nats_per_token if row.loss else 0.0


def _recommend(best: Row | None, table: Table, informative: Sequence[str]) -> str:
    if best is None:
        least = min(row.n for row in table.rows if row.n and row.evaluation is not None)
        few = "1 layer" if least == 1 else f"{least} layers"
        how = "beyond noise" if informative else "in the loss by more than 5%"
        return f"No cut measured is harmless: dropping {few} already changes the results {how}."
    healed = "" if best.heal == "none" else f", healed ({best.heal})"
    what = "whose loss grows by about 5% at most"
    if informative:
        what = "whose scores are within noise of the unpruned model's"
        if table.unpruned is not None and table.unpruned.loss is not None:
            what += " and whose loss is at most 11% higher"
    return (
        f"Recommended: drop {best.n} of {table.depth} layers ({best.fraction:.0%}), layers "
        f"{spell_layers(best.dropped)} ({best.strategy}{healed}), the deepest cut measured {what}."
    )


def _knee(table: Table, measure: str) -> str | None:
    """The interval in which the best curve of a measure degrades fastest."""
    score = table.unpruned.primary(measure) if table.unpruned else None
    sign = -1 if measure == "c4" or (score is not None and not score.higher_is_better) else 1
    steps = []
    for curve in curves_of(table, measure)[0]:
        points = [(round(x * table.depth), y) for x, y, _ in curve.points]
        worse = [
            (sign * (a - b) / (n - m), m, n, a, b) for (m, a), (n, b) in zip(points, points[1:], strict=False) if n > m
        ]
        if len(worse) > 1:
            reach, last = points[-1]
            steps.append((reach, sign * last, max(worse), curve.label))
    if not steps:
        return None
    # Use the curve that goes deepest and is best there.
    _, _, (pace, m, n, a, b), label = max(steps)
    if pace <= 0:
        return None
    name = "the loss / log V" if measure == "c4" else measure
    return (
        f"Knee of {name} ({label}): it {'falls' if b < a else 'rises'} fastest between {m} and {n} layers dropped, "
        f"from {a:.3f} to {b:.3f}."
    )


def _healing(table: Table) -> str | None:
    """How much of the lost loss healing recovers, at the deepest cut measured with and without it."""
    whole = table.unpruned.loss if table.unpruned else None
    if whole is None:
        return None
    bare = {(r.n, r.dropped): r for r in table.rows if r.n and r.heal == "none" and r.loss}
    pairs = [(r, bare[r.n, r.dropped]) for r in table.rows if r.heal != "none" and (r.n, r.dropped) in bare and r.loss]
    if not pairs:
        return None
    healed, cut = max(pairs, key=lambda p: (p[0].n, -_loss(p[0])))
    lost, left = _loss(cut) - whole.nats_per_token, _loss(healed) - whole.nats_per_token
    change = cut.change("c4")
    if lost <= 0 or change is None or change.within_noise:
        return None
    where = f"the loss caused by dropping {healed.n} layers ({healed.strategy})"
    if left > lost:
        return f"Healing ({healed.heal}) is harmful: it adds {left / lost - 1:.0%} to {where}."
    if left < 0:
        return f"Healing ({healed.heal}) recovers more than {where}: it also adapted to this kind of text."
    return f"Healing ({healed.heal}) recovers {1 - left / lost:.0%} of {where}."
