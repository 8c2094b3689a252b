"""Verification catches what is wrong, and names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sources
import tiny
import torch
from safetensors.torch import load_file, save_file

from slicer.checkpoint.export import unchanged
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import VerificationError
from slicer.model import layers, verify
from slicer.model.load import load_model
from slicer.progress import Progress
from slicer.runtime.compute import Compute

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return sources.save_llama(tmp_path / "model", layers=3, shard="1GB", tokenizer=False)


def change(path: Path, edit: Callable[[Tensors], None]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_good_checkpoint_passes_without_reading_a_weight(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    verify.check_load(checkpoint)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)}), "extra.weight is not part of"),
        (lambda t: t.update({NORM: torch.zeros(7)}), rf"{NORM} has the wrong shape \(\[7\]"),
    ],
)
def test_the_tensor_is_named(checkpoint: Path, edit: Callable[[Tensors], None], words: str) -> None:
    change(checkpoint, edit)
    with pytest.raises(VerificationError, match=words):
        verify.check_load(checkpoint)


@pytest.mark.parametrize(("model_type", "place"), [("gptj", "attn"), ("gpt_neo", "attn.attention")])
def test_old_buffers_are_nobodys_fault(model_type: str, place: str, tmp_path: Path) -> None:
    """As published checkpoints have them."""
    path = tiny.save_tiny(model_type, tmp_path / "model")
    change(path, lambda t: t.update({f"transformer.h.0.{place}.bias": torch.ones(1, 1, 8, 8)}))
    change(path, lambda t: t.update({f"transformer.h.0.{place}.masked_bias": torch.tensor(-1e9)}))
    verify.check_load(path)


def test_a_config_that_does_not_reload(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_attention_heads": "many"}))
    with pytest.raises(VerificationError):
        verify.check_load(checkpoint)


def check(checkpoint: Path, tokens: torch.Tensor, reference: torch.Tensor) -> float | None:
    contents = unchanged(Checkpoint.open(checkpoint))
    expected = verify.Expected(tokens, reference)
    return verify.check_contents(checkpoint, contents, expected, Compute("cpu"), Progress(), load=True).same


def test_logits_of_another_model_are_caught(checkpoint: Path) -> None:
    tokens = verify.probe_tokens(258)
    reference = layers.logits_of(load_model(checkpoint, dtype="float32", device="cpu"), tokens)
    assert (check(checkpoint, tokens, reference) or 0) <= 1e-6
    change(checkpoint, lambda t: t[NORM].mul_(1.01))
    with pytest.raises(VerificationError, match="logits differ"):
        check(checkpoint, tokens, reference)


def test_undefined_logits_are_no_proof(checkpoint: Path) -> None:
    tokens = verify.probe_tokens(258)
    with pytest.raises(VerificationError, match="not finite"):
        check(checkpoint, tokens, torch.full((*tokens.shape, 258), float("nan")))
