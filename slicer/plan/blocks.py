"""Distances -> the blocks of layers, or the sublayers, that can be dropped, closest first. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from slicer.errors import PlanError
from slicer.plan.amounts import spell_layers
from slicer.plan.distances import Distances

SURE = 2.0  # standard errors that a difference must exceed to count


@dataclass(frozen=True)
class Block:
    """A block of n layers starting at `start`, and the angular distance across it (units of pi)."""

    start: int
    n: int
    distance: float

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers of the block."""
        return tuple(range(self.start, self.start + self.n))


@dataclass(frozen=True)
class Cut:
    """One or more blocks, with at least one layer kept between neighbours; `distance` is the sum over the blocks."""

    blocks: tuple[Block, ...]

    @property
    def distance(self) -> float:
        """Sum of the blocks' distances."""
        return math.fsum(block.distance for block in self.blocks)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers of all blocks, ascending."""
        return tuple(i for block in self.blocks for i in block.dropped)

    def __str__(self) -> str:
        return spell_layers(self.dropped)


@dataclass(frozen=True)
class Doubt:
    """The difference between the best choice and the next, its standard error, and the samples that would decide.

    `samples`: sequences that would make the difference as large as `SURE` standard errors; None for no difference.
    """

    difference: float
    error: float
    samples: int | None


def rank(distances: Distances, n: int, protect: Collection[int] = ()) -> list[Block]:
    """All blocks of n layers without a protected one, closest first; of equal blocks the deeper one first.

    The first is equation 6 of "The Unreasonable Ineffectiveness of the Deeper Layers": argmin over l of d(l, l+n). The
    deeper of two equal blocks disturbs fewer of the layers after it (section 3.1 of the paper). Blocks that were not
    measured (NaN) are left out. Raises PlanError when no block is left.
    """
    if not 0 < n < distances.depth:
        raise PlanError(f"cannot drop {n} of {distances.depth} layers; drop between 1 and {distances.depth - 1}")
    found = _closest_first(distances.block(n), n, lambda start: not any(start <= i < start + n for i in protect))
    if not found:
        raise PlanError(f"no block of {n} layers is without a protected one; protect fewer or drop less")
    return found


def _closest_first(row: Sequence[float], n: int, allowed: Callable[[int], bool]) -> list[Block]:
    """The blocks of a row of distances by start, without those not measured; of equal ones the deeper first."""
    found = [Block(start, n, float(d)) for start, d in enumerate(row) if not math.isnan(d) and allowed(start)]
    return sorted(found, key=lambda block: (block.distance, -block.start))


def best_cuts(
    distances: Distances, n: int, blocks: int = 1, protect: Collection[int] = (), count: int = 4
) -> list[Cut]:
    """The `count` best ways to drop n layers in at most `blocks` separate blocks, least sum of distances first.

    Exact, by dynamic programming over (layer, layers left to drop, blocks left to use), each with its `count` best
    continuations. Raises PlanError when there is no way.
    """
    depth = distances.depth
    if blocks == 1:
        return [Cut((block,)) for block in rank(distances, n, protect)[:count]]
    if not 0 < n < depth:
        raise PlanError(f"cannot drop {n} of {depth} layers; drop between 1 and {depth - 1}")
    rows = {size: distances.block(size) for size in distances.sizes if size <= n}
    free = [0] * (depth + 1)  # how many layers from each on are not protected
    # From layer i on: (left to drop, blocks left) -> the best [(sum, the blocks)].
    after: list[dict[tuple[int, int], list[tuple[float, tuple[Block, ...]]]]] = [{} for _ in range(depth + 2)]
    for k in range(blocks + 1):
        after[depth][0, k] = after[depth + 1][0, k] = [(0.0, ())]
    for i in range(depth - 1, -1, -1):
        free[i] = 0 if i in protect else free[i + 1] + 1
        for left in range(n + 1):
            for k in range(blocks + 1):
                # Keeping i comes first, so that of equal sums the deeper blocks win.
                found = list(after[i + 1].get((left, k), ()))
                for size, row in rows.items():
                    if not k or size > left or size > free[i] or math.isnan(row[i]):
                        continue
                    rest = after[i + size + 1].get((left - size, k - 1), ())
                    found += [(row[i] + total, (Block(i, size, float(row[i])), *others)) for total, others in rest]
                if found:
                    found.sort(key=lambda entry: entry[0])
                    after[i][left, k] = found[:count]
    if (n, blocks) not in after[0]:
        first, *_, last = (*distances.sizes, distances.sizes[-1])
        raise PlanError(
            f"no way to drop {n} of {depth} layers in at most {blocks} blocks of "
            f"{first}{f' to {last}' if last != first else ''} layers without the protected ones; "
            "allow more --blocks, protect fewer or drop less"
        )
    return [Cut(cut) for _, cut in after[0][n, blocks]]


def doubt(distances: Distances, best: Cut, other: Cut) -> Doubt | None:
    """The doubt if `best` and `other` differ by less than `SURE` standard errors; None if by more, or for exact values.

    For single blocks of one size the error is that of the paired difference over the same samples; for cuts of several
    blocks, that of the blocks they do not share, taken as independent.
    """
    mine, theirs = ([b for b in a.blocks if b not in c.blocks] for a, c in ((best, other), (other, best)))
    if len(mine) == len(theirs) == 1 and mine[0].n == theirs[0].n and mine[0].n in distances.difference_error:
        row = distances.difference_error[mine[0].n]
        # Relative to the best of this n; if neither is that one (protected layers), the sum is an upper bound.
        error = row[theirs[0].start] + row[mine[0].start]
    else:
        error = math.sqrt(sum(distances.standard_error[b.n][b.start] ** 2 for b in (*mine, *theirs)))
    difference = other.distance - best.distance
    if error == 0 or math.isnan(error) or difference >= SURE * error:
        return None
    needed = math.ceil(distances.samples * (SURE * error / difference) ** 2) if difference > 0 else None
    return Doubt(difference, error, needed)


def rank_sublayers(halves: Distances, attention: Iterable[int], ffn: Iterable[int]) -> list[tuple[str, int, float]]:
    """("attention" or "ffn", layer, distance across it) of these sublayers, closest first; of equals the deeper.

    `halves`: the table over sublayers. Attention i is number 2i, feed-forward i is number 2i + 1.
    """
    row = halves.block(1)
    numbers = [*(2 * i for i in attention), *(2 * i + 1 for i in ffn)]
    found = _closest_first(row, 1, set(numbers).__contains__)
    return [(("attention", "ffn")[part.start % 2], part.start // 2, part.distance) for part in found]


def rank_offset(halves: Distances, n: int, protect: Collection[int] = ()) -> list[Block]:
    """All half-offset cuts that make the model n layers shallower and keep protected layers whole, closest first.

    A block goes from after attention `start` to after attention `start` + n. `halves` as in `rank_sublayers`.
    """
    if 2 * n >= halves.depth:
        return []
    return _closest_first(halves.block(2 * n)[1::2], n, lambda start: not any(start <= i <= start + n for i in protect))


def deepest(depth: int, n: int) -> tuple[int, ...]:
    """The paper's heuristic: the n layers before the final one, which stays: L-n-1 to L-2 counted from 0."""
    return tuple(range(depth - 1 - n, depth - 1))


def tail(depth: int, n: int) -> tuple[int, ...]:
    """The last n layers."""
    return tuple(range(depth - n, depth))
