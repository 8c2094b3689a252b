"""The sequences that take no part in a fit: they choose its strengths and tell what it is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slicer.errors import HealError
from slicer.heal.rows import SINKS
from slicer.measure.states import States
from slicer.measure.stream import Walk

HELD_OUT = 16  # one sequence in so many (at least one)
MIN_SEQUENCES = 4
TOGETHER = 1024  # tokens in a batch, at most: gradients need all that the layers behind the cut compute on it


@dataclass(frozen=True)
class Split:
    """Calibration batches with the sequences held out in batches of their own: `held` are the numbers of those."""

    batches: list[torch.Tensor]
    held: range


def split(batches: Sequence[torch.Tensor]) -> Split:
    """Set one sequence in `HELD_OUT` apart, to choose the strengths and give the figures.

    Raises HealError when there are too few sequences to set any apart.
    """
    held = held_out_sequences(batches)
    size = max(1, min(len(batches[0]), TOGETHER // batches[0].shape[1]))
    sequences = torch.cat(list(batches))
    apart = torch.zeros(len(sequences), dtype=torch.bool)
    apart[sorted(held)] = True
    fitted = list(torch.split(sequences[~apart], size))
    both = fitted + list(torch.split(sequences[apart], size))
    return Split(both, range(len(fitted), len(both)))


def held_out_sequences(batches: Sequence[torch.Tensor]) -> set[int]:
    """Numbers, over all batches, of the sequences held out. Raises HealError when there are too few."""
    count, length = sum(len(batch) for batch in batches), batches[0].shape[1] if batches else 0
    if count < MIN_SEQUENCES or length <= 2 * SINKS:
        raise HealError(
            f"{count} calibration sequences of {length} tokens are too few to heal on; give at least "
            f"{MIN_SEQUENCES} of {2 * SINKS + 1} (--samples, --seq-len)"
        )
    return set(range(HELD_OUT // 2, count, HELD_OUT)) or {count // 2}


def loss(walk: Walk, states: States, batches: Iterable[int]) -> float:
    """Mean next-token cross entropy, nats; one sequence at a time, for the logits are large."""
    sums = [cross_entropy(walk, states.tokens[b], states[b]) for b in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def cross_entropy(walk: Walk, tokens: torch.Tensor, last: torch.Tensor) -> tuple[float, int]:
    total = 0.0
    for row in range(len(tokens)):
        one = tokens[row : row + 1]
        logits = walk.head(one, last[row : row + 1])[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, one[0, 1:].to(logits.device), reduction="sum"))
    return total, len(tokens) * (tokens.shape[1] - 1)
