"""A sweep in words: how deep one can cut, where it breaks, and what healing gives. From the table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicer.judge.results import Evaluation
from slicer.judge.sweep_plots import curves_of
from slicer.judge.table import Row, Table
from slicer.plan.amounts import spell_layers

_LOSS_SHARE = 0.95  # without tasks that can tell: the loss may grow by a twentieth
_LOSS_CAP = 0.9  # with them: by a ninth; scores of multiple choice stay where the text has long gone
_FEWEST = 20  # items that a task must have asked to tell anything


@dataclass(frozen=True)
class Verdict:
    """`row` is the recommended cut, None where no cut is harmless; `sentences` say it, the knee and their doubts."""

    row: Row | None
    sentences: tuple[str, ...]


def judge(table: Table) -> Verdict:
    """The deepest cut that harms nothing that was measured, and the knee of each measure.

    Its scores are all within noise of the unpruned model's or better, and its loss is at most a ninth higher. A task
    on which the unpruned model itself guesses, or with fewer than 20 items, tells nothing; where none tells, the loss
    alone decides, and may grow by a twentieth.
    """
    if table.unpruned is None:
        return Verdict(None, ("The unpruned model is not measured yet, so nothing can be said.",))
    cuts = [row for row in table.rows if row.n and row.evaluation is not None]
    if not cuts:
        return Verdict(None, ("No cut is measured yet.",))
    telling = tuple(task for task in table.tasks if _tells(task, table.unpruned))
    if not telling and table.unpruned.loss is None:
        return Verdict(
            None,
            (
                "Nothing can be recommended: on every task the unpruned model itself is within two standard errors of "
                f"guessing, or fewer than {_FEWEST} items were asked, and no loss was measured.",
            ),
        )
    harmless = [row for row in cuts if _harmless(row, table.unpruned, telling)]
    best = max(harmless, key=lambda r: (r.n, -_loss(r)), default=None)
    sentences = [_recommend(best, table, telling)]
    if mute := [task for task in table.tasks if task not in telling]:
        sentences.append(
            f"{', '.join(mute)} {'tells' if len(mute) == 1 else 'tell'} nothing here: the unpruned model itself "
            f"cannot be told from guessing, or fewer than {_FEWEST} items were asked."
        )
    sentences += [words for measure in (*telling, "c4") if (words := _knee(table, measure))]
    if words := _healing(table):
        sentences.append(words)
    if telling and best is not None:
        few = min(s.items for s in table.unpruned.scores)
        if few < 1000:
            sentences.append(
                f"With {few} items, differences below about {2 * 0.5 / few**0.5:.0%} cannot be seen: "
                "measure more before relying on it."
            )
    sentences.append(
        "Multiple choice holds longer than writing and reasoning: look at the samples, and measure your own task."
    )
    return Verdict(best, tuple(sentences))


def _tells(task: str, unpruned: Evaluation) -> bool:
    """Whether a cut could be seen to harm this score."""
    score = unpruned.primary(task)
    if score is None or score.items < _FEWEST or f"{task}/{score.metric}" not in unpruned.items:
        return False
    if not score.higher_is_better:
        return True
    return score.value > (score.chance or 0.0) + 2 * (score.standard_error or 0.0)


def _harmless(row: Row, unpruned: Evaluation, telling: Sequence[str]) -> bool:
    whole, here = unpruned.loss, row.evaluation.loss if row.evaluation else None
    share = _LOSS_CAP if telling else _LOSS_SHARE
    # Written so that a loss that is not a number is no better than none.
    if whole is not None and not (here and here.nats_per_token <= whole.nats_per_token / share):
        return False
    return all(_holds(row, task, unpruned) for task in telling)


def _holds(row: Row, task: str, unpruned: Evaluation) -> bool:
    change, score = row.change(task), unpruned.primary(task)
    if change is None or score is None or not math.isfinite(change.delta):
        return False
    return change.within_noise or (change.delta > 0) == score.higher_is_better


def _loss(row: Row) -> float:
    return row.evaluation.loss.nats_per_token if row.evaluation and row.evaluation.loss else 0.0


def _recommend(best: Row | None, table: Table, telling: Sequence[str]) -> str:
    if best is None:
        least = min(row.n for row in table.rows if row.n and row.evaluation is not None)
        few = "1 layer" if least == 1 else f"{least} layers"
        how = "beyond noise" if telling else "in the loss, by more than a twentieth"
        return f"No cut measured is harmless: already {few} gone show {how}."
    healed = "" if best.heal == "none" else f", healed ({best.heal})"
    what = "whose loss grows by less than a twentieth"
    if telling:
        what = "whose scores cannot be told from the unpruned model's"
        if table.unpruned is not None and table.unpruned.loss is not None:
            what += " and whose loss is at most a ninth higher"
    return (
        f"Recommended: drop {best.n} of {table.depth} layers ({best.fraction:.0%}), layers "
        f"{spell_layers(best.dropped)} ({best.strategy}{healed}), the deepest cut measured {what}."
    )


def _knee(table: Table, measure: str) -> str | None:
    """Where the best curve of a measure gets worse fastest."""
    score = table.unpruned.primary(measure) if table.unpruned else None
    sign = -1 if measure == "c4" or (score is not None and not score.higher_is_better) else 1
    steps = []
    for curve in curves_of(table, measure):
        points = [(round(x * table.depth), y) for x, y, _ in curve.points]
        worse = [
            (sign * (a - b) / (n - m), m, n, a, b)
            for (m, a), (n, b) in zip(points, points[1:], strict=False)
            if n > m
        ]
        if len(worse) > 1:
            reach, last = points[-1]
            steps.append((reach, sign * last, max(worse), curve.label))
    if not steps:
        return None
    # The curve that goes deepest, and holds on longest there, speaks for the model.
    _, _, (pace, m, n, a, b), label = max(steps)
    if pace <= 0:
        return None
    name = "the loss / log V" if measure == "c4" else measure
    return (
        f"Knee of {name} ({label}): it {'falls' if b < a else 'rises'} fastest between {m} and {n} layers dropped, "
        f"from {a:.3f} to {b:.3f}."
    )


def _healing(table: Table) -> str | None:
    """How much of the lost loss healing wins back, at the deepest cut measured both ways."""
    whole = table.unpruned.loss if table.unpruned else None
    if whole is None:
        return None
    bare = {(r.n, r.dropped): r for r in table.rows if r.n and r.heal == "none" and r.evaluation}
    pairs = [(r, bare[r.n, r.dropped]) for r in table.rows if r.heal != "none" and (r.n, r.dropped) in bare]
    pairs = [
        (h, b) for h, b in pairs if h.evaluation and h.evaluation.loss and b.evaluation and b.evaluation.loss
    ]
    if not pairs:
        return None
    healed, cut = max(pairs, key=lambda p: (p[0].n, -_loss(p[0])))
    lost, left = _loss(cut) - whole.nats_per_token, _loss(healed) - whole.nats_per_token
    change = cut.change("c4")
    if lost <= 0 or change is None or change.within_noise:
        return None
    where = f"the loss that {healed.n} dropped layers ({healed.strategy}) cost"
    if left > lost:
        return f"Healing ({healed.heal}) harms: it adds {left / lost - 1:.0%} to {where}."
    if left < 0:
        return (
            f"Healing ({healed.heal}) wins back more than {where}: it has learned this kind of text as well."
        )
    return f"Healing ({healed.heal}) wins back {1 - left / lost:.0%} of {where}."
