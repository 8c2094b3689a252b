"""A sweep in words: how deep one can cut, where it breaks, and what healing gives. From the table alone."""

from __future__ import annotations

from dataclasses import dataclass

from slicer.judge.sweep_plots import value_of
from slicer.judge.table import Row, Table
from slicer.plan import spell_layers

_LOSS_SHARE = 0.95  # without tasks: the loss may grow by a twentieth


@dataclass(frozen=True)
class Verdict:
    """`row` is the recommended cut, None where no cut is harmless; `sentences` say it, the knee and their doubts."""

    row: Row | None
    sentences: tuple[str, ...]


def judge(table: Table) -> Verdict:
    """The deepest cut whose scores are all within noise of the unpruned model's, and the knee of each measure."""
    if table.unpruned is None:
        return Verdict(None, ("The unpruned model is not measured yet, so nothing can be said.",))
    cuts = [row for row in table.rows if row.n and row.evaluation is not None]
    if not cuts:
        return Verdict(None, ("No cut is measured yet.",))
    harmless = [row for row in cuts if _harmless(row, table)]
    best = max(harmless, key=lambda r: (r.n, -_loss(r)), default=None)
    sentences = [_recommend(best, table)]
    sentences += [words for measure in (*table.tasks, "c4") if (words := _knee(table, measure))]
    if words := _healing(table):
        sentences.append(words)
    if table.tasks and best is not None:
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


def _harmless(row: Row, table: Table) -> bool:
    if table.tasks:
        changes = [row.change(task) for task in table.tasks]
        return all(c is None or c.within_noise or c.delta > 0 for c in changes)
    whole = table.unpruned.loss if table.unpruned else None
    here = row.evaluation.loss if row.evaluation else None
    return bool(whole and here and here.nats_per_token <= whole.nats_per_token / _LOSS_SHARE)


def _loss(row: Row) -> float:
    return row.evaluation.loss.nats_per_token if row.evaluation and row.evaluation.loss else 0.0


def _recommend(best: Row | None, table: Table) -> str:
    if best is None:
        least = min(row.n for row in table.rows if row.n)
        return f"No cut measured is harmless: already {least} layers gone show beyond noise."
    healed = "" if best.heal == "none" else f", healed ({best.heal})"
    what = (
        "whose scores cannot be told from the unpruned model's"
        if table.tasks
        else "whose loss grows by less than a twentieth"
    )
    return (
        f"Recommended: drop {best.n} of {table.depth} layers ({best.fraction:.0%}), layers "
        f"{spell_layers(best.dropped)} ({best.strategy}{healed}), the deepest cut measured {what}."
    )


def _knee(table: Table, measure: str) -> str | None:
    """Where the best curve of a measure falls fastest."""
    steps = []
    for strategy, heal in sorted({(r.strategy, r.heal) for r in table.rows if r.n}):
        rows = [r for r in table.rows if r.n == 0 or (r.strategy, r.heal) == (strategy, heal)]
        points = sorted((r.n, v[0]) for r in rows if (v := value_of(r, measure)))
        falls = [
            ((b - a if measure == "c4" else a - b) / (n - m), m, n, a, b)
            for (m, a), (n, b) in zip(points, points[1:], strict=False)
            if n > m
        ]
        if len(falls) > 1:
            reach, last = points[-1]
            steps.append((reach, -last if measure == "c4" else last, max(falls), strategy, heal))
    if not steps:
        return None
    # The curve that goes deepest, and holds on longest there, speaks for the model.
    _, _, (_, m, n, a, b), strategy, heal = max(steps)
    name = "the loss / log V" if measure == "c4" else measure
    turn = "rises" if measure == "c4" else "falls"
    healed = "" if heal == "none" else f", {heal}"
    if (b <= a) if measure == "c4" else (b >= a):
        return None
    return (
        f"Knee of {name} ({strategy}{healed}): it {turn} fastest between {m} and {n} layers dropped, "
        f"from {a:.3f} to {b:.3f}."
    )


def _healing(table: Table) -> str | None:
    """How much of the lost loss healing wins back, at the deepest cut measured both ways."""
    whole = table.unpruned.loss if table.unpruned else None
    if whole is None:
        return None
    bare = {(r.n, r.strategy): r for r in table.rows if r.n and r.heal == "none" and r.evaluation}
    pairs = [(r, bare[r.n, r.strategy]) for r in table.rows if r.heal != "none" and (r.n, r.strategy) in bare]
    pairs = [
        (h, b) for h, b in pairs if h.evaluation and h.evaluation.loss and b.evaluation and b.evaluation.loss
    ]
    if not pairs:
        return None
    healed, cut = max(pairs, key=lambda p: p[0].n)
    lost, left = _loss(cut) - whole.nats_per_token, _loss(healed) - whole.nats_per_token
    if lost <= 0:
        return None
    return (
        f"Healing ({healed.heal}) wins back {1 - left / lost:.0%} of the loss that {healed.n} dropped layers "
        f"({healed.strategy}) cost."
    )
