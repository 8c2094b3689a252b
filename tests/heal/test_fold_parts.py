"""A fold below the layer: what it says is what the written model is, and what is gone stays gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slicer import demo
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.export import write_checkpoint
from slicer.checkpoint.reader import Checkpoint
from slicer.heal.carry import carry
from slicer.heal.cut import Cut
from slicer.heal.emulate import emulate
from slicer.heal.emulation import Emulated, emulated
from slicer.heal.fold_parts import fold_parts
from slicer.heal.held import split
from slicer.model.layers import logits_of
from slicer.model.load import load_model
from slicer.model.verify import probe_tokens
from slicer.model.walk import Walk
from slicer.plan.plan import Plan

DEPTH = 12
PLANS = {
    "attention": Plan.cutting(DEPTH, attention=[5, 6], form="blockwise"),
    "both": Plan.cutting(DEPTH, layers=[8], attention=[4], ffn=[6], form="blockwise"),
    "half": Plan(DEPTH, (0, 1, 2, 3, 4, 7, 8, 9, 10, 11), joined=((4, 6),)),
}


@pytest.fixture(scope="module")
def batches(held_out_ids: list[int]) -> list[torch.Tensor]:
    """int64 batches of 4 x 96."""
    return list(torch.tensor(held_out_ids[: 20 * 96]).view(-1, 96).split(4))


@pytest.mark.parametrize("name", PLANS)
def test_steps_win_and_are_written(
    name: str, model: Any, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    plan, walk = PLANS[name], Walk.in_memory(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = fold_parts(walk, batches, plan)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    stepped = {anchor for anchor, e in found.by_anchor.items() if e.change is not None}
    gone = {*(("attention", i) for i in plan.gone[0]), *(("ffn", i) for i in plan.gone[1])}
    assert len(stepped) > 2 and not stepped & gone
    assert found.losses["emulated"] < found.losses["cut"]
    assert found.losses["emulated"] < emulate(walk, batches, plan, "fold").losses["emulated"]
    checkpoint = Checkpoint.open(demo.path())
    standing = carry(checkpoint, plan, sliced_config(checkpoint, plan), found, "F32")
    out, dtype = tmp_path / "out", "float32"
    out.mkdir()
    write_checkpoint(checkpoint, plan, standing.config, out, dtype=dtype, replaced=dict(standing.replaced))
    tokens = probe_tokens(model.config.vocab_size)
    with emulated(model, plan, found):
        wanted = logits_of(model, tokens)
    result = logits_of(load_model(out, dtype=dtype, device="cpu"), tokens)
    assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_cut_is_the_model_with_those_parts_bypassed(model: Any, batches: list[torch.Tensor]) -> None:
    data, plan, nothing = split(batches), PLANS["both"], Emulated("fold", None)
    cut = Cut(Walk.in_memory(model), data, plan, 0)
    held = torch.cat([data.batches[b] for b in data.held])
    with emulated(model, plan, None), torch.no_grad():
        chances = model(held).logits[:, :-1].log_softmax(-1)
    assert cut.loss(nothing) == pytest.approx(-float(chances.gather(-1, held[:, 1:, None]).mean()), rel=1e-5)


def test_what_cannot_be_stored_takes_no_steps(model: Any, batches: list[torch.Tensor]) -> None:
    walk = Walk.in_memory(model)
    found = fold_parts(walk, batches, PLANS["half"], storable=lambda part, layer: part == "ffn")
    assert {part for (part, _), e in found.by_anchor.items() if e.change is not None} == {"ffn"}
