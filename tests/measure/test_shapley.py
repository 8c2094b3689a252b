"""Shapley values: what theory says of them, on models small enough to enumerate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch

from slicer.errors import UsageError
from slicer.measure.importance import leave_out
from slicer.measure.shapley import Coalitions, _marginals, leave_one_out, shapley
from slicer.measure.stream import Walk


@pytest.fixture(scope="module")
def model() -> object:
    return tiny.tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def batches(model: Any) -> list[torch.Tensor]:
    """What the model itself would write, and so predicts better than by guessing."""
    start = torch.randint(tiny.VOCAB, (3, 2), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    return [model.generate(start, attention_mask=torch.ones_like(start), **arguments)]


@pytest.mark.parametrize("against", ["loss", "kl"])
def test_sampling_approaches_the_mean_over_all_orders(
    model: Any, batches: list[torch.Tensor], against: str
) -> None:
    coalitions = Coalitions(Walk.in_memory(model), batches, parts=False, against=against)
    orders = list(itertools.permutations(range(3)))
    exact = torch.stack([_marginals(coalitions, order) for order in orders]).mean(0)
    found = shapley(coalitions, 60)
    for value, true, error in zip(found.mean, exact.tolist(), found.standard_error, strict=True):
        assert abs(value - true) <= 4 * error + 1e-9


def test_values_add_up_to_what_all_players_are_worth(model: Any, batches: list[torch.Tensor]) -> None:
    coalitions = Coalitions(Walk.in_memory(model), batches, parts=True)
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
    coalitions = Coalitions(Walk.in_memory(other), batches, parts=True)
    found = shapley(coalitions, 30)
    assert found.mean[2] == pytest.approx(0, abs=1e-7) and abs(found.mean[0]) > 1e-6


def test_leaving_out_one_is_what_importance_measures(model: Any, batches: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    found = leave_one_out(Coalitions(walk, batches, parts=False))
    base, loss, _ = leave_out(walk, batches, [frozenset((i,)) for i in range(3)])
    assert torch.allclose(found.samples, loss - base[:, None], atol=1e-6)


def test_an_order_ends_where_the_model_only_guesses() -> None:
    noise = [torch.randint(tiny.VOCAB, (16, 12), generator=torch.Generator().manual_seed(1))]
    coalitions = Coalitions(Walk.in_memory(tiny.tiny_model("llama", seed=3)), noise, parts=False)
    assert float(coalitions.base.mean()) > coalitions.ceiling  # random weights: worse than guessing
    found = shapley(coalitions, 5)
    assert found.passes <= 2 and len(found.samples) == 5  # a pair counts as a pass even where nothing is run


def test_a_budget_of_nothing(model: Any, batches: list[torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="forward passes"):
        shapley(Coalitions(Walk.in_memory(model), batches, parts=False), 0)
