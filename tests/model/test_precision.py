"""A 16-bit model that computes in float32 gives what the model in float32 gives, and keeps its own tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_model

from slicer.model import precision
from slicer.model.walk import Walk


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt", "gpt_bigcode"])
def test_as_the_model_in_float32(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_ROWS", 50)  # of the head at a time
    model: Any = tiny_model(model_type).to(torch.bfloat16)
    full = copy.deepcopy(model).float()
    tokens = torch.arange(2, 26).view(2, 12)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    walks = [Walk.in_memory(each) for each in (model, full)]
    with walks[0].in_float32():
        found, expected = (walk.logits(walk.run(walk.start([tokens]), range(walk.depth)), 0) for walk in walks)
        largest = max(p.nbytes for p in model.parameters() if p.dtype == torch.float32)
        assert largest < model.get_input_embeddings().weight.nbytes or model_type in ("gpt2", "opt", "gpt_bigcode")
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with pytest.raises(IndexError), walks[0].in_float32():
        model.get_input_embeddings()(torch.tensor([10**6]))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
