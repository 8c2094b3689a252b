"""The deepest cut that keeps a promise such as "98% of MMLU": bisection over n, each answer with its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slicer.errors import EvaluationError, UsageError
from slicer.judge.results import Evaluation
from slicer.judge.tasks import LOSS

_ONE_SIDED = 1.645  # 95%


@dataclass(frozen=True)
class Kept:
    """What a cut of n layers keeps of the unpruned model.

    Attributes:
        share: cut / unpruned, of a score; unpruned / cut, of the loss, or of the nats of a perplexity.
        margin: mean over items of how far it lies above the promise; standard_error: of the margin, paired.
        error: why the cut could not be made or healed, and so keeps nothing.
    """

    n: int
    share: float
    margin: float
    standard_error: float
    error: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the promise is kept, going by the best estimate."""
        return self.error is None and self.margin >= 0

    @property
    def sure(self) -> bool:
        """Whether it is so at 95%, one-sided; otherwise more items are needed to say."""
        return abs(self.margin) >= _ONE_SIDED * self.standard_error


@dataclass(frozen=True)
class Found:
    """`best` is the deepest cut that keeps the promise (None: not even one layer); `tried` is every cut measured."""

    best: Kept | None
    tried: tuple[Kept, ...]


def check(keep: float, metric: str | None, tasks: tuple[str, ...]) -> str:
    """The task of the promise. Raises UsageError or EvaluationError when it cannot be kept or measured."""
    if not 0 < keep <= 1:
        raise UsageError(f"--keep {keep:g}: a share of the unpruned score, above 0 and at most 1, as in 0.98")
    metric = metric or tasks[0]
    if metric not in tasks:
        near = next((task for task in tasks if task.split("@")[0] == metric), None)
        hint = f"write --metric {near}" if near else f"add it to --tasks {','.join(tasks)}"
        raise EvaluationError(f"--metric {metric}: the task is not measured; {hint}")
    return metric


def kept(n: int, whole: Evaluation, cut: Evaluation, keep: float, metric: str) -> Kept:
    """Compare a cut with the unpruned model, item by item."""
    score = whole.primary(metric)
    key = LOSS if metric == LOSS else f"{metric}/{score.metric}" if score else ""
    a, b = whole.items.get(key), cut.items.get(key)
    if not a or not b:
        raise EvaluationError(f"--metric {metric}: it has no value for each item; name another task")
    fewer = metric == LOSS or (score is not None and not score.higher_is_better)
    pairs = [(a[i], b[i]) for i in a if i in b]
    gains = [x / keep - y if fewer else y - keep * x for x, y in pairs]
    mean = math.fsum(gains) / len(gains)
    spread = math.fsum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1)
    total_a, total_b = math.fsum(x for x, _ in pairs), math.fsum(y for _, y in pairs)
    share = (total_a / total_b if total_b else math.inf) if fewer else (total_b / total_a if total_a else 1.0)
    return Kept(n, share, mean, math.sqrt(spread / len(gains)))


def bisect(depths: Sequence[int], measure: Callable[[int], Kept]) -> Found:
    """The deepest n of `depths` (ascending) that keeps the promise, in about log2(len(depths)) measurements.

    Bisection takes the score to fall with n; noise can break that, so two cuts deeper than the answer are looked at
    too, and taken when they keep the promise after all.
    """
    seen: dict[int, Kept] = {}

    def keeps(at: int) -> bool:
        n = depths[at]
        if n not in seen:
            seen[n] = measure(n)
        return seen[n].kept

    low, high = -1, len(depths)  # low keeps the promise, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    while low >= 0 and (
        deeper := next((at for at in (low + 2, low + 1) if at < len(depths) and keeps(at)), None)
    ):
        low = deeper
    return Found(seen[depths[low]] if low >= 0 else None, tuple(seen[n] for n in sorted(seen)))
