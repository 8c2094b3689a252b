"""Replacements of removed sublayers: exact where they can be; training lowers the loss and moves nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuts import cutting, export

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError, UsageError
from slicer.heal.compensate.linear import ReplacementTraining, linear, rate, train
from slicer.heal.compensate.regression import split
from slicer.heal.patch import Solved, place
from slicer.model.layers import decoder_layers, logits_of
from slicer.model.load import load_model
from slicer.model.pruned import pruned, pruned_logits
from slicer.model.verify import probe_tokens
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import Losses

PLAN = cutting(tiny.DEPTH, layers=[5], attention=[2], ffn=[4])
STEPS = 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model("llama")


def batches(samples: int = 32, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(tiny.VOCAB, (samples, length), generator=generator).split(4))


@pytest.fixture(scope="module")
def few() -> list[torch.Tensor]:
    return batches(24, 24)


@pytest.mark.parametrize(("method", "rank"), [("bias", None), ("linear", 8)])
@pytest.mark.parametrize("plan", [
    {"attention": [1, 4]}, {"ffn": [0, 3]}, {"layers": [5], "attention": [2], "ffn": [4]}, {"layers": [2, 3]},
])  # fmt: skip
def test_every_gap_is_filled_behind_the_sublayer_before_it(
    model: Any, plan: dict[str, list[int]], method: str, rank: int | None
) -> None:
    cut = cutting(tiny.DEPTH, **plan)
    solved = linear(Walk.in_memory(model), batches(), cut, method, rank)
    anchors = {(i - 1, "ffn") for i in (*plan.get("attention", ()), *plan.get("layers", ())[:1])}
    anchors |= {(i, "attention") for i in plan.get("ffn", ())}
    assert {(i, name) for i, edit in solved.edits.items() for name in edit.behind} <= anchors
    assert {(e.layer, e.module) for e in solved.report} <= anchors and solved.report
    assert all(e.way == method and e.error_left is not None and e.error_left < 1 for e in solved.report)
    for edit in solved.edits.values():
        for found in edit.behind.values():
            assert (None if found.down is None else found.down.shape) == (rank and (rank, 64))


def test_losses_are_those_of_the_models(model: Any, few: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    solved = linear(walk, few, PLAN, "linear", 4)
    trained = train(walk, few, PLAN, solved, 4)
    held = torch.cat(few)[list(solved.held_out)]

    def loss(edits: Any, plan: Plan | None = PLAN) -> float:
        logits = pruned_logits(walk, held, plan, edits)[:, :-1].log_softmax(-1)
        return -float(logits.gather(-1, held[:, 1:, None]).mean())

    figures = [loss({}, None), loss({}), loss(solved.edits)]
    assert [solved.losses.source, solved.losses.before, solved.losses.after] == pytest.approx(figures, rel=1e-5)
    assert trained.losses.solved == solved.losses.after
    assert trained.losses.after == pytest.approx(loss(trained.edits), rel=1e-5)


def test_a_streamed_model_gets_the_same_maps(model: Any, few: list[torch.Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = linear(Walk.in_memory(model), few, PLAN, "linear", 4)
    streamed = linear(Walk.out_of_core(tmp_path, device="cpu"), few, PLAN, "linear", 4)
    assert streamed.report == loaded.report and vars(streamed.losses) == pytest.approx(vars(loaded.losses))
    with pytest.raises(HealError, match="in memory"):
        train(Walk.out_of_core(tmp_path, device="cpu"), few, PLAN, streamed, 4)


def test_a_sublayer_that_adds_a_constant_is_replaced_exactly(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", attention_bias=True, mlp_bias=True)
    layer = decoder_layers(model)[3]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.self_attn.o_proj.bias.data.normal_()
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    plan = cutting(tiny.DEPTH, attention=[3], form="blockwise")
    solved = linear(Walk.in_memory(model), batches(), plan, "bias")
    out = export(source, plan, tmp_path / "out", place(source, plan, solved, None))
    tokens = probe_tokens(tiny.VOCAB)
    wanted, result = logits_of(model, tokens), logits_of(load_model(out, device="cpu"), tokens)
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert solved.losses.after == pytest.approx(solved.losses.source, abs=1e-4)


@pytest.mark.parametrize(("rank", "method"), [(0, "linear"), (65, "linear"), (None, "linear"), (4, "magic")])
def test_ranks_and_methods_that_make_no_sense(model: Any, rank: int | None, method: str) -> None:
    with pytest.raises(UsageError):
        linear(Walk.in_memory(model), batches(), Plan.dropping(tiny.DEPTH, [3]), method, rank)


def test_where_nothing_can_be_solved(model: Any) -> None:
    walk = Walk.in_memory(model)
    with pytest.raises(HealError, match="before the attention of layer 0"):
        linear(walk, batches(), Plan.dropping(tiny.DEPTH, [0, 1]), "bias")
    with pytest.raises(HealError, match="too few"):
        linear(walk, batches(1), Plan.dropping(tiny.DEPTH, [3]), "bias")


def tensors(solved: Solved) -> dict[str, torch.Tensor]:
    named = {
        f"{sublayer} {i} {name}": getattr(found, name)
        for i, edit in solved.edits.items()
        for sublayer, found in edit.behind.items()
        for name in ("bias", "gain", "down", "up")
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize(("method", "rank"), [("bias", None), ("linear", 4)])
def test_training_lowers_the_objective_and_moves_nothing_else(
    model: Any, few: list[torch.Tensor], method: str, rank: int | None
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = Walk.in_memory(model)
    solved = linear(walk, few, PLAN, method, rank)
    trained = train(walk, few, PLAN, solved, STEPS)
    assert 0 < trained.best_step <= STEPS and trained.steps == STEPS
    judge, losses = ReplacementTraining(walk, split(few), PLAN, solved.edits), []
    for found in (solved, trained):
        with judge.pruned.prepared(found.edits):
            losses.append(judge.judge())
    assert losses[1] < losses[0]
    for name, tensor in tensors(trained).items():
        moved = not torch.equal(tensor, tensors(solved)[name])
        assert moved == (not name.endswith("gain")) and not tensor.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_seed_gives_the_same_bytes(model: Any, few: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    solved = linear(walk, few, PLAN, "linear", 4)
    one, same, other = (tensors(train(walk, few, PLAN, solved, 8, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_is_that_of_finite_differences(model: Any, few: list[torch.Tensor]) -> None:
    """Of the gradient behind the last layer times the states there: what the objective gives is tested with it."""
    walk = Walk.in_memory(copy.deepcopy(model).double())
    training = ReplacementTraining(walk, split(few), PLAN, linear(walk, few, PLAN, "linear", 2).edits)
    leaf = next(iter(next(iter(training.leaves.values())).behind.values()))
    run, b = training.pruned, training.pruned.held[0]
    assert leaf.up is not None
    with run.prepared(training.leaves):
        slope = training.backward(b)
        values = []
        for change in (1e-3, -1e-3):
            with torch.no_grad():
                leaf.up[3, 1] += change
                values.append(float((slope * run.run(b)).sum()) / slope[..., 0].numel())
                leaf.up[3, 1] -= change
    assert leaf.up.grad is not None
    assert float(leaf.up.grad[3, 1]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate(step, 50) for step in range(1, 51)]
    assert max(rates) == rates[4] == 1 and rates[-1] < 0.01
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rate(1, 1) == 1


def test_hooks_are_gone_after_training(model: Any, few: list[torch.Tensor]) -> None:
    """Also where it trains nothing."""
    walk = Walk.in_memory(model)
    wanted = logits_of(model, probe_tokens(tiny.VOCAB))
    nothing = train(walk, few, PLAN, Solved({}, Losses(1.0, 2.0, 2.0), "bias"), 4)
    assert nothing.losses.after == nothing.losses.solved == 2.0 and not nothing.edits
    solved = train(walk, few, PLAN, linear(walk, few, PLAN, "bias"), 2)
    with pruned(model, PLAN, solved.edits):
        pass
    assert torch.equal(logits_of(model, probe_tokens(tiny.VOCAB)), wanted)
