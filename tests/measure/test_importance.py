"""Loss-based importance against whole forward passes with layers bypassed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sources
import torch

from slicer.measure import losses as importance
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.model.walk import Walk
from slicer.runtime.distributed import Processes

LAYERS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("model"), layers=LAYERS, tokenizer=False)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return load_model(path, dtype="float32", device="cpu")


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(3, 250, (2, 2, 9), generator=generator))


@torch.no_grad()
def by_hand(model: Any, gone: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log probabilities of every sequence, in one ordinary pass."""
    losses, chances = [], []
    for row in torch.cat(batches()):
        with bypass(model, gone):
            logits = model(input_ids=row[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
        chances.append(logits.log_softmax(-1))
    return torch.stack(losses).double(), torch.stack(chances)


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_left_out(path: Path, model: Any, streamed: bool) -> None:
    walk = Walk.out_of_core(path, device="cpu") if streamed else Walk.in_memory(model)
    found = importance.measure(walk, batches(), Processes(), 0, 4, sizes=[2])
    whole, full = by_hand(model, set())
    assert found.base == pytest.approx(float(whole.mean()), abs=1e-5)
    for start in range(LAYERS - 1):
        loss, cut = by_hand(model, {start, start + 1})
        assert found.tables["loss"].block(2)[start] == pytest.approx(float((loss - whole).mean()), abs=1e-5)
        kl = (full.exp() * (full - cut)).sum(-1).mean()
        assert found.tables["kl"].block(2)[start] == pytest.approx(float(kl), abs=1e-5)
        error = (loss - whole).std() / 2
        assert found.tables["loss"].standard_error[2][start] == pytest.approx(float(error), abs=1e-5)


def test_greedy_removal_scores_again_after_each(model: Any, tmp_path: Path) -> None:
    found = importance.measure(
        Walk.in_memory(model), batches(), Processes(), 0, 4, greedy=2, notebook=tmp_path / "book"
    )
    gone: set[int] = set()
    for step in found.greedy:
        losses = {i: float(by_hand(model, gone | {i})[0].mean()) for i in range(LAYERS) if i not in gone}
        best = min(losses, key=lambda i: losses[i])
        assert step["layer"] == best and step["loss"] == pytest.approx(losses[best], abs=1e-5)
        gone.add(best)

    class Unwilling:
        depth = LAYERS

    again = importance.measure(
        Unwilling(),  # type: ignore[arg-type]
        batches(),
        Processes(),
        0,
        4,
        greedy=2,
        notebook=tmp_path / "book",
    )
    assert again.greedy == found.greedy, "finished passes are not run again"


@pytest.mark.parametrize("streamed", [False, True])
def test_taylor_is_gradient_times_weight(path: Path, model: Any, streamed: bool) -> None:
    walk = Walk.out_of_core(path, device="cpu") if streamed else Walk.in_memory(model)
    scores = importance.taylor_scores(walk, batches())
    fresh = load_model(path, dtype="float32", device="cpu").requires_grad_(True)
    for at, row in enumerate(torch.cat(batches())):
        fresh.zero_grad()
        logits = fresh(input_ids=row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        for i, layer in enumerate(fresh.model.layers):
            expected = sum(float((p.grad * p).abs().sum()) for p in layer.parameters())
            assert float(scores[at, i]) == pytest.approx(expected, rel=1e-4)
    assert not any(p.requires_grad for p in walk.model.parameters())
