"""The rank is picked as in appendix B.3 of the paper."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sources
from commands import slicer, succeeds

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.errors import Diverged, HealError, OutputError
from slicer.evaluate.results import Evaluation, Score
from slicer.heal.finetune.settings import Training
from slicer.jobs.output import Written
from slicer.jobs.request import HealRequest, Output
from slicer.plan.plan import Plan
from slicer.plan.records import CorpusRecord, HealingRecord, Losses, TrainingRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.sweep import ranks
from slicer.sweep.ranks import RankSearch, heal_with_best_rank

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("scores", "trained", "picked"),
    [
        ({"none": 0.5, "8": 0.49, "4": 0.9, "2": 0.9}, {"8"}, 8),  # within a standard error of no healing
        ({"none": 0.5, "8": 0.2, "4": 0.4, "2": 0.4}, {"8", "4", "2"}, 2),  # the smallest of the best
    ],
)
def test_it_begins_with_the_largest_and_tries_the_others_where_that_hurts(
    scores: dict[str, float], trained: set[str], picked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(path: str, _: object) -> Evaluation:
        name = Path(path).name
        value = scores[name.removeprefix("rank-") if name != "cut" else "none"]
        return Evaluation(path, (Score("mmlu", "acc", value, 0.02, 0.25, 100, 0),), None, None)

    monkeypatch.setattr(ranks, "Suite", lambda *_: None)
    monkeypatch.setattr(ranks, "evaluate", evaluate)
    whole = sources.save_llama(tmp_path / "whole")
    text = DEMO.parent / "heldout.txt"
    assert slicer("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut").exit_code == 0
    given: list[Any] = ["heal", tmp_path / "cut", "--method", "lora", "--train-from", "cut", "--calibration", text]
    given += ["--max-steps", 2, "--train-batch-size", 4, "--train-seq-len", 16, "--verify", "load"]
    result = slicer(*given, "--rank-sweep", "2,8,4", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["healing"]
    found = record["training"]["rank_sweep"]
    assert found["picked"] == picked == record["training"]["settings"]["lora_r"]
    assert set(found["scores"]) == trained | {"none"}
    assert json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"] == record
    assert sorted(os.listdir(tmp_path)) == ["cut", "out", "whole"]
    again = slicer(*given, "--rank-sweep", "2", "-o", tmp_path / "out")
    assert again.exit_code == 1 and "not empty" in again.output
    for more in (["--rank-sweep", "2,x"], ["--rank-sweep", "2", "--lora-r", 4], ["--rank-metric", "loss"]):
        assert slicer(*given, *more, "-o", tmp_path / "again").exit_code == 2


class Trainer:
    """Stands for `jobs.heal`: makes a result at once, diverges with the ranks `diverging`, is killed once if told."""

    def __init__(self, diverging: tuple[int, ...] = (), *, killed: bool = False) -> None:
        self.asked: list[int | None] = []
        self._diverging, self._killed = diverging, killed

    def __call__(self, request: HealRequest, progress: Progress) -> Written:
        place = request.output.out
        assert request.training is not None and place is not None
        rank = request.training.lora_r
        self.asked.append(rank)
        if rank in self._diverging:
            raise Diverged("the loss is not finite at step 1")
        shutil.copytree(request.cut, place)
        training = TrainingRecord("cut", {}, {"lora_r": rank}, CorpusRecord("text", 8, 2))
        losses = Losses(before=2.0, after=1.0 + (rank or 0))
        healing = HealingRecord("lora", None, losses, best_step=1, training=training)
        plan = replace(Plan.load(place), healing=healing)
        (place / "slicer" / "plan.json").write_text(plan.to_json())
        if self._killed:
            raise KeyboardInterrupt
        sizes = measure_sizes(Checkpoint.open(place))
        return Written(place, plan, sizes, sizes, "logits", 0.0)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    whole = sources.save_llama(place / "whole")
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", place / "cut")
    return place / "cut"


BY_LOSS = RankSearch((8, 4), ranks.LOSS)
ONE = RankSearch((8,), ranks.LOSS)


def request(cut: Path, out: Path, *, overwrite: bool = False, **asked: Any) -> HealRequest:
    training = Training(method="lora", **asked)
    return HealRequest(str(cut), training=training, output=Output(out, overwrite=overwrite), compute=Compute("cpu"))


def test_a_rank_that_diverges_is_the_worst(cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "heal", Trainer((8,)))
    done = heal_with_best_rank(request(cut, tmp_path / "out"), BY_LOSS)
    assert done is not None and done.plan.healing is not None and done.verified == "logits"
    assert done.before.depth == 6 and done.after.depth == 4
    record = json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"]["training"]
    assert record["rank_sweep"] == {"metric": "loss", "scores": {"8": None, "4": -5.0, "none": -2.0}, "picked": 4}
    monkeypatch.setattr(ranks, "heal", Trainer((8, 4)))
    with pytest.raises(HealError, match="any rank"):
        heal_with_best_rank(request(cut, tmp_path / "none"), BY_LOSS)
    assert os.listdir(tmp_path) == ["out"]


def test_a_stopped_search_is_resumed_by_the_same_request_only(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was killed when the first result was there and nothing had been noted of it."""
    out = tmp_path / "out"

    def killed() -> None:
        monkeypatch.setattr(ranks, "heal", Trainer(killed=True))
        with pytest.raises(KeyboardInterrupt):
            heal_with_best_rank(request(cut, out), ONE)

    killed()
    again = Trainer()
    monkeypatch.setattr(ranks, "heal", again)
    for asked, search in ((request(cut, out, learning_rate=1e-4), ONE), (request(cut, out), BY_LOSS)):
        with pytest.raises(OutputError, match="unfinished"):
            heal_with_best_rank(asked, search)
    done = heal_with_best_rank(request(cut, out), ONE)
    assert not again.asked and done is not None and done.verified == "load"
    shutil.rmtree(out)
    killed()
    monkeypatch.setattr(ranks, "heal", again)
    heal_with_best_rank(request(cut, out, learning_rate=1e-4, overwrite=True), ONE)
    assert again.asked == [8] and os.listdir(tmp_path) == ["out"]
