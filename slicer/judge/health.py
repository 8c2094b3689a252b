"""Is what the model writes still text? Multiple choice hides what slicing breaks first.

Greedy continuations of fixed prompts, judged by counts that need no other model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NEW_TOKENS = 48
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils when",
    "The main difference between a lake and a river is",
    "To bake a simple loaf of bread, first",
    "In the year 1815,",
    "She opened the letter and read:",
    "Here are three reasons to learn a second language:",
)


@dataclass(frozen=True)
class Health:
    """What greedy samples look like; each figure is a mean over the prompts with its standard error.

    Attributes:
        repetition: share of the 4-grams that occurred before in the same sample; 0 = never, 1 = one word for ever.
        distinct_1, distinct_2: different words (pairs of words) / all words (pairs) of a sample.
        length: tokens until the model ended the text, at most `NEW_TOKENS`.
        samples: (prompt, continuation) in the order of the prompts.
    """

    repetition: tuple[float, float]
    distinct_1: tuple[float, float]
    distinct_2: tuple[float, float]
    length: tuple[float, float]
    samples: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(samples: Sequence[tuple[str, str]], lengths: Sequence[int]) -> Health:
    """Judge (prompt, continuation) pairs; `lengths` are the tokens of each continuation."""
    words = [text.split() for _, text in samples]
    return Health(
        repetition=_mean([repetition(w, 4) for w in words]),
        distinct_1=_mean([distinct(w, 1) for w in words]),
        distinct_2=_mean([distinct(w, 2) for w in words]),
        length=_mean([float(n) for n in lengths]),
        samples=tuple(samples),
    )


def distinct(words: Sequence[str], n: int) -> float:
    """Different n-grams / all n-grams; 1.0 when there is none to repeat."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(words: Sequence[str], n: int) -> float:
    """Share of the n-grams that occurred before; 1.0 for a text that says nothing at all."""
    return 1.0 - distinct(words, n) if words else 1.0


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean)."""
    n = len(values)
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
    return mean, spread / math.sqrt(n)
