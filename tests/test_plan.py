"""The grammar of amounts, and plans in and out of JSON."""

from __future__ import annotations

import json

import pytest

from slicer.errors import PlanError, UsageError
from slicer.plan.plan import Plan, parse_amount, parse_size, spell_layers


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
    [
        ("5B", 5 * 10**9),
        ("16GB", 16 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800M", 8 * 10**8),
        ("123", 123),
        ("2kb", 2000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-bytes") == size


@pytest.mark.parametrize("text", ["", "GB", "-5B", "0", "5 apples", "1e9"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--max-bytes"):
        parse_size(text, "--max-bytes")


def test_plan_survives_json() -> None:
    plan = Plan.dropping(
        8, [2, 3, 5], strategy="similarity", distance=0.25, runners_up=({"block": "3-4", "distance": 0.3},),
        calibration={"source": "x"}, seed=3, versions={"torch": "1"}, parent={"depth": 9},
    )  # fmt: skip
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["dropped"] == [2, 3, 5]
    assert plan.kept == (0, 1, 4, 6, 7)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"depth": 4}', '{"depth": 4, "kept": [9]}', '{"depth": 4, "kept": [1, 1]}',
     '{"depth": "4", "kept": [1]}',
     '{"depth": 4, "kept": []}', '{"depth": 4, "kept": [0,1,2,3]}', '{"format": 99, "depth": 4, "kept": [1]}'],
)  # fmt: skip
def test_bad_plans_are_refused_by_name(text: str) -> None:
    with pytest.raises(PlanError, match="here.json"):
        Plan.from_json(text, "here.json")


def test_layers_are_spelled_as_runs() -> None:
    assert spell_layers([9, 3, 10, 11, 7]) == "3, 7, 9-11"
