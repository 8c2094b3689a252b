"""A 16-bit model is folded in float32, as if it had been loaded so; new weights are judged as they are written."""

from __future__ import annotations

import pytest
import torch
from cuts import changed

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.heal.compensate.fold import fold
from slicer.heal.patch import holds, place, written_dtype
from slicer.model.load import load_model
from slicer.model.pruned import PrunedRun
from slicer.model.walk import Walk
from slicer.plan.plan import Plan

PLAN = Plan.dropping(12, [4, 5])


@pytest.fixture(scope="module")
def text(held_out_ids: list[int]) -> list[torch.Tensor]:
    return list(torch.tensor(held_out_ids[: 16 * 96]).view(-1, 96).split(2))


def test_a_16_bit_model_is_folded_as_in_float32(text: list[torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(DEMO)
    half, full = (load_model(DEMO, dtype=d, device="cpu") for d in ("bfloat16", "float32"))
    before = {name: p.data_ptr() for name, p in half.named_parameters()}
    found, expected = (
        fold(Walk.in_memory(m), text, PLAN, holds=holds(checkpoint), written=torch.bfloat16) for m in (half, full)
    )
    assert found.losses == expected.losses and found.precision == "float32"
    patches = [place(checkpoint, PLAN, solved, None, "BF16") for solved in (found, expected)]
    one, other = (changed(checkpoint, PLAN, patch) for patch in patches)
    assert one.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in one.items())
    assert {t.dtype for e in found.edits.values() for t in e.parameters.values()} == {torch.bfloat16}
    assert all(p.data_ptr() == before[name] for name, p in half.named_parameters())


def test_new_weights_are_judged_as_they_will_be_written(text: list[torch.Tensor]) -> None:
    checkpoint, model = Checkpoint.open(DEMO), load_model(DEMO, dtype="float32", device="cpu")
    walk, written = Walk.in_memory(model), written_dtype(checkpoint, "BF16")
    found = fold(walk, text, PLAN, holds=holds(checkpoint), written=written)
    spans = place(checkpoint, PLAN, found, None, "BF16").replaced
    for i, edit in found.edits.items():
        for name, tensor in edit.parameters.items():
            stored = spans[f"{checkpoint.layer_prefix}{i}.{name}"].make()
            assert stored.dtype == torch.bfloat16 and torch.equal(tensor, stored.float())
    sequences = list(torch.cat(text).split(1))
    run = PrunedRun.of_source(walk, PLAN, sequences, found.held_out, 0)
    assert found.losses.after == pytest.approx(run.losses([found.edits])[0], abs=1e-4)
