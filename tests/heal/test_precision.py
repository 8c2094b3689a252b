"""A 16-bit model is folded in float32, as if it had been loaded so."""

from __future__ import annotations

import pytest
import torch

from slicer import demo
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import TokenBatches
from slicer.heal.fold import losses
from slicer.heal.healing import fold_checkpoint
from slicer.model import load
from slicer.model.load import load_model
from slicer.model.walk import Walk
from slicer.runtime import memory


def test_a_16_bit_model_is_folded_as_in_float32(held_out_ids: list[int]) -> None:
    checkpoint = Checkpoint.open(demo.path())
    data = TokenBatches(list(torch.tensor(held_out_ids[: 16 * 96]).view(-1, 96).split(2)), {})
    half, full = (load_model(demo.path(), dtype=d, device="cpu") for d in ("bfloat16", "float32"))
    before = {name: p.data_ptr() for name, p in half.named_parameters()}
    found, expected = (
        fold_checkpoint(checkpoint, Walk.in_memory(m), data, [4, 5], cast="BF16") for m in (half, full)
    )
    assert found.record.loss == expected.record.loss
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(t, expected.tensors[key]) for key, t in found.tensors.items())
    assert {t.dtype for c in found.changes.values() for t in c.parameters.values()} == {torch.bfloat16}
    assert all(p.data_ptr() == before[name] for name, p in half.named_parameters())


def test_it_stays_as_it_is_without_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(demo.path(), dtype="bfloat16", device="cpu")
    with load.in_float32(model) as cast:
        assert cast and model.dtype == torch.float32
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with load.in_float32(model) as cast:
        assert not cast and model.dtype == torch.bfloat16


def test_new_weights_are_judged_as_they_will_be_written(held_out_ids: list[int]) -> None:
    checkpoint, model = Checkpoint.open(demo.path()), load_model(demo.path(), dtype="float32", device="cpu")
    text = list(torch.tensor(held_out_ids[: 16 * 96]).view(-1, 96).split(2))
    walk = Walk.in_memory(model)
    found = fold_checkpoint(checkpoint, walk, TokenBatches(text, {}), [4, 5], cast="BF16")
    for change in found.changes.values():
        for name, tensor in change.parameters.items():
            written = found.tensors[f"{checkpoint.layer_prefix}{change.layer}.{name}"]
            assert written.dtype == torch.bfloat16 and torch.equal(tensor, written.float())
    assert found.record.loss.after == pytest.approx(
        losses(walk, text, [4, 5], found.changes)["healed"], abs=1e-4
    )
