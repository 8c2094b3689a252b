"""Where trained weights go, in checkpoints whose tensors transformers saves otherwise than it found them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from slicer.checkpoint import tensors
from slicer.checkpoint.export import unchanged, write
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.settings import Training, resolve
from slicer.model.load import load_model
from slicer.model.trained import homes_of, spans_of, trained_logits
from slicer.model.verify import check_contents
from slicer.progress import Progress
from slicer.runtime.compute import Compute

State = dict[str, torch.Tensor]
CPU = Compute("cpu")


def old_rotary(state: State) -> None:
    for i in range(tiny.DEPTH):
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.full((16,), float(i))


def old_masks(state: State) -> None:
    for i in range(tiny.DEPTH):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def bare(state: State) -> None:
    for key in list(state):
        state[key.removeprefix("transformer.")] = state.pop(key)


def other_wrapper(state: State) -> None:
    """As some versions of transformers saved multimodal checkpoints: all of it within the model."""
    for key in list(state):
        new = key.replace("language_model.model.", "language_model.")
        state[new if new.startswith("lm_head") else f"model.{new}"] = state.pop(key)


def mixed(state: State) -> None:
    """Norms and routers in float32 beside bfloat16."""
    for key, tensor in state.items():
        if "norm" not in key and "gate.weight" not in key:
            state[key] = tensor.bfloat16()


def twice(state: State) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def two_of_one(state: State) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 0.5


@pytest.mark.parametrize(
    ("model_type", "change", "tied"),
    [
        ("llama", old_rotary, False),
        ("gpt2", old_masks, True),
        ("gpt2", bare, True),
        ("gemma3", other_wrapper, True),
        ("llama", mixed, False),
        ("mixtral", mixed, False),
        ("llama", twice, True),
        ("llama", two_of_one, True),
    ],
)
def test_the_written_checkpoint_has_the_trained_weights(
    model_type: str, change: Callable[[State], None], tied: bool, tmp_path: Path
) -> None:
    """In the dtypes and under the names that it had, the tied ones twice where they were stored twice."""
    path = tiny.save_tiny(model_type, tmp_path / "base", tie_word_embeddings=tied)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(path)
    homes = homes_of(base)
    model = load_model(path, dtype="float32")
    ignored = {key for key in state if "inv_freq" in key or key.endswith((".attn.bias", "masked_bias"))}
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "trained")
    trained = Checkpoint.open(tmp_path / "trained")
    spans = spans_of(base, trained, homes)
    assert spans.keys() == state.keys() - ignored
    (tmp_path / "out").mkdir()
    contents = unchanged(base, spans)
    write(contents, tmp_path / "out")
    expected = trained_logits(base, trained, homes, CPU)
    errors = check_contents(tmp_path / "out", contents, expected, CPU, Progress(), load=True)
    assert errors.same is not None and errors.same < 1e-5
    out = Checkpoint.open(tmp_path / "out").tensors
    assert {key: span.dtype for key, span in out.items()} == {key: s.dtype for key, s in base.tensors.items()}
    if change in (twice, two_of_one):
        head, embedding = (tensors.read(out[key]) for key in ("lm_head.weight", "model.embed_tokens.weight"))
        assert torch.equal(head, embedding) == (change is twice)


def test_weights_that_cannot_be_written_are_not_trained(tmp_path: Path) -> None:
    path = tiny.save_tiny("llama", tmp_path / "base")
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    settings = resolve(Training(method="full", seq_len=32), "llama", 10**6, most_tokens=128, on_gpu=False)[0]
    with pytest.raises(HealError, match=r"model\.norm\.weight: .* does not hold it; use --method lora"):
        adapters.load(Checkpoint.open(path), settings, CPU)
