"""Loss-based importance against whole forward passes with layers bypassed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sources
import torch

from slicer.measure import losses
from slicer.measure.recorder import Portion
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.model.walk import Walk
from slicer.progress import Progress
from slicer.runtime.workdir import Notebook

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
    nats, chances = [], []
    for row in torch.cat(batches()):
        with bypass(model, gone):
            logits = model(input_ids=row[None]).logits[0]
        nats.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
        chances.append(logits.log_softmax(-1))
    return torch.stack(nats).double(), torch.stack(chances)


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_left_out(path: Path, model: Any, streamed: bool) -> None:
    walk = Walk.out_of_core(path, device="cpu") if streamed else Walk.in_memory(model)
    tables, base = losses.block_losses(walk, Portion.of(batches()), [2], Notebook(None), Progress())
    whole, full = by_hand(model, set())
    assert base == pytest.approx(float(whole.mean()), abs=1e-5)
    for start in range(LAYERS - 1):
        loss, cut = by_hand(model, {start, start + 1})
        assert tables["loss"].block(2)[start] == pytest.approx(float((loss - whole).mean()), abs=1e-5)
        kl = (full.exp() * (full - cut)).sum(-1).mean()
        assert tables["kl"].block(2)[start] == pytest.approx(float(kl), abs=1e-5)
        error = (loss - whole).std() / 2
        assert tables["loss"].standard_error[2][start] == pytest.approx(float(error), abs=1e-5)


def test_greedy_removal_scores_again_after_each(model: Any, tmp_path: Path) -> None:
    book = tmp_path / "book"
    order, base = losses.greedy_order(Walk.in_memory(model), Portion.of(batches()), 2, Notebook(book), Progress())
    assert base == pytest.approx(float(by_hand(model, set())[0].mean()), abs=1e-5)
    gone: set[int] = set()
    for step in order:
        without = {i: float(by_hand(model, gone | {i})[0].mean()) for i in range(LAYERS) if i not in gone}
        best = min(without, key=lambda i: without[i])
        assert step["layer"] == best and step["loss"] == pytest.approx(without[best], abs=1e-5)
        gone.add(best)

    class Unwilling:
        depth = LAYERS

    again = losses.greedy_order(
        Unwilling(),  # type: ignore[arg-type]
        Portion.of(batches()),
        2,
        Notebook(book),
        Progress(),
    )
    assert again == (order, base), "finished passes are not run again"


@pytest.mark.parametrize("streamed", [False, True])
def test_taylor_is_gradient_times_weight(path: Path, model: Any, streamed: bool) -> None:
    walk = Walk.out_of_core(path, device="cpu") if streamed else Walk.in_memory(model)
    scores = losses.taylor_scores(walk, batches())
    fresh = load_model(path, dtype="float32", device="cpu").requires_grad_(True)
    for at, row in enumerate(torch.cat(batches())):
        fresh.zero_grad()
        logits = fresh(input_ids=row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        for i, layer in enumerate(fresh.model.layers):
            expected = sum(float((p.grad * p).abs().sum()) for p in layer.parameters())
            assert float(scores[at, i]) == pytest.approx(expected, rel=1e-4)
    assert not any(p.requires_grad for p in walk.model.parameters())
