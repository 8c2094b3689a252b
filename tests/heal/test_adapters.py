"""Which matrices get an adapter, and what stands in the way of training them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from slicer.checkpoint.merge import key_of
from slicer.checkpoint.model import load_model
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal import adapters

GATED, ATTENTION = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("model_type", "names", "a_layer"),
    [
        ("llama", GATED, 3),
        ("phi", {"fc1", "fc2"}, 2),
        ("phi3", {"gate_up_proj", "down_proj"}, 2),
        ("opt", {"fc1", "fc2"}, 2),
        ("gpt2", {"c_fc", "c_proj"}, 2),
        ("gemma3", GATED, 3),  # under the names of a multimodal wrapper
        ("qwen2_moe", GATED, 3),  # dense layers, and the shared experts of the others
        ("mixtral", ATTENTION, 4),  # its experts are slices of one tensor
    ],
)
def test_the_feed_forward_matrices(model_type: str, names: set[str], a_layer: int, tmp_path: Path) -> None:
    path = tiny.save_tiny(model_type, tmp_path / model_type)
    checkpoint = Checkpoint.open(path)
    found = adapters.targets(load_model(path), checkpoint)
    assert {name.rsplit(".", 1)[-1] for name in found} == names and len(found) == tiny.DEPTH * a_layer
    assert all(key_of(checkpoint, name) in checkpoint.tensors for name in found)
    if model_type != "mixtral":
        assert not any("attn" in name or "attention" in name for name in found)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = adapters.find_spec
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else honest(name))
    adapters.require("lora")
    with pytest.raises(HealError, match=r"qlora needs bitsandbytes: pip install 'slicer-llm\[heal\]'"):
        adapters.require("qlora")
