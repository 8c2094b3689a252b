"""The arithmetic of the line: no engine, no machine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slicer.benchmarks.lines import fit, roofline, speed_ups, student_t, verdict
from slicer.errors import BenchError


def test_an_exact_line_is_found_exactly() -> None:
    line = fit([24, 20, 16, 12], [5 + 2.5 * n for n in (24, 20, 16, 12)])
    assert line.slope == pytest.approx(2.5) and line.intercept == pytest.approx(5)
    assert line.r2 == 1 and line(10) == pytest.approx(30)
    assert line.slope_interval == pytest.approx((2.5, 2.5))


def test_it_is_the_least_squares_line() -> None:
    generator = np.random.default_rng(0)
    x = np.array([4, 8, 12, 16, 20])
    y = 3 * x + 7 + generator.normal(size=5)
    line = fit(x.tolist(), y.tolist())
    slope, intercept = np.polyfit(x, y, 1)
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    assert line.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_the_interval_covers_the_true_slope_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    x = [8, 12, 16, 20, 24]
    covered = 0
    for _ in range(2000):
        interval = fit(x, [2 * n + 5 + generator.normal() for n in x]).slope_interval
        assert interval is not None
        covered += interval[0] <= 2 <= interval[1]
    assert 0.93 < covered / 2000 < 0.97


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=1e-3)


def test_a_constant_has_no_slope_and_is_a_line() -> None:
    line = fit([1, 2, 3], [7.0, 7.0, 7.0])
    assert line.slope == 0 and line.r2 == 1


def test_two_points_have_a_line_and_no_confidence() -> None:
    line = fit([12, 6], [10.0, 7.0])
    assert line.slope == pytest.approx(0.5) and line.slope_interval is None


@pytest.mark.parametrize(("x", "y"), [([5, 5], [1.0, 2.0]), ([5], [1.0]), ([1, 2], [1.0, math.nan])])
def test_what_gives_no_line_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(BenchError):
        fit(x, y)


def test_the_speed_up_lies_between_what_the_intercept_allows_and_the_ideal() -> None:
    times = {24: 53.0, 12: 29.0}  # 2 a layer, 5 stay
    rows = speed_ups(fit(list(times), list(times.values())), times)
    assert [row.layers for row in rows] == [24, 12]
    assert rows[0].measured == rows[0].allowed_by_intercept == rows[0].ideal == 1
    assert rows[1].measured == pytest.approx(53 / 29) == pytest.approx(rows[1].allowed_by_intercept)
    assert rows[1].ideal == 2


def test_the_verdict_is_plain() -> None:
    times = {24: 61.6, 20: 51.3, 16: 42.4, 12: 33.3}
    said = verdict(fit(list(times), list(times.values())), times)
    assert said.startswith("linear: R2 0.999; each layer costs 2.3")
    assert all(fact in said for fact in ("50% fewer layers", "1.85x", "2.00x"))
    flat = {24: 5.0, 20: 5.2, 16: 4.9, 12: 5.1}
    assert verdict(fit(list(flat), list(flat.values())), flat).startswith("no line")
    pair = {24: 5.0, 12: 3.0}
    assert "measure a third" in verdict(fit(list(pair), list(pair.values())), pair)


def test_the_roofline_is_the_slower_of_two_limits() -> None:
    assert roofline(1e9, 1e9, 1e10, 1e12) == (pytest.approx(100), "memory")
    assert roofline(1e6, 1e12, 1e10, 1e12)[1] == "arithmetic"
