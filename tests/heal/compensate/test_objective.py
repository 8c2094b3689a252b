"""The objective over a part of the vocabulary: its gradients are nearly those over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicer.heal.compensate import objective
from slicer.heal.compensate.objective import ADAPTS, Objective, choose, narrowed
from slicer.model.walk import Walk


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "LIKELY", 400)
    monkeypatch.setattr(objective, "SAMPLE", 100)


def test_every_token_counts(small: None) -> None:
    likelihood = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([[7, 4999], [7, 0]])
    chosen = choose(likelihood, wanted)
    assert set(wanted.flatten().tolist()) <= set(chosen.tokens.tolist())
    assert len(chosen.tokens) == 500 == len(chosen.tokens.unique())
    assert torch.equal(chosen.tokens, chosen.tokens.sort().values)
    assert float(chosen.offset.exp().sum()) == pytest.approx(5000)
    assert bool((chosen.offset[chosen.index(likelihood.topk(398).indices)] == 0).all())
    assert torch.equal(chosen.tokens[chosen.index(wanted)], wanted)
    again = choose(likelihood, wanted)
    assert torch.equal(again.tokens, chosen.tokens)


def test_a_vocabulary_that_is_small_is_taken_whole() -> None:
    chosen = choose(torch.rand(1000), torch.tensor([3]))
    assert torch.equal(chosen.tokens, torch.arange(1000)) and not bool(chosen.offset.any())


def test_a_head_gives_the_logits_of_a_part(small: None, model: Any, held_out_ids: list[int]) -> None:
    tokens = torch.tensor([held_out_ids[:32]])
    head = model.get_output_embeddings()
    before = head.weight
    chosen = choose(torch.rand(before.shape[0]), tokens)
    with torch.no_grad():
        full = model(input_ids=tokens).logits
        with narrowed(model, chosen) as part:
            assert part
            few = model(input_ids=tokens).logits
    assert few.shape[-1] == len(chosen.tokens) < full.shape[-1]
    assert torch.allclose(few, full[..., chosen.tokens], atol=1e-4)
    assert head.weight is before


def test_slopes_over_a_part_are_nearly_those_over_all(
    small: None, model: Any, held_out_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = Walk.in_memory(model)
    states = walk.start(list(torch.tensor(held_out_ids[: 4 * 96]).view(-1, 96).split(1)))
    walk.run(states, range(walk.depth))
    last = states[0] + 0.5 * torch.randn(states[0].shape, generator=torch.Generator().manual_seed(0))
    part, _ = Objective(walk, states, range(3, 4), ADAPTS).slopes(0, last, None)
    monkeypatch.setattr(objective, "LIKELY", 10**6)
    whole, _ = Objective(walk, states, range(3, 4), ADAPTS).slopes(0, last, None)
    assert not torch.equal(part, whole)
    assert float(torch.cosine_similarity(part.flatten(), whole.flatten(), dim=0)) > 0.95
