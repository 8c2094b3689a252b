"""Equation 6 and the two strategies that measure nothing."""

from __future__ import annotations

import pytest

from slicer.errors import PlanError
from slicer.measure.analysis import Distances
from slicer.select import deepest, rank, select, tail


def distances(*rows: list[float]) -> Distances:
    mean = dict(enumerate(rows, 1))
    return Distances(len(rows), 1, 2, mean, mean)


GIVEN = distances([0.4, 0.2, 0.1, 0.3], [0.5, 0.25, 0.25], [0.6, 0.5], [0.9])


def test_the_least_distance_wins_and_of_equals_the_deeper() -> None:
    assert (select(GIVEN, 1).dropped, select(GIVEN, 2).dropped, select(GIVEN, 3).dropped) == (
        (2,),
        (2, 3),
        (1, 2, 3),
    )


def test_the_rank_holds_every_block_once() -> None:
    assert [choice.start for choice in rank(GIVEN, 1)] == [2, 1, 3, 0]
    assert [choice.distance for choice in rank(GIVEN, 2)] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("n", [0, 4, -1])
def test_nothing_and_everything_are_refused(n: int) -> None:
    with pytest.raises(PlanError):
        select(GIVEN, n)


def test_the_papers_heuristic_keeps_the_final_layer() -> None:
    assert deepest(32, 8) == tuple(range(23, 31))
    assert tail(32, 8) == tuple(range(24, 32))
    assert deepest(4, 3) == (0, 1, 2)
