"""Memory that runs out: what is said, and that the run goes on with the options it names."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import sources
import torch
import transformers
from commands import slicer, succeeds

from slicer.heal.finetune.memory import to_load, to_train
from slicer.heal.finetune.settings import Training, resolve

pytest.importorskip("peft")


def fails(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A training on a text that is seen several times, and is no whole number of steps."""
    place = tmp_path_factory.mktemp("models")
    whole, text = sources.save_llama(place / "whole"), sources.save_text(place / "t.jsonl", 40)
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", place / "cut")
    options: list[object] = ["heal", place / "cut", "--method", "lora", "--calibration", text, "--train-from", "cut"]
    options += ["--max-steps", 60, "--train-batch-size", 4, "--train-seq-len", 16, "--eval-every", 20]
    return [*options, "--lora-dropout", 0, "--patience", 0, "--lora-r", 4, "--learning-rate", 3e-3, "--verify", "load"]


@pytest.mark.parametrize(
    ("where", "more", "words"),
    [
        ("slicer.jobs.heal.repair", ["--train-from", "fold"], ["in the fold", "--train-from cut"]),
        ("slicer.heal.finetune.run.load", [], ["loading the model", "--method qlora"]),
        ("slicer.heal.finetune.distillation.load_model", ["--kl-weight", 1], ["loading the teacher", "--teacher-4bit"]),
        (
            "slicer.heal.finetune.distillation.cache_teacher",
            ["--kl-weight", 1, "--teacher-cache", "C"],
            ["caching the teacher"],
        ),
        ("slicer.data.corpus.sample_tokens", ["--calibration", "self"], ["sampling text", "--device cpu"]),
    ],
)
def test_wherever_it_runs_out_one_line_says_what_helps(
    given: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    more: list[object],
    words: list[str],
) -> None:
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(import_module(module), name, fails)
    result = slicer(*given, *more, "-o", tmp_path / "out")
    said = [line for line in result.stderr.splitlines() if line.startswith("slicer:")]
    assert result.exit_code == 1 and len(said) == 1 and not os.listdir(tmp_path)
    assert "out of memory" in said[0] and all(word in said[0] for word in words)


def test_it_goes_on_with_what_was_advised_and_has_the_same_losses(
    given: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the middle, then at the end."""
    from slicer.heal.finetune import trainer
    from slicer.jobs import heal as job

    succeeds(*given, "-o", tmp_path / "undisturbed")
    honest, steps = trainer.cross_entropy, []

    def fails_late(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps.append(logits.requires_grad)
        return honest(logits, labels) if sum(steps) <= 25 else fails()

    monkeypatch.setattr(trainer, "cross_entropy", fails_late)
    result = slicer(*given, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "--micro-batch 1, --gradient-checkpointing" in result.stderr
    monkeypatch.setattr(trainer, "cross_entropy", honest)
    write = job.write_verified
    monkeypatch.setattr(job, "write_verified", fails)
    less = ["--micro-batch", 1, "--gradient-checkpointing"]
    result = slicer(*given, *less, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "verifying" in result.stderr
    monkeypatch.setattr(job, "write_verified", write)
    monkeypatch.setattr(transformers.Trainer, "train", fails)  # it was trained to its end
    succeeds(*given, *less, "-o", tmp_path / "out")
    a, b = (json.loads((tmp_path / n / "slicer" / "training.json").read_text()) for n in ("undisturbed", "out"))
    for kind in ("train", "held_out"):
        assert a[kind].keys() == b[kind].keys()
        assert all(abs(a[kind][step] - b[kind][step]) < 1e-4 for step in a[kind])


def test_fewer_sequences_of_a_pass_still_divide_those_of_a_step() -> None:
    for micro, advised in ((9, 1), (12, 3), (8, 2), (2, 1)):
        asked = Training(method="full", micro_batch=micro, batch_size=2 * micro)
        settings, _ = resolve(asked, "phi-2", 10**9, most_tokens=None, on_gpu=True)
        assert to_train(settings, teacher=False)[0] == f"--micro-batch {advised}"
        assert to_load(settings, teacher=False) == ["--method lora", "--device cpu"]
