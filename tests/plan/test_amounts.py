"""The grammar of amounts: what people write, and what no model could satisfy."""

from __future__ import annotations

import pytest

from slicer.errors import PlanError, UsageError
from slicer.plan.amounts import (
    Goal,
    parse_amount,
    parse_counts,
    parse_depths,
    parse_goal,
    parse_protected,
    parse_size,
    runs,
    spell_layers,
)


@pytest.mark.parametrize(
    ("text", "depth", "n"),
    [("0.4", 80, 32), ("0.25", 24, 6), (".5", 12, 6), ("8", 24, 8), ("24-31", 80, 8), ("3,7,9-12", 24, 6)],
)
def test_amount_counts_layers(text: str, depth: int, n: int) -> None:
    assert parse_amount(text).resolve(depth) == n


def test_a_list_names_its_layers() -> None:
    assert parse_amount("3, 7,9-12").layers == (3, 7, 9, 10, 11, 12)


@pytest.mark.parametrize(
    "text", ["1.5", "-1", "0", "0.0", "1.0", "-0.5", "x", "", "5-3", "3,3", "3-5,4", "3,,4", "nan", "1e400"]
)
def test_what_no_model_could_satisfy_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_amount(text)


@pytest.mark.parametrize(
    ("text", "depth"), [("0.01", 12), ("12", 12), ("13", 12), ("0-11", 12), ("10-12", 12), ("0.99", 12)]
)
def test_nothing_everything_and_layers_outside_are_refused(text: str, depth: int) -> None:
    with pytest.raises(PlanError):
        parse_amount(text).resolve(depth)


def test_the_suggested_fraction_drops_a_layer() -> None:
    for depth in (6, 12, 24, 80):
        with pytest.raises(PlanError) as error:
            parse_amount("0.001").resolve(depth)
        assert parse_amount(str(error.value).rsplit(" ", 1)[1]).resolve(depth) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", 5 * 10**9), ("16GB", 16 * 10**9), ("1.5GiB", 3 * 2**29), ("800M", 8 * 10**8), ("123", 123), ("2kb", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-bytes") == size


@pytest.mark.parametrize("text", ["", "GB", "-5B", "0", "5 apples", "1e9"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--max-bytes"):
        parse_size(text, "--max-bytes")


def test_layers_that_stay() -> None:
    assert parse_protected("0,1,-1", 8) == {0, 1, 7}
    assert parse_protected("0-2,-2", 8) == {0, 1, 2, 6}
    for text in ("a", "3-1", "1,,2", "-3-5"):
        with pytest.raises(UsageError, match="--protect"):
            parse_protected(text, 8)
    for text in ("8", "-9"):
        with pytest.raises(PlanError, match="0-7"):
            parse_protected(text, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,2,4", [0, 2, 4]),
        ("0:8:2", [0, 2, 4, 6, 8]),
        ("0:0.5:0.05", [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]),
        ("0.25", [6]),
        ("6,0.25,3", [3, 6]),
    ],
)
def test_depths_of_a_sweep(text: str, expected: list[int]) -> None:
    assert parse_depths(text, 24) == expected


@pytest.mark.parametrize("text", ["", "x", "-2", "1:2", "5:1:1", "0:4:0", "0.5:1.5:0.5", "1.0"])
def test_depths_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--drop"):
        parse_depths(text, 24)


def test_a_sweep_leaves_a_layer() -> None:
    with pytest.raises(PlanError, match="at most 23"):
        parse_depths("24", 24)


def test_counts_keep_their_order() -> None:
    assert parse_counts("8, 2,8,64", "--ranks") == (8, 2, 64)
    assert parse_counts("0", "--seeds", least=0) == (0,)
    for text in ("", "0", "1,,2", "a", "-1", "1.5"):
        with pytest.raises(UsageError, match="--ranks"):
            parse_counts(text, "--ranks")


def test_a_goal_is_one_amount_of_layers_beside_those_of_sublayers() -> None:
    assert parse_goal() is None
    goal = parse_goal(drop="0.25", drop_attention="2")
    assert goal is not None and goal.count(12) == 3 and goal.sublayers["attention"].count == 2
    for wrong in (
        {"drop": "1", "keep": 3},
        {"max_bytes": "1GB", "drop_ffn": "1"},
        {"drop_sublayers": "1-2"},
        {"max_params": "x"},
    ):
        with pytest.raises(UsageError):
            parse_goal(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="--keep-layers 12"):
        Goal(keep=12).count(12)


def test_a_budget_is_met_by_both_its_sizes() -> None:
    goal = Goal(max_params=10)
    assert goal.budget and goal.met(10, 99) and not goal.met(11, 1)
    assert Goal(max_bytes=10).met(99, 10) and not Goal(max_bytes=10).met(1, 11)


def test_what_has_to_be_measured() -> None:
    named, open_ = parse_amount("1-2"), parse_amount("2")
    assert Goal(drop=open_).measured("similarity") and not Goal(drop=open_).measured("tail")
    assert not Goal(drop=named, drop_ffn=named).measured("similarity")
    assert Goal(drop_ffn=open_).measured("deepest")


def test_runs_of_neighbours() -> None:
    assert runs([7, 3, 4, 9, 8]) == [(3, 5), (7, 10)] and runs([]) == []


def test_layers_are_spelled_as_runs() -> None:
    assert spell_layers([9, 3, 10, 11, 7]) == "3, 7, 9-11"
