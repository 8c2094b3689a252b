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

from slicer import demo
from slicer.errors import Diverged, HealError, OutputError
from slicer.heal.finetune.run import TrainOptions
from slicer.heal.finetune.settings import Training
from slicer.jobs.heal import Healed
from slicer.plan.plan import Plan
from slicer.plan.records import CorpusRecord, HealingRecord, Losses, TrainingRecord
from slicer.sweep import ranks as rank_search
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
    def ask(path: Path) -> tuple[float, float]:
        return scores[path.name.removeprefix("rank-") if path.name != "cut" else "none"], 0.02

    monkeypatch.setattr(rank_search, "_judge", lambda *_: ask)
    whole = sources.save_llama(tmp_path / "whole")
    text = demo.path().parent / "heldout.txt"
    assert slicer("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut").exit_code == 0
    given: list[Any] = [
        "heal",
        tmp_path / "cut",
        "--method",
        "lora",
        "--train-from",
        "cut",
        "--calibration",
        text,
    ]
    given += ["--max-steps", 2, "--train-batch-size", 4, "--train-seq-len", 16, "--verify", "load"]
    result = slicer(*given, "--rank-sweep", "2,8,4", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["healing"]
    ranks = record["training"]["rank_sweep"]
    assert ranks["picked"] == picked == record["training"]["settings"]["rank"]
    assert set(ranks["scores"]) == trained | {"none"}
    assert json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"] == record
    assert sorted(os.listdir(tmp_path)) == ["cut", "out", "whole"]
    again = slicer(*given, "--rank-sweep", "2", "-o", tmp_path / "out")
    assert again.exit_code == 1 and "not empty" in again.output
    for more in (["--rank-sweep", "2,x"], ["--rank-sweep", "2", "--lora-r", 4], ["--rank-metric", "loss"]):
        assert slicer(*given, *more, "-o", tmp_path / "again").exit_code == 2


class Trainer:
    """Stands for `train_cut`: makes a result at once, diverges with the ranks `diverging`, is killed once if told."""

    def __init__(self, diverging: tuple[int, ...] = (), *, killed: bool = False) -> None:
        self.asked: list[int | None] = []
        self._diverging, self._killed = diverging, killed

    def __call__(
        self, sliced: str, source: str | None, place: Path, options: TrainOptions, **_: Any
    ) -> Healed:
        rank = options.training.rank
        self.asked.append(rank)
        if rank in self._diverging:
            raise Diverged("the loss is not finite at step 1")
        shutil.copytree(sliced, place)
        training = TrainingRecord("cut", {}, {"rank": rank}, CorpusRecord("text", 8, 2))
        losses = Losses(before=2.0, after=1.0 + (rank or 0))
        healing = HealingRecord("lora", None, losses, best_step=1, training=training)
        plan = replace(Plan.load(place), healing=healing)
        (place / "slicer" / "plan.json").write_text(plan.to_json())
        if self._killed:
            raise KeyboardInterrupt
        return Healed(place, plan, "logits", 0.0, True)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    whole = sources.save_llama(place / "whole")
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", place / "cut")
    return place / "cut"


OPTIONS = TrainOptions(Training(method="lora"))
BY_LOSS = RankSearch((8, 4), rank_search.LOSS)


def test_a_rank_that_diverges_is_the_worst(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_search, "train_cut", Trainer((8,)))
    done = heal_with_best_rank(str(cut), None, tmp_path / "out", OPTIONS, BY_LOSS)
    assert done is not None and done.plan.healing is not None
    told = json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"]["training"][
        "rank_sweep"
    ]
    assert told == {"metric": "loss", "scores": {"8": None, "4": -5.0, "none": -2.0}, "picked": 4}
    monkeypatch.setattr(rank_search, "train_cut", Trainer((8, 4)))
    with pytest.raises(HealError, match="any rank"):
        heal_with_best_rank(str(cut), None, tmp_path / "none", OPTIONS, BY_LOSS)
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_trained_is_taken_up_by_the_same_sweep_only(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was killed when the first result was there and nothing had been noted of it."""
    out = tmp_path / "out"

    def killed() -> None:
        monkeypatch.setattr(rank_search, "train_cut", Trainer(killed=True))
        with pytest.raises(KeyboardInterrupt):
            heal_with_best_rank(str(cut), None, out, OPTIONS, RankSearch((8,), rank_search.LOSS))

    killed()
    again = Trainer()
    monkeypatch.setattr(rank_search, "train_cut", again)
    other = replace(OPTIONS, training=replace(OPTIONS.training, lr=1e-4))
    for options, sweep in ((other, RankSearch((8,), rank_search.LOSS)), (OPTIONS, BY_LOSS)):
        with pytest.raises(OutputError, match="unfinished"):
            heal_with_best_rank(str(cut), None, out, options, sweep)
    done = heal_with_best_rank(str(cut), None, out, OPTIONS, RankSearch((8,), rank_search.LOSS))
    assert not again.asked and done is not None and done.verified == "load"
    shutil.rmtree(out)
    killed()
    monkeypatch.setattr(rank_search, "train_cut", again)
    heal_with_best_rank(str(cut), None, out, replace(other, force=True), RankSearch((8,), rank_search.LOSS))
    assert again.asked == [8] and os.listdir(tmp_path) == ["out"]
