"""Distances + n -> the block to drop. Pure arithmetic: no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from slicer.errors import PlanError


class BlockDistances(Protocol):
    """What selection needs of an analysis."""

    @property
    def depth(self) -> int:
        """L, the number of layers."""

    def block(self, n: int) -> Sequence[float]:
        """d(l, l+n) for every start l = 0..L-n."""


@dataclass(frozen=True)
class Choice:
    """A block of n layers starting at `start`, and the angular distance across it (units of pi)."""

    start: int
    n: int
    distance: float

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers of the block."""
        return tuple(range(self.start, self.start + self.n))


def rank(distances: BlockDistances, n: int) -> list[Choice]:
    """All blocks of n layers, closest first; of equals the deeper one first.

    The deeper of two equal blocks disturbs fewer of the layers after it (section 3.1 of the paper).
    """
    if not 0 < n < distances.depth:
        raise PlanError(
            f"cannot drop {n} of {distances.depth} layers; drop between 1 and {distances.depth - 1}"
        )
    choices = [Choice(start, n, float(d)) for start, d in enumerate(distances.block(n))]
    return sorted(choices, key=lambda choice: (choice.distance, -choice.start))


def select(distances: BlockDistances, n: int) -> Choice:
    """Equation 6 of "The Unreasonable Ineffectiveness of the Deeper Layers": argmin over l of d(l, l+n)."""
    return rank(distances, n)[0]


def deepest(depth: int, n: int) -> tuple[int, ...]:
    """The paper's heuristic: the n layers before the final one, which stays: L-n-1 to L-2 counted from 0."""
    return tuple(range(depth - 1 - n, depth - 1))


def tail(depth: int, n: int) -> tuple[int, ...]:
    """The last n layers."""
    return tuple(range(depth - n, depth))
