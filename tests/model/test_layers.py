"""The residual stream as slicer taps it, and layers bypassed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from cuts import export

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.reader import Checkpoint
from slicer.model.layers import bypass, decoder_layers
from slicer.model.load import load_model
from slicer.model.pruned import shortened
from slicer.plan.plan import Plan

TYPES = ("llama", "gemma3", "gpt2", "bloom", "falcon", "opt", "gpt_neox", "mixtral", "mamba2", "lfm2")


@pytest.mark.parametrize("model_type", TYPES)
def test_the_stream_begins_and_ends_where_the_layers_do(model_type: str) -> None:
    model = tiny.tiny_model(model_type)
    tokens = torch.randint(3, 140, (2, 9), generator=torch.Generator().manual_seed(0))
    assert len(decoder_layers(model)) == tiny.DEPTH
    with torch.no_grad(), tiny.residual_stream(model) as tap:
        whole = model(input_ids=tokens, use_cache=False).logits
    assert len(tap) == tiny.DEPTH + 1
    assert all(state.shape == tap[0].shape == (2, 9, tap[0].shape[-1]) for state in tap)
    with torch.no_grad(), bypass(model, range(2, 5)), tiny.residual_stream(model) as cut:
        model(input_ids=tokens, use_cache=False)
    assert torch.equal(cut[0], tap[0]) and torch.equal(cut[2], tap[2])
    assert torch.equal(cut[2], cut[5])
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole), "hooks were left behind"


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_moe", "smollm3", "deepseek_v3", "gpt_neo", "nemotron_h"])
def test_sliced_in_memory_is_what_export_writes(model_type: str, tmp_path: Path) -> None:
    """Logits and a cached generation, under per-layer fields and layer numbers; and the model is itself afterwards."""
    checkpoint = Checkpoint.open(tiny.save_tiny(model_type, tmp_path / "source"))
    plan = Plan.dropping(checkpoint.depth, (2, 3))
    written = load_model(export(checkpoint, plan, tmp_path / "cut"), device="cpu")
    model = load_model(checkpoint.path, device="cpu")
    tokens = torch.randint(3, 140, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        whole = model(input_ids=tokens, use_cache=False).logits
        with shortened(model, plan, sliced_config(checkpoint, plan)):
            assert len(decoder_layers(model)) == len(plan.kept)
            logits = model(input_ids=tokens, use_cache=False).logits
            text = model.generate(input_ids=tokens, **wanted)
        torch.testing.assert_close(logits, written(input_ids=tokens, use_cache=False).logits, rtol=0, atol=1e-5)
        assert torch.equal(text, written.generate(input_ids=tokens, **wanted))
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole)
