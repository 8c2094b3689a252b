"""Paired significance tests, item by item, of the difference between two models that answered the same questions."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.05
_SHUFFLES = 10_000


@dataclass(frozen=True)
class Difference:
    """B minus A on one measure.

    Attributes:
        delta: mean of the per-item differences; standard_error: of that mean.
        p_value: two-sided; McNemar's exact test if items are right or wrong, else a sign-flip permutation test.
        items: number of pairs.
    """

    measure: str
    delta: float
    standard_error: float
    p_value: float
    items: int

    @property
    def within_noise(self) -> bool:
        """Whether the difference is not significant (p >= 0.05)."""
        return self.p_value >= LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "within_noise": self.within_noise}


def paired(measure: str, a: Mapping[str, float], b: Mapping[str, float]) -> Difference | None:
    """Compare the items that both models have, by id; None if there are none."""
    shared = [key for key in a if key in b]
    if not shared:
        return None
    gaps = [b[key] - a[key] for key in shared]
    binary = all(value in (0, 1) for key in shared for value in (a[key], b[key]))
    p_value = mcnemar(gaps) if binary else sign_flip(gaps)
    return Difference(measure, *mean_and_error(gaps), p_value, len(gaps))


def mean_and_error(values: Collection[float]) -> tuple[float, float]:
    """(mean, standard error of the mean) of at least one value; the error of a single value is 0."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)


def mcnemar(gaps: Sequence[float]) -> float:
    """McNemar's exact test: under the null, each item that only one model got right is a fair coin toss."""
    won, lost = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
    n, least = won + lost, min(won, lost)
    if n == 0:
        return 1.0
    log_half = n * math.log(0.5)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half) for k in range(least + 1)
    )
    return min(1.0, 2 * tail)


def sign_flip(gaps: Sequence[float], seed: int = 0) -> float:
    """Permutation test for a mean difference of 0: how often random signs give a mean at least as far from 0.

    Enumerates all sign patterns if they are few; otherwise draws 10,000 seeded ones.
    """
    seen = abs(math.fsum(gaps)) * (1 - 1e-12)
    n = len(gaps)
    if n <= 12:
        patterns = range(2**n)
        sums = (math.fsum(g if p >> i & 1 else -g for i, g in enumerate(gaps)) for p in patterns)
        return sum(abs(total) >= seen for total in sums) / float(2**n)
    draw = random.Random(seed)
    hits = 0
    for _ in range(_SHUFFLES):
        bits = draw.getrandbits(n)
        hits += abs(math.fsum(g if bits >> i & 1 else -g for i, g in enumerate(gaps))) >= seen
    return (hits + 1) / (_SHUFFLES + 1)
