"""Multiple choice as a cost: the share of questions that a model answers wrongly, by the likelihood of each choice.

The model's answer is the choice with the greatest log-likelihood after the question; the first one if several are
equal. `slicer.judge.questions` makes `Questions` from an lm-eval task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """A possible answer: `tokens` follow the last len(tokens) positions of sequence `batch`."""

    batch: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions with their choices, tokenized.

    Attributes:
        name: of the task.
        batches: int64 [1, seq] each: question and choice without the last token; choices that differ only in the last
            token share one.
        choices: by question.
        right: by question, the indices of the correct choices.
    """

    name: str
    batches: Sequence[torch.Tensor]
    choices: Sequence[Sequence[Choice]]
    right: Sequence[frozenset[int]]

    @property
    def guessing(self) -> float:
        """The share of wrong answers of a random guess."""
        chances = [len(right) / len(choices) for right, choices in zip(self.right, self.choices, strict=True)]
        return 1 - sum(chances) / len(chances)

    def errors(self, chances: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """1 for each wrong answer, else 0: [questions], float64.

        `chances(b, n)`: log probabilities [n, vocabulary] of the tokens after the last n positions of sequence b.
        """
        by_batch: dict[int, set[Choice]] = {}
        for choice in (c for choices in self.choices for c in choices):
            by_batch.setdefault(choice.batch, set()).add(choice)
        likelihood: dict[Choice, float] = {}
        for b, mine in by_batch.items():
            found = chances(b, max(len(choice.tokens) for choice in mine)).float()
            for choice in mine:
                tokens = torch.tensor(choice.tokens, device=found.device)
                likelihood[choice] = float(found[-len(tokens) :].gather(1, tokens[:, None]).sum())
        wrong = []
        for choices, right in zip(self.choices, self.right, strict=True):
            row = [likelihood[choice] for choice in choices]
            wrong.append(row.index(max(row)) not in right)
        return torch.tensor(wrong, dtype=torch.float64)
