"""Second-order steps on the embedded model: their gradient is that of the loss, and they keep what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slicer import demo
from slicer.heal.curvature import DAMPING, Matrix
from slicer.heal.fold import fold
from slicer.heal.newton import Newton
from slicer.heal.objective import MIX
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.model.walk import SourceActivations, Walk

DROPPED = [4, 5]


def anything(i: int, name: str, module: nn.Module) -> bool:
    return True


@pytest.fixture(scope="module")
def text(held_out_ids: list[int]) -> list[torch.Tensor]:
    """int64 batches of 1 x 96."""
    return list(torch.tensor(held_out_ids[: 16 * 96]).view(-1, 96).split(1))


def start(model: Any, text: list[torch.Tensor]) -> tuple[Walk, Newton]:
    walk = Walk.in_memory(model)
    states = walk.start(text)
    walk.run(states, range(3))
    origin = states.copy()
    walk.run(states, range(3, walk.depth))
    kept = [i for i in range(3, walk.depth) if i not in DROPPED]
    held = range(len(text) - 2, len(text))
    return walk, Newton(walk, kept, origin, states, held, anything)


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
    walk, newton = start(model, text)
    with newton:
        newton._gather(0, curvature=True)
        weight = model.get_parameter("model.layers.7.mlp.down_proj.weight").requires_grad_()
        try:
            total = sum((loss(model, batch) for batch in text[:-2][::3]), torch.zeros(()))
            (expected,) = torch.autograd.grad(total, weight)
        finally:
            weight.requires_grad_(False)
        (matrix,) = [m for m in newton._matrices if (m.layer, m.name) == (7, "mlp.down_proj")]
        assert torch.allclose(matrix.gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert bool((matrix.outputs.diagonal() > 0).all())


def test_a_step_solves_with_both_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Matrix(0, "m", nn.Linear(5, 3, bias=False))
    z, g = torch.randn(40, 5, generator=generator), torch.randn(40, 3, generator=generator)
    matrix.z = z
    matrix.take(g, curvature=True)
    matrix.draw(g)
    left, right = (
        m + strength * m.diagonal().mean() * torch.eye(len(m))
        for m, strength in ((g.T @ g, DAMPING[1]), (z.T @ z, DAMPING[0]))
    )
    expected = -torch.linalg.solve(left, g.T @ z) @ torch.linalg.inv(right)
    assert torch.allclose(matrix.direction(), expected, atol=1e-5)


def test_steps_lower_the_loss_and_lead_no_further_from_the_source(
    model: Any, text: list[torch.Tensor]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk, newton = start(model, text)
    with newton:
        first = newton.judge()
        assert newton.step(0) and newton.step(1)
        second = newton.judge()
        changes = newton.changes({})
    assert second[0] < first[0] and second[1] <= first[1]
    assert changes and not set(changes) & set(DROPPED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_text_gives_the_same_bytes(model: Any, text: list[torch.Tensor]) -> None:
    once, again = (fold(Walk.in_memory(model), text, DROPPED, storable=anything) for _ in range(2))
    assert once.losses == again.losses and once.changes.keys() == again.changes.keys()
    for i, change in once.changes.items():
        assert all(torch.equal(t, again.changes[i].parameters[name]) for name, t in change.parameters.items())


def test_a_course_gone_before_changes_no_byte(model: Any, text: list[torch.Tensor]) -> None:
    course = SourceActivations(1 << 30)

    def healed(dropped: list[int], course: SourceActivations | None) -> dict[str, torch.Tensor]:
        found = fold(Walk.in_memory(model), text, dropped, storable=anything, course=course)
        return {f"{i}.{name}": t for i, c in found.changes.items() for name, t in c.parameters.items()}

    healed([7], course)
    with_it, without = healed(DROPPED, course), healed(DROPPED, None)
    assert with_it.keys() == without.keys() and all(
        torch.equal(with_it[name], without[name]) for name in without
    )
    with pytest.raises(ValueError, match="batches differ"):
        fold(Walk.in_memory(model), text[:8], DROPPED, storable=anything, course=course)


def test_a_course_gone_in_another_precision_is_gone_again(model: Any, text: list[torch.Tensor]) -> None:
    course = SourceActivations(1 << 30)
    half = load_model(demo.path(), dtype="bfloat16", device="cpu")
    for each in (half, model):
        walk = Walk.in_memory(each)
        states, expected = walk.start(text[:2]), walk.start(text[:2])
        course.advance(walk, 0, states)
        walk.advance(0, expected)
        assert states.layer == 1 and all(map(torch.equal, states, expected))
