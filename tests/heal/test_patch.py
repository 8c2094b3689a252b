"""Both halves of a patch agree: the pruned source with the edits, and the checkpoint that is written, of every kind of
edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuts import changed, cutting, export
from torch import nn

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, UsageError
from slicer.heal.patch import NONE, Solved, form_for, holds, place
from slicer.model.layers import decoder_layers, logits_of
from slicer.model.load import load_model
from slicer.model.pruned import LayerEdit, Replacement, pruned_logits, shortened
from slicer.model.verify import check_load, probe_tokens
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import Losses, SolvedMatrix, TextRecord

WIDTH = 64
BLOCKWISE = {"form": "blockwise"}
HALF = Plan(tiny.DEPTH, (0, 1, 2, 5, 6), joined=((2, 4),))


@dataclass(frozen=True)
class Case:
    """Which names of which layers get new tensors, maps of their output, or something behind a sublayer."""

    model_type: str
    plan: Plan
    parameters: dict[int, tuple[str, ...]] = field(default_factory=dict)
    transforms: dict[int, str] = field(default_factory=dict)
    constants: tuple[tuple[int, str], ...] = ()
    maps: tuple[tuple[int, str], ...] = ()

    def edits(self, model: Any) -> dict[int, LayerEdit]:
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        edits: dict[int, LayerEdit] = {}
        for i, names in self.parameters.items():
            own = dict(decoder_layers(model)[i].named_parameters())
            edits[i] = LayerEdit({name: noise(*own[name].shape) for name in names})
        for i, name in self.transforms.items():
            edits[i] = LayerEdit(transforms={name: torch.eye(WIDTH) + noise(WIDTH, WIDTH)})
        for i, sublayer in self.constants:
            edits[i] = LayerEdit(behind={sublayer: Replacement(noise(WIDTH))})
        for i, sublayer in self.maps:
            low = Replacement(noise(WIDTH), 1 + noise(WIDTH), noise(4, WIDTH), noise(WIDTH, 4))
            edits[i] = LayerEdit(behind={sublayer: low})
        return edits


CASES = {
    "weights before a block": Case(
        "llama",
        Plan.dropping(tiny.DEPTH, [3, 4]),
        {2: ("self_attn.o_proj.weight", "mlp.down_proj.weight"), 6: ("mlp.down_proj.weight",)},
    ),
    "weights and biases of Conv1D": Case(
        "gpt2", Plan.dropping(tiny.DEPTH, [3]), {2: ("mlp.c_proj.weight", "mlp.c_proj.bias")}
    ),
    "the gain of a norm": Case(
        "gemma2", Plan.dropping(tiny.DEPTH, [3]), {2: ("mlp.down_proj.weight", "post_feedforward_layernorm.weight")}
    ),
    "a half-offset cut": Case("llama", HALF, {2: ("self_attn.o_proj.weight",), 4: ("mlp.down_proj.weight",)}),
    "attention and feed-forward sublayers": Case(
        "qwen2",
        cutting(tiny.DEPTH, layers=[5], attention=[2], ffn=[4], **BLOCKWISE),
        {1: ("mlp.down_proj.weight",), 4: ("self_attn.o_proj.weight",)},
    ),
    "zeroed": Case(
        "granite",
        cutting(tiny.DEPTH, attention=[2], ffn=[4], form="zeroed"),
        {1: ("mlp.down_proj.weight",), 4: ("self_attn.o_proj.weight",)},
    ),
    "stacked experts": Case("gpt_oss", Plan.dropping(tiny.DEPTH, [3]), transforms={2: "mlp"}),
    "single and shared experts": Case("deepseek_v3", Plan.dropping(tiny.DEPTH, [5]), transforms={4: "mlp"}),
    "a constant where a bias is": Case("gpt2", Plan.dropping(tiny.DEPTH, [3]), constants=((2, "ffn"),)),
    "a constant in new biases": Case("llama", Plan.dropping(tiny.DEPTH, [3]), constants=((2, "ffn"),)),
    "constants beside missing sublayers": Case(
        "llama", cutting(tiny.DEPTH, attention=[2], ffn=[4], **BLOCKWISE), constants=((1, "ffn"), (4, "attention"))
    ),
    "low-rank maps": Case(
        "mistral", cutting(tiny.DEPTH, attention=[2], ffn=[4], **BLOCKWISE), maps=((1, "ffn"), (4, "attention"))
    ),
}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_written_checkpoint_is_the_pruned_source(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = Checkpoint.open(tiny.save_tiny(case.model_type, tmp_path / "source"))
    model = load_model(source.path, device="cpu")
    edits = case.edits(model)
    patch = place(source, case.plan, Solved(edits, Losses(), "fold"), None)
    out = export(source, case.plan, tmp_path / "out", patch)
    check_load(out)
    tokens = probe_tokens(tiny.VOCAB)
    written = logits_of(load_model(out, device="cpu"), tokens)
    loaded, streamed = Walk.in_memory(model), Walk.out_of_core(source, device="cpu")
    bare = pruned_logits(loaded, tokens, case.plan)
    for walk in (loaded, streamed):
        assert apart(written, pruned_logits(walk, tokens, case.plan, edits)) < 1e-5
    assert apart(written, bare) > 1e-3, "the edits do nothing"
    assert torch.equal(pruned_logits(loaded, tokens, case.plan), bare), "an edit was left behind"
    if not case.plan.below_layers:
        config = patch.configured(sliced_config(source, case.plan))
        with shortened(model, case.plan, config, edits):
            assert apart(logits_of(model, tokens), written) < 1e-5
        assert torch.equal(pruned_logits(loaded, tokens, case.plan), bare)


def test_tensors_are_written_on_the_cpu_in_the_dtype_of_the_output(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny.save_tiny("llama", tmp_path / "source"))
    plan = Plan.dropping(tiny.DEPTH, [3])
    weight = torch.randn(64, 96, dtype=torch.float64, requires_grad=True)
    edits = {2: LayerEdit({"mlp.down_proj.weight": weight}, behind={"ffn": Replacement(torch.ones(64))})}
    patch = place(source, plan, Solved(edits, Losses(), "fold"), None, "BF16")
    assert patch.added and patch.config == {"mlp_bias": True}
    for key, tensor in changed(source, plan, patch).items():
        assert tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu", key
        assert tensor.is_contiguous() and not tensor.requires_grad
    assert torch.equal(patch.replaced["model.layers.2.mlp.down_proj.weight"].make(), weight.detach().bfloat16())


def test_a_constant_goes_into_a_bias_that_is_there(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny.save_tiny("gpt2", tmp_path / "source"))
    edits = {2: LayerEdit(behind={"ffn": Replacement(torch.ones(WIDTH))})}
    patch = place(source, Plan.dropping(tiny.DEPTH, [3]), Solved(edits, Losses(), "bias"), None)
    assert list(patch.replaced) == ["transformer.h.2.mlp.c_proj.bias"] and not patch.added


def test_the_record_is_what_was_solved(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny.save_tiny("llama", tmp_path / "source"))
    report = (SolvedMatrix(2, "mlp.down_proj", "direct", 0.1, 0.5),)
    edits = {2: LayerEdit({"mlp.down_proj.weight": torch.zeros(64, 96)})}
    losses = Losses(2.00000049, 3.0, 2.5)
    solved = Solved(edits, losses, "fold", "resolve", report=report, held_out=(8,), precision="float32")
    record = place(source, Plan.dropping(tiny.DEPTH, [3]), solved, TextRecord("a.txt", 16, 64)).record
    assert record is not None
    assert record.text == TextRecord("a.txt", 16, 64, held_out=(8,))
    assert record.loss == Losses(2.0, 3.0, 2.5) and record.loss.falls
    assert record.tensors == ("model.layers.2.mlp.down_proj.weight",) and record.solved == report
    assert (record.method, record.solver, record.precision) == ("fold", "resolve", "float32")


def test_nothing_changes_nothing() -> None:
    config = {"num_hidden_layers": 3, "block_configs": [{}]}
    assert NONE.configured(config) == config and not NONE.edits and NONE.record is None


def test_whether_the_checkpoint_holds_a_module(tmp_path: Path) -> None:
    """By name and shape; experts by the names of theirs."""
    source = Checkpoint.open(tiny.save_tiny("mixtral", tmp_path / "source"))
    layer = decoder_layers(load_model(source.path, device="cpu"))[2]
    held = holds(source)
    assert held(2, "self_attn.o_proj", layer.self_attn.o_proj)
    assert not held(2, "self_attn.o_proj", nn.Linear(3, 3)) and not held(9, "self_attn.o_proj", nn.Linear(64, 64))
    experts = next(n for n, m in layer.named_modules() if hasattr(m, "experts"))
    assert held(2, experts, layer.get_submodule(experts)) == any(
        f"layers.2.{experts}.experts" in key for key in source.tensors
    )


def test_the_form_that_holds_a_repair(tmp_path: Path) -> None:
    plan = Plan.dropping(tiny.DEPTH, [2, 3])
    llama, gpt2, gemma = (Checkpoint.open(tiny.save_tiny(name, tmp_path / name)) for name in ("llama", "gpt2", "gemma"))
    for checkpoint in (llama, gpt2, gemma):
        assert form_for(checkpoint, plan, "fold") == form_for(checkpoint, plan, None) == plan
    assert form_for(llama, plan, "bias") == plan and form_for(gpt2, plan, "bias") == plan
    assert form_for(llama, plan, "linear", 8).form == "blockwise"
    for method, rank in (("bias", None), ("linear", 8)):
        with pytest.raises(ArchitectureError, match="no place"):
            form_for(gemma, plan, method, rank)
    for rank in (0, 65, None):
        with pytest.raises(UsageError, match="width, 64"):
            form_for(llama, plan, "linear", rank)
