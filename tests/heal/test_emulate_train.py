"""Training of what stands for removed parts: the loss on what it is fitted to falls, nothing else moves, same bytes."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from slicer.heal.emulate import emulate
from slicer.heal.emulate_train import _schedule, _Training, train
from slicer.heal.emulation import Emulated, emulated
from slicer.heal.held import split
from slicer.model.layers import logits_of
from slicer.model.verify import probe_tokens
from slicer.model.walk import Walk
from slicer.plan.plan import Plan

PLAN = Plan.cutting(tiny.DEPTH, layers=[5], attention=[2], ffn=[4])
STEPS = 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model("llama")


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(torch.randint(tiny.VOCAB, (24, 24), generator=torch.Generator().manual_seed(0)).split(4))


def tensors(found: Emulated) -> dict[str, torch.Tensor]:
    named = {
        f"{part} {layer} {name}": getattr(e, name)
        for (part, layer), e in found.by_anchor.items()
        for name in ("bias", "gain", "down", "up")
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("method", ["bias", "linear"])
def test_the_loss_falls_and_nothing_else_moves(model: Any, batches: list[torch.Tensor], method: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = Walk.in_memory(model)
    solved = emulate(walk, batches, PLAN, method, 4 if method == "linear" else None)
    trained = train(walk, batches, PLAN, solved, STEPS)
    assert 0 < trained.best <= STEPS and trained.steps == STEPS
    data = split(batches)
    judged = [_Training(walk, data, PLAN, found) for found in (solved, trained)]
    losses = []
    for each, found in zip(judged, (solved, trained), strict=True):
        with emulated(model, PLAN, found):
            losses.append(each._judge())
    assert losses[1] < losses[0]
    for name, tensor in tensors(trained).items():
        moved = not torch.equal(tensor, tensors(solved)[name])
        assert moved == (not name.endswith("gain")) and not tensor.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trained.losses | {"trained": 0} == solved.losses | {"trained": 0}
    with (
        emulated(model, PLAN, trained),
        torch.no_grad(),
    ):  # its "trained" loss is that of the model as a whole
        held = torch.cat([data.batches[b] for b in data.held])
        logits = model(held).logits[:, :-1].log_softmax(-1)
        loss = -float(logits.gather(-1, held[:, 1:, None]).mean())
    assert trained.losses["trained"] == pytest.approx(loss, rel=1e-5)


def test_one_seed_gives_the_same_bytes(model: Any, batches: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    solved = emulate(walk, batches, PLAN, "linear", 4)
    one, same, other = (tensors(train(walk, batches, PLAN, solved, 8, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_is_that_of_finite_differences(model: Any, batches: list[torch.Tensor]) -> None:
    """Of the slope behind the last layer times what stands there: what the objective gives is tested with it."""
    walk = Walk.in_memory(copy.deepcopy(model).double())
    solved = emulate(walk, batches, PLAN, "linear", 2)
    training = _Training(walk, split(batches), PLAN, solved)
    leaf, b = next(iter(training._leaves.values())), training._held[0]
    assert leaf.up is not None
    with contextlib.ExitStack() as stack:
        training._cut.attach(stack, replace(solved, by_anchor=training._leaves))
        training._backward(b)
        slope, _ = training._objective.slopes(b, training._cut.run(b), None)
        values = []
        for change in (1e-3, -1e-3):
            with torch.no_grad():
                leaf.up[3, 1] += change
                values.append(float((slope * training._cut.run(b)).sum()) / slope[..., 0].numel())
                leaf.up[3, 1] -= change
    assert leaf.up.grad is not None
    assert float(leaf.up.grad[3, 1]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [_schedule(step, 50) for step in range(1, 51)]
    assert max(rates) == rates[4] == 1 and rates[-1] < 0.01
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert _schedule(1, 1) == 1


def test_no_steps_leave_the_model_as_it_was(model: Any, batches: list[torch.Tensor]) -> None:
    """Hooks are gone after training, also where it trains nothing."""
    walk = Walk.in_memory(model)
    wanted = logits_of(model, probe_tokens(tiny.VOCAB))
    nothing = train(walk, batches, PLAN, Emulated("bias", None, {}, {"emulated": 2.0, "cut": 2.0}), 4)
    assert nothing.losses["trained"] == 2.0 and not nothing.by_anchor
    train(walk, batches, PLAN, emulate(walk, batches, PLAN, "bias"), 2)
    assert torch.equal(logits_of(model, probe_tokens(tiny.VOCAB)), wanted)
