"""The model card: front matter that the Hub reads, the facts, nothing of the machine that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import files
import pytest
import yaml

from slicer.checkpoint import card
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.plan.plan import Plan
from slicer.plan.records import CorpusRecord, HealingRecord, Losses, TextRecord, TrainingRecord


def make(path: Path, **fields: Any) -> tuple[dict[str, Any], str]:
    files.write_checkpoint(path, layers=4)
    (path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlanguage:\n- en\n- de\ntags:\n- x\n---\n# Old\n"
    )
    checkpoint = Checkpoint.open(path)
    plan = Plan(4, (0, 3), **fields)
    before, after = measure_sizes(checkpoint), measure_sizes(checkpoint, plan.kept)
    text = card.for_plan(path, plan, before, after, figures=True)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter(tmp_path: Path) -> None:
    front, body = make(tmp_path, source="org/name@main", strategy="tail", command="slicer convert org/name --drop 2")
    assert front["base_model"] == "org/name" and front["library_name"] == "transformers"
    assert (front["license"], front["license_name"], front["language"]) == ("other", "own", ["en", "de"])
    assert "slicer" in front["tags"] and "x" not in front["tags"]
    assert "1-2" in body and "slicer convert org/name --drop 2" in body and "Reasoning suffers first" in body
    assert "slicer/distances.png" in body and "vllm serve" in body


def test_every_command_is_told_in_order(tmp_path: Path) -> None:
    """Of a checkpoint that was folded and then trained by hand; where its files lay stays private."""
    settings = {
        "batch_size": 4, "seq_len": 16, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0,
        "seed": 0,
    }  # fmt: skip
    training = TrainingRecord("fold", {}, settings, CorpusRecord("text", 9, 4))
    command = f"slicer heal {tmp_path}/folded --method full --calibration '{tmp_path}/a b.jsonl,org/text'"
    fold = HealingRecord("fold", None, Losses(), command=f"slicer heal {tmp_path}/cut")
    record = HealingRecord(
        "full", None, Losses(3.0, 3.5, 3.2), steps=2, best_step=2, training=training, earlier=fold, command=command
    )
    _, body = make(tmp_path, source="org/name", command="slicer convert org/name --drop 2", healing=record)
    expected = [
        "slicer convert org/name --drop 2",
        "slicer heal cut",
        "slicer heal folded --method full --calibration 'a b.jsonl,org/text'",
    ]
    assert "\n".join(expected) in body and str(tmp_path) not in body


def test_a_local_source_stays_private(tmp_path: Path) -> None:
    front, body = make(
        tmp_path / "mine", source=str(tmp_path / "mine"), command=f"slicer convert {tmp_path}/mine --drop 2"
    )
    assert "base_model" not in front
    assert str(tmp_path) not in body and "mine" in body


@pytest.mark.parametrize("strategy", ["similarity", "deepest", "tail", "explicit"])
def test_the_reason_is_given(tmp_path: Path, strategy: str) -> None:
    measured = {"distance": 0.1234, "calibration": TextRecord("self", 8, 32)}
    _, body = make(tmp_path, source="org/name", strategy=strategy, **(measured if strategy == "similarity" else {}))
    words = {"similarity": "0.1234", "deepest": "final layer", "tail": "last ones", "explicit": "by hand"}
    assert words[strategy] in body


def test_another_metric_is_named(tmp_path: Path) -> None:
    _, body = make(
        tmp_path,
        source="org/name",
        strategy="similarity",
        metric="cka",
        distance=0.1234,
        calibration=TextRecord("a", 8, 32),
    )
    assert "`cka`" in body and "0.1234" in body and "angular distance between" not in body
