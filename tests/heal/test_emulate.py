"""What stands for removed parts: exact where it can be, and written as it was solved."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.export import write_checkpoint
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, HealError, UsageError
from slicer.heal.carry import carry, form_for
from slicer.heal.emulate import emulate
from slicer.heal.emulation import Emulated, emulated
from slicer.model.layers import decoder_layers, logits_of
from slicer.model.load import load_model
from slicer.model.verify import check_load, probe_tokens
from slicer.model.walk import Walk
from slicer.plan.plan import Plan


def batches(samples: int = 32, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(tiny.VOCAB, (samples, length), generator=generator).split(4))


def written(source: Path, plan: Plan, method: str, found: Emulated, out: Path) -> Path:
    checkpoint = Checkpoint.open(source)
    standing = carry(checkpoint, plan, sliced_config(checkpoint, plan), found)
    out.mkdir()
    write_checkpoint(
        checkpoint, plan, standing.config, out, replaced=dict(standing.replaced), added=standing.added
    )
    check_load(out)
    return out


PLANS = {
    "attention": {"attention": [1, 4]},
    "ffn": {"ffn": [0, 3]},
    "both": {"layers": [5], "attention": [2], "ffn": [4]},
    "layers": {"layers": [2, 3]},
}


@pytest.mark.parametrize("method", ["bias", "linear", "fold"])
@pytest.mark.parametrize(("model_type", "plan"), [("llama", "both"), ("llama", "layers"), ("mistral", "attention"),
                                                  ("qwen2", "ffn"), ("qwen2", "both")])  # fmt: skip
def test_what_is_written_is_what_was_solved(model_type: str, plan: str, method: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(model_type, tmp_path / "source")
    missing = plan != "layers"
    cut = Plan.cutting(tiny.DEPTH, **PLANS[plan], form="blockwise" if missing else "native")
    cut = form_for(Checkpoint.open(source), cut, method)
    assert cut.form == ("blockwise" if missing or method == "linear" else "native")
    model = load_model(source, device="cpu")
    found = emulate(Walk.in_memory(model), batches(), cut, method, 8 if method == "linear" else None)
    assert found.by_anchor
    out = written(source, cut, method, found, tmp_path / "out")
    tokens = probe_tokens(tiny.VOCAB)
    with emulated(model, cut, found):
        wanted = logits_of(model, tokens)
    result = logits_of(load_model(out, device="cpu"), tokens)
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_part_that_adds_a_constant_is_emulated_exactly(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", attention_bias=True, mlp_bias=True)
    layer = decoder_layers(model)[3]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.self_attn.o_proj.bias.data.normal_()
    model.save_pretrained(tmp_path / "source")
    plan = Plan.cutting(tiny.DEPTH, attention=[3], form="blockwise")
    found = emulate(Walk.in_memory(model), batches(), plan, "bias")
    out = written(tmp_path / "source", plan, "bias", found, tmp_path / "out")
    tokens = probe_tokens(tiny.VOCAB)
    wanted, result = logits_of(model, tokens), logits_of(load_model(out, device="cpu"), tokens)
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert found.losses["emulated"] == pytest.approx(found.losses["source"], abs=1e-4)


def test_a_higher_rank_leaves_no_larger_error_on_what_it_is_fitted_to() -> None:
    from slicer.heal.emulate import reduced_rank
    from slicer.heal.least_squares import NormalEquations, solve

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 12, generator=generator)
    z[:, -1] = 1
    truth = torch.randn(10, 12, generator=generator)
    r = z @ truth.T + 0.1 * torch.randn(400, 10, generator=generator)
    equations = NormalEquations(12, 10)
    equations.add(z[:300], r[:300])
    equations.add(z[300:], r[300:], held_out=True)
    solution = solve(equations)
    assert solution is not None
    errors = []
    for rank in (1, 3, 6, 10):
        down, up, c = reduced_rank(solution, equations, rank)
        assert torch.linalg.matrix_rank(up @ down) == rank
        errors.append(equations.error(torch.cat([up @ down, c[:, None]], 1)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(equations.error(solution.delta), rel=1e-6)


def test_a_bias_goes_where_the_architecture_has_one(tmp_path: Path) -> None:
    source = tiny.save_tiny("gpt2", tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    plan = form_for(checkpoint, Plan.dropping(tiny.DEPTH, [2, 3]), "bias")
    assert plan.form == "native"
    model = load_model(source, device="cpu")
    found = emulate(Walk.in_memory(model), batches(), plan, "bias")
    standing = carry(checkpoint, plan, sliced_config(checkpoint, plan), found)
    assert list(standing.replaced) == ["transformer.h.1.mlp.c_proj.bias"] and not standing.added
    out = written(source, plan, "bias", found, tmp_path / "out")
    with emulated(model, plan, found):
        wanted = logits_of(model, probe_tokens(tiny.VOCAB))
    result = logits_of(load_model(out, device="cpu"), probe_tokens(tiny.VOCAB))
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(("rank", "method"), [(0, "linear"), (65, "linear"), (None, "linear"), (4, "magic")])
def test_ranks_and_methods_that_make_no_sense(rank: int | None, method: str) -> None:
    walk = Walk.in_memory(tiny.tiny_model("llama"))
    with pytest.raises(UsageError):
        emulate(walk, batches(), Plan.dropping(tiny.DEPTH, [3]), method, rank)


def test_where_nothing_can_stand(tmp_path: Path) -> None:
    walk = Walk.in_memory(tiny.tiny_model("llama"))
    with pytest.raises(HealError, match="nothing stands before"):
        emulate(walk, batches(), Plan.dropping(tiny.DEPTH, [0, 1]), "bias")
    with pytest.raises(HealError, match="too few"):
        emulate(walk, batches(1), Plan.dropping(tiny.DEPTH, [3]), "bias")
    gemma = Checkpoint.open(tiny.save_tiny("gemma", tmp_path / "gemma"))
    with pytest.raises(ArchitectureError, match="no place"):
        form_for(gemma, Plan.dropping(tiny.DEPTH, [3]), "bias")
