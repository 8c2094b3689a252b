"""Paired tests: exact where they can be, and silent about what is not there."""

from __future__ import annotations

import random

import pytest

from slicer.evaluate import scoring
from slicer.evaluate.compare import mcnemar, paired, sign_flip
from slicer.evaluate.loss import TextLoss
from slicer.evaluate.results import Evaluation, Score, differences


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


def test_items_of_a_perplexity_are_nats() -> None:
    """lm-eval gives log-likelihoods, of which more is better, beside a perplexity, of which less is."""

    def sample(at: int, **metrics: object) -> dict[str, object]:
        return {"doc_id": at, "doc_hash": "0123456789", "filter": "none", **metrics}

    single = {"t": [sample(0, perplexity=-2.0), sample(1, perplexity=-4.0)]}
    assert list(scoring.items("perplexity", ["t"], single).values()) == [2.0, 4.0]
    rolling = {"t": [sample(0, word_perplexity=(-20.0, 10)), sample(1, word_perplexity=(-90.0, 30))]}
    values = list(scoring.items("word_perplexity", ["t"], rolling).values())
    assert sum(values) / 2 == pytest.approx(110 / 40)  # nats a word, over all

    # A pair of another metric (here of MCC: gold, predicted) is no value of an item.
    assert scoring.items("mcc", ["t"], {"t": [sample(0, mcc=(1, 0)), sample(1, mcc=(0, 1))]}) == {}


def test_only_what_was_asked_alike_is_compared() -> None:
    def found(shots: int, tokens: int, nats: float) -> Evaluation:
        loss = TextLoss(nats, 0.1, nats / 10, nats * tokens / 1000, 100, tokens, 2, "t", "d")
        items = {"mmlu/acc": {"a": 1.0, "b": 0.0}, "c4": {"d-0": nats, "d-1": nats}}
        return Evaluation("m", (Score("mmlu", "acc", 0.5, 0.1, 0.25, 2, shots),), loss, None, items)

    assert [d.measure for d in differences(found(0, 200, 3.0), found(0, 200, 3.1))] == ["mmlu/acc", "c4"]
    # Half the tokens at twice the nats: the same text is worth the same.
    (only,) = differences(found(5, 200, 3.0), found(0, 100, 6.0))
    assert only.measure == "c4/nats_per_byte" and only.delta == pytest.approx(0)


def test_an_error_that_lm_eval_leaves_out_is_that_of_the_items() -> None:
    score = Score("mmlu", "acc", 0.25, None, 0.25, 8, 0)
    found = scoring.with_error(score, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]).standard_error
    assert found == pytest.approx((0.25 * 0.75 / 7) ** 0.5)
    assert scoring.with_error(score, [1.0, 1.0]).standard_error is None  # the score is not their mean
