"""Which matrices get an adapter, and what stands in the way of training them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import succeeds

from slicer.checkpoint.keys import KeyMap
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.settings import Training, resolve
from slicer.model.load import load_model
from slicer.runtime.compute import Compute

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
        ("mamba2", {"in_proj"}, 1),  # its kernels read the other matrices past their modules
    ],
)
def test_the_feed_forward_matrices(model_type: str, names: set[str], a_layer: int, tmp_path: Path) -> None:
    path = tiny.save_tiny(model_type, tmp_path / model_type)
    checkpoint = Checkpoint.open(path)
    found = adapters.targets(load_model(path), checkpoint)
    assert {name.rsplit(".", 1)[-1] for name in found} == names and len(found) == tiny.DEPTH * a_layer
    assert all(KeyMap(checkpoint).key(f"{name}.weight") for name in found)
    if model_type != "mixtral":
        assert not any("attn" in name or "attention" in name for name in found)


@pytest.mark.parametrize(
    ("model_type", "matrices"),
    [
        ("gpt2", 2 * tiny.DEPTH),  # its Conv1D become ordinary linear layers, and are stored as [in, out]
        ("qwen3_next", 3 * tiny.DEPTH),  # dense layers and shared experts, not all experts
        ("mamba2", tiny.DEPTH),
    ],
)
def test_what_is_trained_in_four_bits_is_merged_where_it_was(model_type: str, matrices: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    path = tiny.save_tiny(model_type, tmp_path / "model")
    asked = Training(method="qlora", lora_r=2, seq_len=32)
    settings = resolve(asked, model_type, 10**6, most_tokens=128, on_gpu=False)[0]
    model = adapters.load(Checkpoint.open(path), replace(settings, compute="float32"), Compute("cpu"))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    done = json.loads(succeeds("merge", path, tmp_path / "adapter", "-o", tmp_path / "out", "--json").stdout)
    assert len(done["merged"][0]["tensors"]) == matrices and done["logits_error"] < 1e-5


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = adapters.find_spec
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else honest(name))
    adapters.require("lora")
    with pytest.raises(HealError, match=r"qlora needs bitsandbytes: pip install 'slicer-llm\[heal\]'"):
        adapters.require("qlora")
