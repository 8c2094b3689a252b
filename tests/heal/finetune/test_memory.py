"""The formula of what training takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicer.heal.finetune.memory import NF4_BYTES, ModelShape, needed

SHAPE = ModelShape(layers=4, d=64, f=96, v=258, kv=32)


def test_what_nf4_takes_is_what_bitsandbytes_stores() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(1024, 2048)
    data, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = data.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored / weight.numel() == pytest.approx(NF4_BYTES)


def test_the_weights_are_those_of_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 258, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields))
    assert ModelShape.of({"model_type": "llama", **fields}) == SHAPE
    tied = ModelShape.of({"model_type": "llama", **fields, "tie_word_embeddings": True})
    assert 2 * tied.outside == SHAPE.outside and tied.in_layers == SHAPE.in_layers
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert SHAPE.in_layers + SHAPE.outside == matrices


def test_sharding_divides_what_is_stored_and_not_what_is_computed() -> None:
    given: dict[str, Any] = {"method": "lora", "rank": 4, "micro_batch": 2, "seq_len": 8}
    one = needed(SHAPE, **given, gradient_checkpointing=False)
    four = needed(SHAPE, **given, gradient_checkpointing=False, gpus=4)
    assert four["weights"] == one["weights"] / 4 and four["activations"] == one["activations"]
    assert one["all"] == sum(value for name, value in one.items() if name != "all")
    assert needed(SHAPE, **given, gradient_checkpointing=True)["activations"] < one["activations"]
    assert needed(SHAPE, **{**given, "method": "full"}, gradient_checkpointing=False)["trained"] == 16 * (
        SHAPE.in_layers + SHAPE.outside
    )
