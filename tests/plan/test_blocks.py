"""Equation 6 and the two strategies that measure nothing."""

from __future__ import annotations

import itertools
import random

import pytest

from slicer.errors import PlanError
from slicer.measure.analysis import Distances
from slicer.plan.blocks import Block, Cut, best_cuts, deepest, doubt, rank, tail


def distances(*rows: list[float]) -> Distances:
    mean = dict(enumerate(rows, 1))
    return Distances(len(rows), 1, 2, mean, mean)


GIVEN = distances([0.4, 0.2, 0.1, 0.3], [0.5, 0.25, 0.25], [0.6, 0.5], [0.9])


def test_the_least_distance_wins_and_of_equals_the_deeper() -> None:
    assert [rank(GIVEN, n)[0].dropped for n in (1, 2, 3)] == [(2,), (2, 3), (1, 2, 3)]


def test_the_rank_holds_every_block_once() -> None:
    assert [block.start for block in rank(GIVEN, 1)] == [2, 1, 3, 0]
    assert [block.distance for block in rank(GIVEN, 2)] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("n", [0, 4, -1])
def test_nothing_and_everything_are_refused(n: int) -> None:
    with pytest.raises(PlanError):
        rank(GIVEN, n)


def test_the_papers_heuristic_keeps_the_final_layer() -> None:
    assert deepest(32, 8) == tuple(range(23, 31))
    assert tail(32, 8) == tuple(range(24, 32))
    assert deepest(4, 3) == (0, 1, 2)


DEPTH = 8


def table(seed: int = 0, depth: int = DEPTH, metric: str = "angular_last_token", error: float = 0.01) -> Distances:
    draw = random.Random(seed)
    mean = {n: [draw.random() * n for _ in range(depth - n + 1)] for n in range(1, depth + 1)}
    errors = {n: [error] * len(row) for n, row in mean.items()}
    return Distances(depth, 16, 64, mean, errors, metric, dict(errors))


def every_cut(distances: Distances, n: int, blocks: int, stay: frozenset[int]) -> dict[frozenset[int], float]:
    """Every set of n layers that falls into at most so many runs, with the sum of its runs' distances."""
    found = {}
    for layers in itertools.combinations(range(distances.depth), n):
        if stay & set(layers):
            continue
        runs = [list(g) for _, g in itertools.groupby(layers, key=lambda i: i - layers.index(i))]
        if len(runs) <= blocks:
            found[frozenset(layers)] = sum(distances.block(len(run))[run[0]] for run in runs)
    return found


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("stay", [frozenset(), frozenset({0, 5, 7})])
def test_no_way_to_cut_is_better(n: int, blocks: int, stay: frozenset[int]) -> None:
    for seed in range(4):
        distances = table(seed)
        expected = sorted(every_cut(distances, n, blocks, stay).items(), key=lambda item: item[1])[:4]
        if not expected:
            with pytest.raises(PlanError):
                best_cuts(distances, n, blocks, stay)
            continue
        found = best_cuts(distances, n, blocks, stay)
        assert [(frozenset(cut.dropped), pytest.approx(cut.distance)) for cut in found] == expected


def test_blocks_side_by_side_are_one_block() -> None:
    """Two neighbours are scored as the block they make, never as a cheaper sum."""
    mean = {1: [0.0] * 4, 2: [1.0] * 3, 3: [1.0] * 2, 4: [1.0]}
    distances = Distances(4, 4, 8, mean, mean)
    best = best_cuts(distances, 2, 2)[0]
    assert best.distance == 0 and best.dropped[1] - best.dropped[0] > 1


def test_of_equals_the_deeper_goes() -> None:
    flat = {n: [0.5] * (7 - n) for n in range(1, 7)}
    assert best_cuts(Distances(6, 4, 8, flat, flat), 2, 1)[0].dropped == (4, 5)
    assert best_cuts(Distances(6, 4, 8, flat, flat), 2, 2)[0].dropped == (4, 5)


def test_what_cannot_be_told_apart_and_how_many_samples_would() -> None:
    distances = Distances(2, 16, 8, {1: [0.30, 0.31]}, {1: [0.02, 0.02]}, difference_error={1: [0.0, 0.01]})
    best, other = (Cut((Block(i, 1, distances.block(1)[i]),)) for i in (0, 1))
    found = doubt(distances, best, other)
    assert found is not None and found.error == 0.01
    # 2 standard errors of 0.01 / sqrt(m / 16) are 0.01 at m = 64
    assert found.samples == pytest.approx(64, abs=1)
    sure = Distances(2, 16, 8, {1: [0.30, 0.33]}, {1: [0.02, 0.02]}, difference_error={1: [0.0, 0.01]})
    best, other = (Cut((Block(i, 1, sure.block(1)[i]),)) for i in (0, 1))
    assert doubt(sure, best, other) is None
