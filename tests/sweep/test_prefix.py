"""Layers before a cut are run once: the scores are those of running them again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.reader import Checkpoint
from slicer.model.layers import decoder_layers
from slicer.model.pruned import shortened
from slicer.plan.plan import Plan
from slicer.sweep.prefix import Prefix
from tests.tiny import save_tiny, tiny_model

CUTS = ((3,), (2, 3), (1, 2), (3,))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt2", "falcon", "bloom"])
def test_logits_are_the_same_bits(model_type: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(model_type, tmp_path))
    model = tiny_model(model_type).eval()
    batches = [torch.randint(0, model.config.vocab_size, (1, n)) for n in (9, 12)]
    prefix, taken = Prefix(model, budget=10**7), []
    for dropped in (d for d in CUTS if max(d) < checkpoint.depth - 1):
        plan = Plan.dropping(checkpoint.depth, dropped)
        config = sliced_config(checkpoint, plan)
        with shortened(model, plan, config), torch.no_grad():
            expected = [model(batch, use_cache=False).logits for batch in batches]
        with prefix.shared(min(dropped)), shortened(model, plan, config), torch.no_grad():
            got = [model(batch).logits for batch in batches]
            written = model.generate(batches[0], max_new_tokens=4, do_sample=False)
        with shortened(model, plan, config):
            assert torch.equal(written, model.generate(batches[0], max_new_tokens=4, do_sample=False))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        taken.append(prefix.taken)
    steps = [after - before for before, after in pairwise(taken)]
    assert steps == [0, 0, len(batches)], "of the later cuts the last alone begins where an earlier one was cached"
    with torch.no_grad():
        whole, fresh = model(batches[0]), tiny_model(model_type).eval()(batches[0])
    assert prefix.taken == taken[-1], "outside the block nothing is taken from the cache"
    assert torch.equal(whole.logits, fresh.logits) and whole.keys() == fresh.keys()
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_without_room_nothing_is_kept(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    prefix = Prefix(model, budget=100)
    tokens = torch.randint(0, model.config.vocab_size, (1, 9))
    with torch.no_grad():
        expected = model(tokens).logits
        for _ in range(2):
            with prefix.shared(2):
                assert torch.equal(model(tokens).logits, expected)
    assert prefix.taken == 0


def test_layers_that_tell_each_other_more_are_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    layers, said = model.model.layers, []
    first, last = layers[0].forward, layers[3].forward

    def whisper(*args: object, **kwargs: object) -> torch.Tensor:
        said.append(float(len(said)))
        output: torch.Tensor = first(*args, **kwargs)
        return output

    def hear(*args: object, **kwargs: object) -> torch.Tensor:
        output: torch.Tensor = last(*args, **kwargs)
        return output * (1 + said.pop())

    layers[0].forward, layers[3].forward = whisper, hear
    tokens = torch.randint(0, model.config.vocab_size, (1, 9))
    prefix = Prefix(model, budget=10**7)
    with torch.no_grad():
        expected = model(tokens).logits
        for _ in range(2):
            with prefix.shared(2):
                assert torch.equal(model(tokens).logits, expected)
    assert prefix.taken == 0
