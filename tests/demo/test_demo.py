"""The embedded model has learned something, and its layers are not alike."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from slicer.checkpoint.hub import DEMO
from slicer.cli.main import main
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.measure.analysis import Distances
from slicer.measure.distances import measure_loaded
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.plan.blocks import rank


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(DEMO, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """int64 [8, 128]: text that the training never saw."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer((DEMO.parent / "heldout.txt").read_text("utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)[::5][:8]


@pytest.fixture(scope="module")
def distances(model: Any) -> Distances:
    """Measured on the model's own text: the held-out text takes no part in the choice."""
    spec = TextSpec(source="self", samples=32, seq_len=64, batch_size=32)
    return measure_loaded(model, token_batches(spec, DEMO, model).batches)


def loss(model: Any, tokens: torch.Tensor, dropped: Iterable[int] = ()) -> float:
    with torch.inference_mode(), bypass(model, dropped):
        return float(model(input_ids=tokens, labels=tokens).loss)


def test_it_is_what_its_card_says(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama" and config.num_hidden_layers >= 12
    assert config.head_dim >= 32 and config.vocab_size >= 4096
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 20e6
    figures = json.loads((DEMO.parent / "training.json").read_text())
    assert figures["parameters"] == model.num_parameters()


def test_it_has_learned(model: Any, held_out: torch.Tensor) -> None:
    """A uniform guess over 4096 tokens loses 8.3 nats; knowing only how often each occurs, about 6."""
    assert loss(model, held_out) < 4.1


@pytest.mark.parametrize("n", [2, 3, 4])
def test_similar_layers_are_missed_less_than_random_ones(
    model: Any, held_out: torch.Tensor, distances: Distances, n: int
) -> None:
    whole = loss(model, held_out)
    chosen = loss(model, held_out, rank(distances, n)[0].dropped) - whole
    draw = random.Random(n)
    others = [loss(model, held_out, draw.sample(range(distances.depth), n)) - whole for _ in range(8)]
    assert chosen < 0.75 * mean(others)


def test_the_command_shows_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "sliced"), "--drop", "3"])
    assert result.exit_code == 0, result.output
    assert "12 to 9 layers" in result.output and "logits" in result.output
    assert (tmp_path / "sliced" / "model.safetensors").is_file()


def test_demo_is_a_source(tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = CliRunner().invoke(
        main, ["convert", "demo", "--drop", "0.25", "--samples", "8", "--seq-len", "64", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 9
