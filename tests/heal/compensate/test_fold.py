"""The fold on tiny models of the real classes, and on the embedded one, which has learned something to lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuts import cutting, export
from torch import nn
from torch.nn.functional import kl_div

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, HealError
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.gaps import Gap, gaps_of
from slicer.heal.compensate.linear import linear
from slicer.heal.compensate.regression import SINKS, NormalEquations
from slicer.heal.patch import Solved, holds, place
from slicer.model import verify
from slicer.model.layers import logits_of
from slicer.model.load import load_model
from slicer.model.pruned import Edits, pruned, pruned_logits
from slicer.model.walk import Walk
from slicer.plan.plan import Plan

DEPTH = 12
HALF = Plan(DEPTH, (0, 1, 2, 3, 4, 7, 8, 9, 10, 11), joined=((4, 6),))
PLANS = {
    "attention": cutting(DEPTH, attention=[5, 6], form="blockwise"),
    "both": cutting(DEPTH, layers=[8], attention=[4], ffn=[6], form="blockwise"),
    "half": HALF,
}


def anything(i: int, name: str, module: nn.Module) -> bool:
    return True


def random_batches(sequences: int = 32, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(3, 140, (sequences, length), generator=generator).split(4))


@pytest.fixture(scope="module")
def text(held_out_ids: list[int]) -> list[torch.Tensor]:
    """int64 batches of 4 x 128: text that the embedded model was not trained on."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    return list(torch.tensor(held_out_ids[: 96 * 128]).view(-1, 128)[order].split(4))


def mean_loss(model: Any, batches: list[torch.Tensor]) -> float:
    with torch.inference_mode():
        return sum(float(model(input_ids=b, labels=b).loss) for b in batches) / len(batches)


def loss_of(model: Any, plan: Plan, edits: Edits, batches: list[torch.Tensor]) -> float:
    with pruned(model, plan, edits):
        return mean_loss(model, batches)


@torch.no_grad()
def distance_of(model: Any, plan: Plan, edits: Edits, batches: list[torch.Tensor]) -> float:
    """KL from the source, nats a token."""
    source = [logits_of(model, batch).log_softmax(-1) for batch in batches]
    with pruned(model, plan, edits):
        cut = [logits_of(model, batch).log_softmax(-1) for batch in batches]
    each = (kl_div(q, p, reduction="none", log_target=True).sum(-1).mean() for p, q in zip(source, cut, strict=True))
    return float(sum(each, torch.zeros(())) / len(batches))


def dropping(*layers: int) -> Plan:
    return Plan.dropping(DEPTH, layers)


def changed(solved: Solved) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t for i, edit in solved.edits.items() for name, t in edit.parameters.items()}


def test_neighbouring_sublayers_make_a_gap() -> None:
    """A block of n whole layers is a gap of 2n sublayers; a half-offset cut is one from attention to attention."""
    assert gaps_of(dropping(0, 1, 7)) == [Gap(0, 4), Gap(14, 16)]
    assert gaps_of(HALF) == [Gap(9, 13)]
    assert gaps_of(PLANS["both"]) == [Gap(8, 9), Gap(13, 14), Gap(16, 18)]
    whole, attention, ffn, start = Gap(14, 16), Gap(8, 9), Gap(13, 14), Gap(0, 4)
    assert (whole.layer, whole.sublayer, whole.behind, whole.within) == (6, "ffn", 8, False)
    assert (attention.layer, attention.sublayer, attention.behind, attention.within) == (3, "ffn", 4, True)
    assert (ffn.layer, ffn.sublayer, ffn.behind, ffn.within) == (6, "attention", 7, False)
    assert start.layer == -1 and start.behind == 2


def test_it_comes_closer_to_the_source_on_text_it_never_saw_and_beats_transform(
    model: Any, text: list[torch.Tensor]
) -> None:
    calibration, unseen, plan = text[:18], text[18:], dropping(4, 5, 6)
    found = {"bare": distance_of(model, plan, {}, unseen)}
    for solver in ("transform", "resolve"):
        solved = fold(Walk.in_memory(model), calibration, plan, holds=anything, solver=solver)
        assert 3 in solved.edits and not set(solved.edits) & set(plan.dropped)
        assert solver == "resolve" or set(solved.edits) == {3}
        found[solver] = distance_of(model, plan, solved.edits, unseen)
    assert found["resolve"] < min(found["transform"], 0.85 * found["bare"])


@pytest.mark.parametrize("name", PLANS)
def test_sublayers_come_closer_to_the_source_on_text_they_never_saw(
    name: str, model: Any, text: list[torch.Tensor]
) -> None:
    """Closer than the best constants bring it; what is removed stays as it is."""
    calibration, unseen, plan = text[:18], text[18:], PLANS[name]
    walk = Walk.in_memory(model)
    solved, constants = fold(walk, calibration, plan, holds=anything), linear(walk, calibration, plan, "bias")
    for i, edit in solved.edits.items():
        names = [part for part in edit.parameters if part.startswith("self_attn" if i in plan.gone[0] else "-")]
        names += [part for part in edit.parameters if part.startswith("mlp" if i in plan.gone[1] else "-")]
        assert not names
    assert len([e for e in solved.report if e.way == "newton"]) > 2
    found, *others = (distance_of(model, plan, edits, unseen) for edits in (solved.edits, constants.edits, {}))
    assert found < min(others) - 0.005


@pytest.mark.parametrize("plan", [dropping(5), HALF, PLANS["both"]], ids=["whole", "half", "both"])
@pytest.mark.parametrize("solver", ["resolve", "transform"])
def test_the_losses_are_those_of_the_models(plan: Plan, solver: str, model: Any, text: list[torch.Tensor]) -> None:
    batches = text[:4]
    solved = fold(Walk.in_memory(model), batches, plan, holds=anything, solver=solver)
    held = [torch.cat(batches)[8:9]]
    assert solved.held_out == (8,)
    assert solved.losses.source == pytest.approx(mean_loss(model, held), rel=1e-4)
    assert solved.losses.before == pytest.approx(loss_of(model, plan, {}, held), rel=1e-4)
    assert solved.losses.after == pytest.approx(loss_of(model, plan, solved.edits, held), rel=1e-4)


def test_the_model_is_as_before_afterwards(model: Any, text: list[torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = pruned_logits(Walk.in_memory(model), text[0])
    for plan in (dropping(5), PLANS["both"]):
        solved = fold(Walk.in_memory(model), text[:2], plan, holds=anything)
        with pruned(model, plan, solved.edits):
            pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(pruned_logits(Walk.in_memory(model), text[0]), wanted), "a hook was left behind"


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_layer_that_adds_a_constant_is_hardly_missed(model_type: str) -> None:
    """Its constant moves into the bias of the layer before (stored [f, d] in GPT-2, [d, f] in OPT)."""
    model = tiny.tiny_model(model_type).requires_grad_(False)
    layer = dict(model.named_modules())["transformer.h.4" if model_type == "gpt2" else "model.decoder.layers.4"]
    for name, parameter in layer.named_parameters():
        if name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight", "out_proj.weight", "fc2.weight")):
            parameter.data.zero_()
    batches, plan, walk = random_batches(), Plan.dropping(tiny.DEPTH, [4]), Walk.in_memory(model)
    edits = fold(walk, batches, plan, holds=anything, solver="transform").edits
    whole, bare, mended = (pruned_logits(walk, batches[0], *given) for given in ((), (plan,), (plan, edits)))
    assert (mended - whole).abs().max() < 0.2 * (bare - whole).abs().max()


def test_a_cut_at_the_start_is_healed_behind_it(model: Any, text: list[torch.Tensor]) -> None:
    for plan, first in ((dropping(0, 1), 2), (cutting(DEPTH, attention=[0], form="zeroed"), 0)):
        solved = fold(Walk.in_memory(model), text[:12], plan, holds=anything)
        assert min(solved.edits) >= first and solved.losses.falls
        assert loss_of(model, plan, solved.edits, text[18:]) < loss_of(model, plan, {}, text[18:])


@pytest.mark.parametrize(
    ("plans", "layers"),
    [
        ((dropping(2, 7), dropping(2), dropping(7)), (1, 6)),
        (
            (
                cutting(DEPTH, attention=[2, 7], form="zeroed"),
                cutting(DEPTH, attention=[2], form="zeroed"),
                cutting(DEPTH, attention=[7], form="zeroed"),
            ),
            (1, 6),
        ),
    ],
    ids=["layers", "attention"],
)
def test_gaps_are_healed_in_order_each_on_the_healed_model(
    plans: tuple[Plan, ...], layers: tuple[int, int], model: Any, text: list[torch.Tensor]
) -> None:
    both, first, second = (
        fold(Walk.in_memory(model), text[:6], plan, holds=anything, solver="transform").edits for plan in plans
    )
    assert tuple(both) == layers
    name = "mlp.down_proj.weight"
    one, other = layers
    assert torch.equal(both[one].parameters[name], first[one].parameters[name])
    assert not torch.equal(both[other].parameters[name], second[other].parameters[name])


def test_the_first_positions_take_no_part(
    model: Any, text: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    honest = NormalEquations.add

    def counting(self: NormalEquations, features: torch.Tensor, *rest: Any, **more: Any) -> None:
        rows.append(len(features))
        honest(self, features, *rest, **more)

    monkeypatch.setattr(NormalEquations, "add", counting)
    fold(Walk.in_memory(model), text[:2], dropping(5), holds=anything, solver="transform")
    assert set(rows) == {128 - SINKS}


def test_what_cannot_be_healed_says_why(model: Any, text: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    with pytest.raises(HealError, match="few"):
        fold(walk, [text[0][:2]], dropping(5), holds=anything)
    with pytest.raises(HealError, match="next to the cut"):
        fold(walk, text[:2], dropping(0, 1), holds=anything, solver="transform")
    for plan in (dropping(5), HALF):
        with pytest.raises(HealError, match="next to the cut"):
            fold(walk, text[:2], plan, holds=lambda i, name, module: False)
    parallel = tiny.tiny_model("phi").requires_grad_(False)
    with pytest.raises(ArchitectureError, match="in parallel"):
        plan = cutting(tiny.DEPTH, attention=[3], form="zeroed")
        fold(Walk.in_memory(parallel), random_batches(), plan, holds=anything)


def test_what_the_checkpoint_does_not_hold_stays(model: Any, text: list[torch.Tensor]) -> None:
    held = fold(Walk.in_memory(model), text[:4], HALF, holds=lambda i, name, module: name.startswith("mlp"))
    assert {name.split(".")[1] for name in changed(held)} == {"mlp"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("solver", ["transform", "resolve"])
@pytest.mark.parametrize("plan", [dropping(5), HALF, PLANS["both"]], ids=["whole", "half", "both"])
def test_a_model_streamed_from_disk_gets_the_same_fold(
    plan: Plan, solver: str, dtype: str, text: list[torch.Tensor]
) -> None:
    """Solutions, judgements and second-order steps, with states and factors in memory or in files."""
    loaded = Walk.in_memory(load_model(DEMO, dtype=dtype, device="cpu"))
    streamed = Walk.out_of_core(DEMO, dtype=dtype, device="cpu", memory=1)
    one, other = (
        fold(walk, text[:3], plan, holds=anything, solver=solver, written=torch.bfloat16) for walk in (loaded, streamed)
    )
    weights, others = changed(one), changed(other)
    assert weights.keys() == others.keys() and one.losses == other.losses and one.report == other.report
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert solver == "transform" or "newton" in {entry.way for entry in one.report}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "olmoe"])
def test_a_tiny_model_streamed_from_disk_gets_the_same_fold(model_type: str, tmp_path: Path) -> None:
    path = tiny.save_tiny(model_type, tmp_path / "source")
    plan, batches = plan_of("whole"), random_batches()
    walks = [Walk.in_memory(load_model(path, device="cpu")), Walk.out_of_core(path, device="cpu")]
    one, other = (fold(walk, batches, plan, holds=anything) for walk in walks)
    weights, others = changed(one), changed(other)
    assert weights.keys() == others.keys() and one.losses == other.losses
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


ARCHITECTURES = [
    *("llama", "granite", "phi", "gpt2", "gpt_bigcode", "opt", "falcon"),  # direct
    *("gemma2", "gemma3", "olmo2", "glm4"),  # a norm follows
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe", "dbrx"),
    *("olmoe", "lfm2_moe", "granitemoehybrid", "bamba", "nemotron_h"),
]
WITHOUT_GAIN = {("mixtral", "transform")}  # no map of its experts' sum lowers the held-out error on random tokens
# (model, plan): half-offset cuts, and single sublayers, where norms follow the maps and where experts are.
BELOW = [
    *(("gemma2", "half"), ("olmo2", "half"), ("glm4", "ffn"), ("gemma3", "attention")),
    *(("olmoe", "half"), ("deepseek_v3", "ffn"), ("gpt_oss", "attention"), ("falcon", "ffn")),
]


def plan_of(name: str) -> Plan:
    if name == "half":
        return Plan(tiny.DEPTH, (0, 1, 2, 3, 6), joined=((3, 5),))
    if name == "whole":
        return Plan.dropping(tiny.DEPTH, [4, 5])
    return cutting(tiny.DEPTH, **{name: [4]}, form="zeroed")


@pytest.mark.parametrize(
    ("model_type", "name", "solver"),
    [
        *((model_type, "whole", solver) for model_type in ARCHITECTURES for solver in ("resolve", "transform")),
        *((model_type, name, "resolve") for model_type, name in BELOW),
    ],
)
def test_what_is_written_is_the_source_with_the_new_weights(
    model_type: str, name: str, solver: str, tmp_path: Path
) -> None:
    """Experts on disk have names and shapes of their own; their sum must come out as solved."""
    source = Checkpoint.open(tiny.save_tiny(model_type, tmp_path / "source"))
    model, plan = load_model(source.path, device="cpu"), plan_of(name)
    walk, batches = Walk.in_memory(model), random_batches(64, 40)
    if (model_type, solver) in WITHOUT_GAIN:
        with pytest.raises(HealError, match="next to the cut"):
            fold(walk, batches, plan, holds=holds(source), solver=solver)
        return
    solved = fold(walk, batches, plan, holds=holds(source), solver=solver)
    tokens = verify.probe_tokens(tiny.VOCAB)
    reference, bare = (pruned_logits(walk, tokens, plan, edits) for edits in (solved.edits, {}))
    assert (reference - bare).abs().max() > 1e-3 * bare.abs().max()
    out = export(source, plan, tmp_path / "out", place(source, plan, solved, None))
    verify.check_load(out)
    written = logits_of(load_model(out, device="cpu"), tokens)
    assert verify.compare_logits(written, reference) < 1e-4
