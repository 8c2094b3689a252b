"""What a teacher adds to the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sources
import tiny
import torch
from commands import slicer

from slicer.checkpoint.reader import Checkpoint
from slicer.data.corpus import CorpusSize, prepare
from slicer.data.sources import TextSpec
from slicer.errors import HealError
from slicer.heal.finetune.distillation import (
    DistillationLoss,
    Junction,
    LiveTeacher,
    TeacherOutputs,
    cache_teacher,
    junctions,
    kl_loss,
)
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.runtime.compute import Compute

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "whole")


def test_the_student_meets_the_teacher_behind_each_cut() -> None:
    assert junctions([4, 5]) == [Junction(4, 6)]
    assert junctions([1, 4, 5, 9]) == [Junction(1, 2), Junction(3, 6), Junction(6, 10)]


def test_equation_8_and_the_divergence_are_what_they_say(whole: Path) -> None:
    """Against both written out, for a student that is the source with two layers bypassed."""
    model = load_model(whole)
    tokens = torch.randint(258, (2, 16), generator=torch.Generator().manual_seed(0))
    index, learned = torch.arange(2), torch.ones(2, 15, dtype=torch.bool)
    learned[0, :5] = False
    teacher = LiveTeacher(model, [Junction(2, 4)], states=True, logits=True)
    outputs = teacher.outputs(tokens, index)
    with tiny.residual_stream(model) as tap, torch.no_grad():
        its = model(tokens).logits
    stream = tap[4]
    assert torch.equal(outputs.states[0], stream)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    distillation = DistillationLoss(teacher, [Junction(2, 4)], mismatch_weight=2.0, kl_weight=0.5)
    with bypass(model, [2, 3]):
        with tiny.residual_stream(model) as tap:
            model(tokens)
        mine = tap[4]
        with distillation.recording(model):  # x(2) of the student, which is x(4) of the source with these bypassed
            logits = model(tokens).logits
    loss = distillation.loss(logits, tokens, index, learned)
    mismatch = ((mine - stream).square().sum(-1) / stream.square().sum(-1)).mean()
    p, q = its[:, :-1].softmax(-1), logits[:, :-1].softmax(-1)
    kl = ((p * (p / q).log()).sum(-1))[learned].mean()
    assert torch.allclose(loss, 2 * mismatch + 0.5 * kl, rtol=1e-4)
    loss.backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    assert float(kl_loss(its, TeacherOutputs([], logits=its), learned)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("memory", [None, 1])
def test_asked_beforehand_it_says_the_same(whole: Path, tmp_path: Path, memory: int | None) -> None:
    """Of a vocabulary of 258 the 64 likeliest tokens and the rest: a little less than the whole divergence."""
    text = sources.save_text(tmp_path / "t.jsonl", 60)
    size = CorpusSize(steps=4, batch_size=2, seq_len=16, validation_samples=2)
    source, cache = Checkpoint.open(whole), tmp_path / "cache"
    train = prepare(TextSpec(source=str(text)), size, source, tmp_path / "corpus").train
    at = [Junction(2, 4), Junction(3, 6)]
    both: dict[str, Any] = {"states": True, "logits": True}
    cached = cache_teacher(source, train, at, cache, Compute("cpu", memory=memory), **both)
    batch = [train[i] for i in (1, 3)]
    tokens = torch.stack([row["input_ids"] for row in batch])
    index = torch.stack([row["index"] for row in batch])
    live = LiveTeacher(load_model(whole), at, **both).outputs(tokens, index)
    found = cached.outputs(tokens, index)
    for a, b in zip(found.states, live.states, strict=True):
        assert torch.allclose(a.float(), b, rtol=1e-2, atol=1e-2)
    learned = torch.ones(2, 15, dtype=torch.bool)
    student = torch.randn(2, 16, 258, generator=torch.Generator().manual_seed(0))
    full, part = kl_loss(student, live, learned), kl_loss(student, found, learned)
    assert 0 < part <= full * 1.01 and part > 0.7 * full
    kept = [file.clone() for file in cached.files]
    again = cache_teacher(source, train, at, cache, Compute("cpu"), **both)
    assert all(torch.equal(a, b) for a, b in zip(kept, again.files, strict=True))
    # What is missing is computed again; outputs for other cuts, or of another kind, are not taken for these.
    (cache / "stream-6").unlink()
    again = cache_teacher(source, train, at, cache, Compute("cpu"), **both)
    assert all(torch.equal(a, b) for a, b in zip(kept, again.files, strict=True))
    for places, dtype, kind in ((at[:1], None, both), (at, None, {**both, "logits": False}), (at, "bfloat16", both)):
        with pytest.raises(HealError, match="--teacher-cache"):
            cache_teacher(source, train, places, cache, Compute("cpu", dtype), **kind)


def test_it_takes_part_in_training(whole: Path, tmp_path: Path) -> None:
    text = sources.save_text(tmp_path / "t.jsonl", 60)
    assert slicer("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut").exit_code == 0
    given = ["heal", tmp_path / "cut", "--method", "lora", "--train-from", "cut", "--calibration", text]
    given += ["--max-steps", 6, "--train-batch-size", 4, "--micro-batch", 2, "--train-seq-len", 16]
    given += ["--learning-rate", 3e-3, "--lora-r", 4, "--verify", "none"]
    losses = {}
    for name, more in {
        "plain": [],
        "live": ["--mismatch-weight", 1, "--kl-weight", 1],
        "4bit": ["--mismatch-weight", 1, "--kl-weight", 1, "--teacher-4bit"],
        "kept": ["--mismatch-weight", 1, "--kl-weight", 1, "--teacher-cache", tmp_path / "cache"],
    }.items():
        result = slicer(*given, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        losses[name] = json.loads((tmp_path / name / "slicer" / "training.json").read_text())
    assert losses["live"]["train"]["1"] > losses["plain"]["train"]["1"] + 0.5
    assert losses["live"]["held_out"]["0"] == losses["plain"]["held_out"]["0"]  # measured on the text alone
    assert losses["kept"]["train"]["1"] == pytest.approx(losses["live"]["train"]["1"], rel=0.05)
    assert losses["4bit"]["train"]["1"] == pytest.approx(losses["live"]["train"]["1"], rel=0.2)
    other = slicer(*given, "--seed", 5, *more, "-o", tmp_path / "other")
    assert other.exit_code == 1 and "another teacher" in other.output
