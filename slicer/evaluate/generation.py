"""Degeneration metrics of greedy samples: slicing damages generated text before it lowers multiple-choice scores.

All are counts over the sampled text; no second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slicer.evaluate.compare import mean_and_error

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
class GenerationHealth:
    """Metrics of greedy samples; each is (mean over the prompts, standard error).

    Attributes:
        repetition: share of the 4-grams that occurred earlier in the same sample; 0 = none, near 1 = one repeated word.
        distinct_1, distinct_2: number of different words (word pairs) / number of all words (pairs) in a sample.
        length: tokens until the model ended the text, at most `NEW_TOKENS`.
        samples: (prompt, continuation) in the order of the prompts.
    """

    repetition: tuple[float, float]
    distinct_1: tuple[float, float]
    distinct_2: tuple[float, float]
    length: tuple[float, float]
    samples: tuple[tuple[str, str], ...]


def judge(samples: Sequence[tuple[str, str]], lengths: Sequence[int]) -> GenerationHealth:
    """Measure (prompt, continuation) pairs; `lengths`: tokens of each continuation."""
    words = [text.split() for _, text in samples]
    return GenerationHealth(
        repetition=mean_and_error([repetition(w, 4) for w in words]),
        distinct_1=mean_and_error([distinct(w, 1) for w in words]),
        distinct_2=mean_and_error([distinct(w, 2) for w in words]),
        length=mean_and_error(lengths),
        samples=tuple(samples),
    )


def distinct(words: Sequence[str], n: int) -> float:
    """Number of different n-grams / number of n-grams; 1.0 if there are none."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(words: Sequence[str], n: int) -> float:
    """Share of n-grams that occurred earlier; 1.0 for an empty text."""
    return 1.0 - distinct(words, n) if words else 1.0
