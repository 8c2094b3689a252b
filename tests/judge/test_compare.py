"""Paired tests: exact where they can be, and silent about what is not there."""

from __future__ import annotations

import random

import pytest

from slicer.judge.compare import mcnemar, paired, sign_flip


def test_mcnemar_is_the_binomial_test() -> None:
    """8 won, 2 lost of 10 that differ: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10."""
    assert mcnemar([1.0] * 8 + [-1.0] * 2 + [0.0] * 90) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar([0.0] * 5) == 1.0
    assert mcnemar([1.0] * 2000) < 1e-300 or mcnemar([1.0] * 2000) == 0.0  # no overflow


def test_sign_flip_goes_through_all_patterns_of_few_items() -> None:
    """All ten gaps point one way: only 2 of 1024 sign patterns are as far out."""
    gaps = [0.1 * (i + 1) for i in range(10)]
    assert sign_flip(gaps) == pytest.approx(2 / 1024)
    assert sign_flip([-g for g in gaps]) == pytest.approx(2 / 1024)
    assert sign_flip([0.0] * 30) == 1.0


def test_noise_is_called_noise_and_a_shift_is_not() -> None:
    draw = random.Random(0)
    a = {str(i): draw.gauss(3, 1) for i in range(200)}
    noisy = {k: v + draw.gauss(0, 0.3) for k, v in a.items()}
    worse = {k: v + 0.1 + draw.gauss(0, 0.3) for k, v in a.items()}
    same, shifted = paired("c4", a, noisy), paired("c4", a, worse)
    assert same is not None and same.within_noise
    assert shifted is not None and not shifted.within_noise and shifted.delta == pytest.approx(0.1, abs=0.06)


def test_only_shared_items_are_compared() -> None:
    found = paired("t", {"a": 1.0, "b": 0.0, "c": 1.0}, {"b": 1.0, "c": 1.0, "d": 0.0})
    assert found is not None and found.items == 2 and found.delta == 0.5
    assert paired("t", {"a": 1.0}, {"b": 1.0}) is None
