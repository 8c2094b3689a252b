"""What a training hands over: the change of its base, what the result must have, its history; and where it starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import sources
from commands import succeeds

from slicer.checkpoint.cut import CutOnDisk, open_cut
from slicer.data.corpus import Corpus, prepare
from slicer.data.sources import TextSpec
from slicer.errors import HealError
from slicer.heal.finetune import run
from slicer.heal.finetune.run import finetune
from slicer.heal.finetune.settings import Training, TrainingSettings, resolve
from slicer.heal.patch import NONE
from slicer.jobs.heal import heal
from slicer.jobs.request import HealRequest, Output, Text
from slicer.model.load import load_model
from slicer.model.verify import text_loss
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes

pytest.importorskip("peft")
CPU = Compute("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CutOnDisk:
    place = tmp_path_factory.mktemp("models")
    whole = sources.save_llama(place / "whole")
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", place / "cut")
    return open_cut(str(place / "cut"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_text(tmp_path_factory.mktemp("text") / "t.jsonl", 60)


@pytest.fixture(scope="module")
def settings() -> TrainingSettings:
    asked = Training("lora", "cut", 4, 4, seq_len=16, learning_rate=3e-3, lora_r=4, validation_samples=4)
    return resolve(asked, "tiny", 10**6, most_tokens=256, on_gpu=False)[0]


@pytest.fixture(scope="module")
def corpus(base: CutOnDisk, text: Path, settings: TrainingSettings, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    return prepare(TextSpec(str(text)), settings.size, base.checkpoint, directory)


@pytest.mark.parametrize("verify", ["load", "logits"])
def test_it_writes_nothing_and_gives_what_is_to_be_written(
    base: CutOnDisk, corpus: Corpus, settings: TrainingSettings, tmp_path: Path, verify: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in base.checkpoint.path.rglob("*")}
    given = (base, corpus, settings, CPU, tmp_path)
    patch, expected, history = finetune(*given, Processes(), Progress(), verify)
    assert {path: path.stat().st_mtime_ns for path in base.checkpoint.path.rglob("*")} == before
    assert patch.replaced and patch.replaced.keys() <= base.checkpoint.tensors.keys()
    record = patch.record
    assert record is not None and record.training is not None and record.best_step == history.best > 0
    assert record.training.asked["max_steps"] == 4 and record.training.start == "cut"
    assert set(record.tensors) <= base.source.checkpoint.tensors.keys()
    assert len(record.tensors) == len(patch.replaced)
    # The loss before is that of the base; the one after is left to whoever has written the result.
    assert expected is not None and (expected.logits is not None) == (verify == "logits")
    assert record.loss.before == text_loss(load_model(base.checkpoint.path), expected.text)
    assert record.loss.before == pytest.approx(history.held_out[0], abs=1e-4) and record.loss.after is None
    # A finished training is not trained again, and its model is not even loaded.
    monkeypatch.setattr(run, "load", None)
    again, _, same = finetune(*given, Processes(), Progress(), verify)
    assert same == history and again.replaced.keys() == patch.replaced.keys()


def test_only_the_first_process_gets_the_result(
    base: CutOnDisk, corpus: Corpus, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(base, corpus, settings, CPU, tmp_path, Processes(), Progress(), "load")
    monkeypatch.setattr(Processes, "agree", lambda self, value: value)  # the first one's answer: no error
    patch, expected, history = finetune(base, corpus, settings, CPU, tmp_path, Processes(1, 2), Progress(), "load")
    assert patch is NONE and expected is None and history.best > 0


def test_a_cut_with_an_adapter_in_it_does_not_start_bare(base: CutOnDisk, text: Path, tmp_path: Path) -> None:
    """The bare cut comes from the source, so the adapter would be lost."""
    folded = tmp_path / "folded"
    request = HealRequest(str(base.checkpoint.path), text=Text(str(text), 16, 32), output=Output(folded), compute=CPU)
    heal(request)
    plan = Plan.load(folded)
    (folded / "slicer" / "plan.json").write_text(replace(plan, merged=(MergeRecord("adapter"),)).to_json())
    training = Training("lora", "cut", 2, 4, seq_len=16, lora_r=4, validation_samples=4)
    request = replace(request, cut=str(folded), training=training, output=Output(tmp_path / "out"))
    with pytest.raises(HealError, match="would lose the adapter.*--train-from fold"):
        heal(request)
    assert os.listdir(tmp_path) == ["folded"]
