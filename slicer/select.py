"""Distances + amount -> the layers to drop. Pure arithmetic: no torch, no files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from slicer.errors import PlanError
from slicer.plan.plan import Amount, Plan

SURE = 2.0  # standard errors that a difference must exceed to count


class BlockDistances(Protocol):
    """What selection needs of an analysis."""

    @property
    def depth(self) -> int:
        """L, the number of layers."""

    def block(self, n: int) -> Sequence[float]:
        """d(l, l+n) for every start l = 0..L-n."""


class MeasuredDistances(BlockDistances, Protocol):
    """What is needed to say whether two choices can be told apart."""

    @property
    def samples(self) -> int:
        """Sequences averaged over."""

    @property
    def sizes(self) -> Sequence[int]:
        """The block sizes measured."""

    @property
    def standard_error(self) -> Mapping[int, Sequence[float]]:
        """n -> the standard error of each d(l, l+n)."""

    @property
    def difference_error(self) -> Mapping[int, Sequence[float]]:
        """n -> the standard error of d(l, l+n) minus the least of that n."""


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


@dataclass(frozen=True)
class Cut:
    """One or more blocks, with at least one layer kept between neighbours; `distance` is the sum over the blocks."""

    blocks: tuple[Choice, ...]

    @property
    def distance(self) -> float:
        """Sum of the blocks' distances."""
        return math.fsum(block.distance for block in self.blocks)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers of all blocks, ascending."""
        return tuple(i for block in self.blocks for i in block.dropped)


@dataclass(frozen=True)
class Doubt:
    """How far the best choice is from the next: the difference, its standard error, and what would settle it.

    Attributes:
        samples: sequences that would make the difference as large as `SURE` standard errors; None when there is no
            difference at all.
    """

    difference: float
    error: float
    samples: int | None


def rank(distances: BlockDistances, n: int, protect: Collection[int] = ()) -> list[Choice]:
    """All blocks of n layers without a protected one, closest first; of equals the deeper one first.

    The deeper of two equal blocks disturbs fewer of the layers after it (section 3.1 of the paper). Blocks that were
    not measured (NaN) are left out. Raises PlanError when no block is left.
    """
    if not 0 < n < distances.depth:
        raise PlanError(
            f"cannot drop {n} of {distances.depth} layers; drop between 1 and {distances.depth - 1}"
        )
    choices = [
        Choice(start, n, float(d))
        for start, d in enumerate(distances.block(n))
        if not math.isnan(d) and not any(start <= i < start + n for i in protect)
    ]
    if not choices:
        raise PlanError(f"no block of {n} layers is without a protected one; protect fewer or drop less")
    return sorted(choices, key=lambda choice: (choice.distance, -choice.start))


def select(distances: BlockDistances, n: int) -> Choice:
    """Equation 6 of "The Unreasonable Ineffectiveness of the Deeper Layers": argmin over l of d(l, l+n)."""
    return rank(distances, n)[0]


def best_cuts(
    distances: MeasuredDistances, n: int, blocks: int = 1, protect: Collection[int] = (), count: int = 4
) -> list[Cut]:
    """The `count` best ways to drop n layers in at most `blocks` separate blocks, least sum of distances first.

    Exact, by dynamic programming over (layer, layers left to drop, blocks left to use), each with its `count` best
    continuations. Raises PlanError when there is no way.
    """
    depth = distances.depth
    if blocks == 1:
        return [Cut((choice,)) for choice in rank(distances, n, protect)[:count]]
    if not 0 < n < depth:
        raise PlanError(f"cannot drop {n} of {depth} layers; drop between 1 and {depth - 1}")
    rows = {size: distances.block(size) for size in distances.sizes if size <= n}
    free = _free_runs(depth, protect)
    # Of layer i on: (left to drop, blocks left) -> the best [(sum, (first block, continuation) or None)].
    after: list[dict[tuple[int, int], list[tuple[float, Any]]]] = [{} for _ in range(depth + 2)]
    for k in range(blocks + 1):
        after[depth][0, k] = after[depth + 1][0, k] = [(0.0, None)]
    for i in range(depth - 1, -1, -1):
        for left in range(n + 1):
            for k in range(blocks + 1):
                # Keeping i comes first, so that of equals the deeper blocks win.
                found = list(after[i + 1].get((left, k), ()))
                for size, row in rows.items():
                    if not k or size > left or size > free[i] or math.isnan(row[i]):
                        continue
                    rest = after[i + size + 1].get((left - size, k - 1), ())
                    found += [
                        (row[i] + total, (Choice(i, size, float(row[i])), chain)) for total, chain in rest
                    ]
                if found:
                    found.sort(key=lambda entry: entry[0])
                    after[i][left, k] = found[:count]
    ends = after[0].get((n, blocks))
    if not ends:
        raise PlanError(
            f"no way to drop {n} of {depth} layers in at most {blocks} blocks of {_sizes(distances)} layers "
            f"without the protected ones; allow more --blocks, protect fewer or drop less"
        )
    return [Cut(_unchain(chain)) for _, chain in ends]


def _unchain(chain: Any) -> tuple[Choice, ...]:
    blocks: list[Choice] = []
    while chain is not None:
        blocks.append(chain[0])
        chain = chain[1]
    return tuple(blocks)


def _free_runs(depth: int, protect: Collection[int]) -> list[int]:
    """How many layers from each on are not protected."""
    runs = [0] * (depth + 1)
    for i in range(depth - 1, -1, -1):
        runs[i] = 0 if i in protect else runs[i + 1] + 1
    return runs


def _sizes(distances: MeasuredDistances) -> str:
    sizes = list(distances.sizes)
    return f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"


def doubt(distances: MeasuredDistances, best: Cut, other: Cut) -> Doubt | None:
    """Whether `best` and `other` cannot be told apart by `SURE` standard errors; None when they can, or are certain.

    For single blocks of one size the error is that of the paired difference over the same samples; for cuts of several
    blocks, that of the blocks they do not share, taken as independent.
    """
    mine, theirs = ([b for b in a.blocks if b not in c.blocks] for a, c in ((best, other), (other, best)))
    if len(mine) == len(theirs) == 1 and mine[0].n == theirs[0].n and mine[0].n in distances.difference_error:
        row = distances.difference_error[mine[0].n]
        # Against the least of this n; where neither is it (protected layers), the errors add up at worst.
        error = row[theirs[0].start] + row[mine[0].start]
    else:
        error = math.sqrt(sum(distances.standard_error[b.n][b.start] ** 2 for b in (*mine, *theirs)))
    difference = other.distance - best.distance
    if error == 0 or math.isnan(error) or difference >= SURE * error:
        return None
    needed = math.ceil(distances.samples * (SURE * error / difference) ** 2) if difference > 0 else None
    return Doubt(difference, error, needed)


def rank_sublayers(
    halves: BlockDistances, attention: Iterable[int], ffn: Iterable[int]
) -> list[tuple[str, int, float]]:
    """("attention" or "ffn", layer, distance across it) of these parts, closest first; of equals the deeper one first.

    `halves` has the half-layers of the model as its layers: attention i is number 2i, feed-forward part i number 2i+1.
    """
    row = halves.block(1)
    found = [("attention", i, float(row[2 * i])) for i in attention]
    found += [("ffn", i, float(row[2 * i + 1])) for i in ffn]
    return sorted(
        (part for part in found if not math.isnan(part[2])),
        key=lambda part: (part[2], -2 * part[1] - (part[0] == "ffn")),
    )


def pick_sublayers(
    ranked: Sequence[tuple[str, int, float]], amounts: Mapping[str, Amount], depth: int
) -> tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]:
    """(chosen, runners-up) of the parts `ranked`, closest first: so many of "attention", of "ffn", then of either
    ("sublayers"). Raises PlanError where there are not so many."""
    chosen: list[tuple[str, int, float]] = []
    left = list(ranked)
    for what, amount in amounts.items():
        n = amount.resolve_parts(2 * depth if what == "sublayers" else depth, _PARTS[what])
        taken = [part for part in left if what in (part[0], "sublayers")][:n]
        if len(taken) < n:
            raise PlanError(
                f"--drop-{what} {n}: only {len(taken)} {_PARTS[what]} can go (those of dropped layers are gone, and in "
                "the blockwise form the first layer keeps its attention); drop fewer"
            )
        chosen += taken
        left = [part for part in left if part not in taken]
    return chosen, [part for part in left if part[0] in amounts or "sublayers" in amounts]


_PARTS = {"attention": "attention sublayers", "ffn": "feed-forward sublayers", "sublayers": "sublayers"}


def spell_sublayer(what: str, layer: int) -> str:
    """`attention of layer 3`."""
    return f"{'attention' if what == 'attention' else 'feed-forward part'} of layer {layer}"


def without_sublayers(
    depth: int, plan: Plan | None, attention: Collection[int], ffn: Collection[int]
) -> Plan:
    """`plan` (None: nothing dropped yet) without these parts too; a layer that would lose both goes."""
    if plan is None:
        return Plan.cutting(depth, (), attention, ffn)
    empty = [(i, j) for i, j in plan.parts if i in attention and j in ffn]
    gone = {i for i, _ in empty}
    return replace(
        plan,
        kept=tuple(i for i in plan.kept if i not in gone),
        joined=tuple(pair for pair in plan.joined if pair not in empty),
        no_attention=tuple(sorted(set(attention) - gone)),
        no_ffn=tuple(sorted(set(ffn) - {j for _, j in empty})),
    )


def rank_offset(halves: BlockDistances, n: int) -> list[Choice]:
    """All half-offset cuts that make the model n layers shallower, closest first: from after attention `start` to after
    attention `start` + n. `halves` as in `rank_sublayers`."""
    if 2 * n >= halves.depth:
        return []
    row = halves.block(2 * n)[1::2]
    choices = [Choice(i, n, float(d)) for i, d in enumerate(row) if not math.isnan(d)]
    return sorted(choices, key=lambda choice: (choice.distance, -choice.start))


def deepest(depth: int, n: int) -> tuple[int, ...]:
    """The paper's heuristic: the n layers before the final one, which stays: L-n-1 to L-2 counted from 0."""
    return tuple(range(depth - 1 - n, depth - 1))


def tail(depth: int, n: int) -> tuple[int, ...]:
    """The last n layers."""
    return tuple(range(depth - n, depth))


def protected(text: str, depth: int) -> frozenset[int]:
    """Read `0,1,-1` or `0-3,-2`: layers that must stay, negative ones counted from the end. Raises PlanError."""
    import re

    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and match[1].startswith("-")):
            raise PlanError(
                f"--protect {text}: {part.strip()!r} is not understood; write for example 0,1,-1 or 0-3"
            )
        first = int(match[1])
        first += depth if first < 0 else 0
        last = int(match[2]) if match[2] is not None else first
        if not 0 <= first <= last < depth:
            raise PlanError(
                f"--protect {text}: layer {part.strip()} is not in the model, whose layers are 0-{depth - 1}"
            )
        layers.update(range(first, last + 1))
    return frozenset(layers)
