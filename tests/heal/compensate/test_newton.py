"""Second-order steps on the embedded model: their gradient is that of the loss, and unseen text gains by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuts import cutting
from torch import nn

from slicer.checkpoint.hub import DEMO
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.newton import DAMPING, SLACK, Matrix, Newton, Sums
from slicer.heal.compensate.objective import MIX, Objective
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.model.pruned import PrunedRun
from slicer.model.walk import SourceActivations, Walk
from slicer.plan.plan import Plan

DROPPED = [4, 5]
PLAN = Plan.dropping(12, DROPPED)


def anything(i: int, name: str, module: nn.Module) -> bool:
    return True


@pytest.fixture(scope="module")
def text(held_out_ids: list[int]) -> list[torch.Tensor]:
    """int64 batches of 1 x 96."""
    return list(torch.tensor(held_out_ids[: 24 * 96]).view(-1, 96).split(1))


def run_of(model: Any, text: list[torch.Tensor], held: Sequence[int], plan: Plan = PLAN) -> PrunedRun:
    return PrunedRun.of_source(Walk.in_memory(model), plan, text, held, 3)


def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """L of one sequence, summed over its positions, with plain autograd."""
    with torch.no_grad():
        p = model(input_ids=batch).logits[0].softmax(-1)
    with bypass(model, DROPPED):
        q = model(input_ids=batch).logits[0].log_softmax(-1)
    share = torch.full((len(q), 1), MIX)
    share[-1] = 0
    kl = ((1 - share) * p * (p.log() - q)).sum()
    return kl - MIX * q[:-1].gather(-1, batch[0, 1:, None]).sum()


def test_the_gradient_is_that_of_the_loss(model: Any, text: list[torch.Tensor]) -> None:
    newton = Newton(run_of(model, text[:16], range(14, 16)), {}, anything)
    every = (found for _, found, _ in newton.sums(0, curvature=True))
    found = {(m.layer, m.name): sums for layer in every for m, sums in layer.items()}[7, "mlp.down_proj"]
    weight = model.get_parameter("model.layers.7.mlp.down_proj.weight").requires_grad_()
    try:
        total = sum((loss(model, batch) for batch in text[:14][::3]), torch.zeros(()))
        (expected,) = torch.autograd.grad(total, weight)
    finally:
        weight.requires_grad_(False)
    assert torch.allclose(found.gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert found.outputs is not None and bool((found.outputs.diagonal() > 0).all())


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_a_step_solves_with_both_factors(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, module = Matrix(0, "m", transposed), nn.Linear(5, 3, bias=False).requires_grad_(False)
    sums, first = Sums(module, matrix, curvature=True), module.weight.data.clone()
    z, g = torch.randn(40, 5, generator=generator), torch.randn(40, 3, generator=generator)
    sums.watch(module, (z,), g)
    sums.take(g)
    sums.draw(g)
    left, right = (
        m + strength * m.diagonal().mean() * torch.eye(len(m))
        for m, strength in ((g.T @ g, DAMPING[1]), (z.T @ z, DAMPING[0]))
    )
    expected = -torch.linalg.solve(left, g.T @ z) @ torch.linalg.inv(right)
    matrix.solve(sums)
    matrix.step(2.0)
    assert torch.allclose(matrix.ratio * first.norm(), expected.norm(), atol=1e-5)
    stored = first.T if transposed else first
    new = matrix.moved(stored, 0.0, torch.float32)
    assert torch.allclose(new.T if transposed else new, first + 2 * expected, atol=1e-5)


@pytest.mark.parametrize("plan", [PLAN, cutting(12, attention=DROPPED, form="zeroed")], ids=["layers", "attention"])
def test_steps_lower_the_loss_of_text_that_took_no_part(plan: Plan, model: Any, text: list[torch.Tensor]) -> None:
    """Neither fitted nor used to choose the lengths; and they lead no further from the source than they may."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unseen = run_of(model, text[16:], range(8), plan)
    objective = Objective(unseen.walk, unseen.target, unseen.held)
    newton = Newton(run_of(model, text[:16], range(14, 16), plan), {}, anything)

    def judge() -> tuple[float, float]:
        (found,) = objective.judge(unseen.ends(unseen.held, [newton.edit]))
        return found

    first, ((_, least),) = judge(), newton.judge([0.0])
    assert newton.step(0) and newton.step(1)
    second, ((_, far),) = judge(), newton.judge([0.0])
    stepped = {(matrix.layer, matrix.name) for matrix, _, _ in newton.stepped()}
    assert second[0] < first[0] and far <= (1 + SLACK) * least
    attention = {i for i, name in stepped if name == "self_attn.o_proj"}
    assert stepped and not attention & plan.gone[0]
    assert not {i for i, name in stepped if name == "mlp.down_proj"} & plan.gone[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def tensors(model: Any, text: list[torch.Tensor], plan: Plan, known: SourceActivations | None) -> Any:
    solved = fold(Walk.in_memory(model), text, plan, holds=anything, activations=known)
    found = {f"{i}.{name}": t for i, e in solved.edits.items() for name, t in e.parameters.items()}
    return found, solved.losses


def test_the_same_text_gives_the_same_bytes_with_cached_activations_too(model: Any, text: list[torch.Tensor]) -> None:
    known = SourceActivations(1 << 30)
    tensors(model, text[:16], Plan.dropping(12, [7]), known)
    once, again, cached = (tensors(model, text[:16], PLAN, given) for given in (None, None, known))
    for other in (again, cached):
        assert once[1] == other[1] and once[0].keys() == other[0].keys()
        assert all(torch.equal(t, other[0][name]) for name, t in once[0].items())
    with pytest.raises(ValueError, match="batches differ"):
        tensors(model, text[:8], PLAN, known)


def test_activations_of_another_precision_are_not_taken(model: Any, text: list[torch.Tensor]) -> None:
    known = SourceActivations(1 << 30)
    half = load_model(DEMO, dtype="bfloat16", device="cpu")
    for each in (half, model):
        walk = Walk.in_memory(each)
        states, expected = walk.start(text[:2]), walk.start(text[:2])
        known.advance(walk, 0, states)
        walk.advance(0, expected)
        assert states.layer == 1 and all(map(torch.equal, states, expected))
