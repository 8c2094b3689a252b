"""Shapley values: what theory says of them, on models small enough to enumerate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import tiny
import torch

from slicer.errors import UsageError
from slicer.measure.losses import Choice, Questions, leave_out
from slicer.measure.shapley import Coalitions, leave_one_out, shapley
from slicer.model.sublayers import bypass_sublayers
from slicer.model.walk import Walk


@pytest.fixture(scope="module")
def model() -> object:
    return tiny.tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def batches(model: Any) -> list[torch.Tensor]:
    """What the model itself would write, and so predicts better than by guessing."""
    start = torch.randint(tiny.VOCAB, (3, 2), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    return [model.generate(start, attention_mask=torch.ones_like(start), **arguments)]


def mean_over_all_orders(coalitions: Coalitions) -> list[float]:
    """By player, the mean rise in cost when it is removed, over every order of removal."""
    orders = list(itertools.permutations(range(coalitions.players)))
    rises = [0.0] * coalitions.players
    for order in orders:
        cost = float(coalitions.base.mean())
        for k, player in enumerate(order):
            new = coalitions.without(frozenset(order[: k + 1]))
            rises[player] += (new - cost) / len(orders)
            cost = new
    return rises


@pytest.mark.parametrize("against", ["loss", "kl"])
def test_sampling_approaches_the_mean_over_all_orders(model: Any, batches: list[torch.Tensor], against: str) -> None:
    coalitions = Coalitions(Walk.in_memory(model), batches, sublayers=False, against=against)
    coalitions.ceiling = float("inf")  # no order is truncated
    exact = mean_over_all_orders(coalitions)
    found = shapley(coalitions, 60)
    for value, true, error in zip(found.mean, exact, found.standard_error, strict=True):
        assert abs(value - true) <= 4 * error + 1e-9


def test_values_add_up_to_what_all_players_are_worth(model: Any, batches: list[torch.Tensor]) -> None:
    coalitions = Coalitions(Walk.in_memory(model), batches, sublayers=True)
    coalitions.ceiling = float("inf")  # no order is truncated
    found = shapley(coalitions, 40)
    everything = coalitions.without(frozenset(range(6))) - float(coalitions.base.mean())
    assert everything > 0.1
    assert sum(found.mean) == pytest.approx(everything, rel=1e-6)
    assert found.samples.shape[1] == 6 and 0 < found.passes <= 60


def test_who_writes_nothing_is_worth_nothing(model: Any, batches: list[torch.Tensor]) -> None:
    import copy

    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.o_proj.weight.data.zero_()
    coalitions = Coalitions(Walk.in_memory(other), batches, sublayers=True)
    found = shapley(coalitions, 30)
    assert found.mean[2] == pytest.approx(0, abs=1e-7) and abs(found.mean[0]) > 1e-6


def test_leaving_out_one_is_what_importance_measures(model: Any, batches: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    found = leave_one_out(Coalitions(walk, batches, sublayers=False))
    base, loss, _ = leave_out(walk, batches, [frozenset((i,)) for i in range(3)])
    assert torch.allclose(found.samples, loss - base[:, None], atol=1e-6)


def test_an_order_ends_where_the_model_only_guesses() -> None:
    noise = [torch.randint(tiny.VOCAB, (16, 12), generator=torch.Generator().manual_seed(1))]
    coalitions = Coalitions(Walk.in_memory(tiny.tiny_model("llama", seed=3)), noise, sublayers=False)
    assert float(coalitions.base.mean()) > coalitions.ceiling  # random weights: worse than guessing
    found = shapley(coalitions, 5)
    assert found.passes <= 2 and len(found.samples) == 5  # a pair counts as a pass even where nothing is run


def test_a_budget_of_nothing(model: Any, batches: list[torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="forward passes"):
        shapley(Coalitions(Walk.in_memory(model), batches, sublayers=False), 0)


@pytest.fixture(scope="module")
def questions(model: Any) -> Questions:
    """Eight with three choices of two tokens; the likeliest to the whole model is right, but for two of them."""
    draw = torch.Generator().manual_seed(4)
    batches, choices, right = [], [], []
    for q in range(8):
        asked = torch.randint(tiny.VOCAB, (3, 7), generator=draw)
        batches += list(asked[:, :-1].split(1))
        choices.append(tuple(Choice(3 * q + k, tuple(row[-2:].tolist())) for k, row in enumerate(asked)))
        best = _answer(model, batches, choices[-1])
        right.append(frozenset([best if q < 6 else (best + 1) % 3]))
    return Questions("made up", batches, choices, right)


def _answer(model: Any, batches: list[torch.Tensor], choices: tuple[Choice, ...]) -> int:
    """By whole forward passes, the choice of greatest likelihood."""
    sums = []
    with torch.no_grad():
        for choice in choices:
            chances = model(batches[choice.batch]).logits[0].log_softmax(-1)
            sums.append(float(sum(chances[at, token] for at, token in zip((-2, -1), choice.tokens, strict=True))))
    return max(range(len(sums)), key=sums.__getitem__)


def test_values_of_a_score_are_those_of_brute_force(model: Any, questions: Questions) -> None:
    def errors(gone: frozenset[int]) -> float:
        with bypass_sublayers(model, gone, gone):
            wrong = [
                _answer(model, list(questions.batches), tuple(choices)) not in right
                for choices, right in zip(questions.choices, questions.right, strict=True)
            ]
        return sum(wrong) / len(wrong)

    coalitions = Coalitions(Walk.in_memory(model), questions, sublayers=False)
    assert coalitions.base.tolist() == [0.0] * 6 + [1.0] * 2
    assert coalitions.ceiling == pytest.approx(2 / 3)
    coalitions.ceiling = float("inf")  # no order is truncated
    exact = [0.0] * 3
    for p in range(3):
        others = [i for i in range(3) if i != p]
        for size in range(3):
            for company in itertools.combinations(others, size):
                gone = frozenset(company)
                weight = math.factorial(size) * math.factorial(2 - size) / 6
                exact[p] += weight * (errors(gone | {p}) - errors(gone))
    found = shapley(coalitions, 60)
    assert any(abs(value) > 0.05 for value in exact)
    for value, true, error in zip(found.mean, exact, found.standard_error, strict=True):
        assert abs(value - true) <= 4 * error + 1e-9
    assert mean_over_all_orders(coalitions) == pytest.approx(exact)


def test_no_order_of_a_model_that_guesses_is_cut_short(model: Any, questions: Questions) -> None:
    wrong = [frozenset(range(3)) - r for r in questions.right]  # what it does not choose: six of eight wrong
    guesser = Questions("guessed", questions.batches, questions.choices, [frozenset([min(w)]) for w in wrong])
    coalitions = Coalitions(Walk.in_memory(model), guesser, sublayers=True)
    assert float(coalitions.base.mean()) >= guesser.guessing and coalitions.ceiling == float("inf")
    found = shapley(coalitions, 8)
    everything = coalitions.without(frozenset(range(6))) - float(coalitions.base.mean())
    assert sum(found.mean) == pytest.approx(everything, abs=1e-9)
