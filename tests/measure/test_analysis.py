"""One pass gives every d(l, l+n), of the residual stream that enters the final norm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sources
import torch

from slicer.errors import PlanError
from slicer.measure.analysis import Analysis, Distances
from slicer.measure.distances import measure_loaded
from slicer.model.load import load_model
from slicer.plan.records import TextRecord
from slicer.progress import Progress

LAYERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = sources.save_llama(tmp_path_factory.mktemp("model"), layers=LAYERS, tokenizer=False)
    return load_model(Path(path), dtype="float32", device="cpu")


def batches(count: int = 3, batch: int = 2, length: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(258, (count, batch, length), generator=generator))


@torch.no_grad()
def stream_by_hand(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """x(0)..x(L) of the last token, [L+1, batch, d], the last one caught where it enters the final norm."""
    caught = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([*hidden[:LAYERS], caught[0]])[:, :, -1].double()


def test_every_block_is_measured_at_once(model: Any) -> None:
    distances = measure_loaded(model, batches())
    x = torch.cat([stream_by_hand(model, tokens) for tokens in batches()], dim=1)
    for n in range(1, LAYERS + 1):
        assert len(distances.block(n)) == LAYERS - n + 1
        for start, found in enumerate(distances.block(n)):
            cosine = torch.nn.functional.cosine_similarity(x[start], x[start + n], dim=-1)
            assert found == pytest.approx(float(torch.arccos(cosine).mean()) / math.pi, abs=1e-6)
    assert distances.samples == 6 and distances.seq_len == 10


def test_the_final_norm_is_never_seen(model: Any) -> None:
    before = measure_loaded(model, batches())
    weight = model.model.norm.weight.data
    kept = weight.clone()
    weight.copy_(torch.linspace(-3, 5, len(weight)))
    try:
        assert measure_loaded(model, batches()) == before
    finally:
        weight.copy_(kept)


def test_the_size_of_a_batch_does_not_matter(model: Any) -> None:
    one = measure_loaded(model, [row[None] for tokens in batches() for row in tokens])
    for n, row in measure_loaded(model, batches()).mean.items():
        assert one.mean[n] == pytest.approx(row, abs=1e-6)


def test_progress_counts_batches(model: Any) -> None:
    class Counting(Progress):
        total, done = 0, 0

        def stage(self, name: str, total: int = 0, unit: str = "") -> None:
            self.total += total

        def advance(self, count: int = 1) -> None:
            self.done += count

    progress = Counting()
    measure_loaded(model, batches(), progress)
    assert progress.total == progress.done == 3


def test_json_there_and_back(model: Any) -> None:
    distances = measure_loaded(model, batches())
    assert Distances.from_json(distances.to_json()) == distances


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"depth": 3, "distances": 4}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="measure again"):
        Distances.from_json(text)


def test_an_analysis_comes_back_from_json(model: Any) -> None:
    table = measure_loaded(model, batches())
    holes = Distances(LAYERS, 6, 10, {1: [math.nan] + [0.1] * 4}, {1: [0.0] * 5}, "healed_loss")
    whole = Analysis(
        LAYERS, 6, 10, {table.metric: table, "healed_loss": holes}, source="org/name",
        greedy=({"layer": 3, "loss": 2.0},), calibration=TextRecord("text", 6, 10), positions=(4, 9),
    )  # fmt: skip
    again = Analysis.from_json(whole.to_json())
    assert again.to_json() == whole.to_json() and again.distances() == whole.distances()
    assert math.isnan(again.distances("healed_loss").block(1)[0])
    for bad in ("", "[]", "{}", '{"format": 1}', whole.to_json().replace('"depth": 5', '"depth": 9')):
        with pytest.raises(PlanError):
            Analysis.from_json(bad)
