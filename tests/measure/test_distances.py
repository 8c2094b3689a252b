"""The stream after attention: where it is found, and that the whole layers' distances stay what they were."""

from __future__ import annotations

import pytest
import tiny
import torch

from slicer.errors import ArchitectureError
from slicer.measure.distances import measure_halves, measure_loaded, record_halves, tables_of_halves
from slicer.model.layers import decoder_layers
from slicer.model.sublayers import MidLayerTap
from slicer.model.walk import Walk
from slicer.plan.blocks import rank_offset, rank_sublayers


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(tiny.VOCAB, (4, 12), generator=generator).split(2))


@pytest.mark.parametrize(
    ("model_type", "place"),
    [
        ("llama", "post_attention_layernorm"),
        ("gemma3_text", "pre_feedforward_layernorm"),
        ("olmo2", "mlp"),
        ("gpt2", "ln_2"),
        ("phi", None),
    ],
)
def test_the_stream_after_attention_is_found(model_type: str, place: str | None) -> None:
    walk = Walk.in_memory(tiny.tiny_model(model_type))
    states, midway = walk.start(batches()), MidLayerTap(walk)
    between, after = midway.states(0, 0, states[0])
    assert midway.place(0, walk.layers[0], lambda: after) == place
    assert torch.equal(after, walk.call(0, 0, states[0]))
    if model_type == "llama":
        layer = decoder_layers(walk.model)[0]
        feed_forward = layer.mlp(layer.post_attention_layernorm(between))
        assert torch.equal(between + feed_forward, after)


def test_layers_have_the_distances_of_a_plain_pass() -> None:
    model = tiny.tiny_model("qwen2")
    layers, halves = measure_halves(Walk.in_memory(model), batches())
    plain = measure_loaded(model, batches())
    for n in plain.sizes:
        assert list(layers.block(n)) == pytest.approx(list(plain.block(n)), abs=1e-7)
        assert list(halves.block(2 * n)[::2]) == pytest.approx(list(plain.block(n)), abs=1e-7)


def test_a_part_that_writes_nothing_is_the_first_to_go() -> None:
    model = tiny.tiny_model("llama")
    layers = decoder_layers(model)
    layers[2].self_attn.o_proj.weight.data.zero_()
    layers[4].mlp.down_proj.weight.data.zero_()
    layers[5].self_attn.o_proj.weight.data.zero_()  # with the one before: a half-offset cut that changes nothing
    stacked = record_halves(Walk.in_memory(model), batches())
    for table in tables_of_halves(stacked, 12).values():
        ranked = rank_sublayers(table, range(7), range(7))
        assert {part[:2] for part in ranked[:3]} == {("attention", 2), ("ffn", 4), ("attention", 5)}
        assert ranked[2][2] == pytest.approx(0, abs=1e-6) and ranked[3][2] > 1e-4
        assert rank_offset(table, 1)[0].start == 4


def test_a_model_without_such_parts_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="both attention and feed-forward"):
        measure_halves(Walk.in_memory(tiny.tiny_model("mamba2")), batches())
