"""The rank is picked as in appendix B.3 of the paper."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sources
from commands import slicer

from slicer import demo

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
    import slicer.heal.rank_sweep as rank_sweep

    def ask(path: Path) -> tuple[float, float]:
        return scores[path.name.removeprefix("rank-") if path.name != "cut" else "none"], 0.02

    monkeypatch.setattr(rank_sweep, "_judge", lambda *_: ask)
    whole = sources.save_llama(tmp_path / "whole")
    text = demo.path().parent / "heldout.txt"
    assert slicer("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut").exit_code == 0
    given: list[Any] = ["heal", tmp_path / "cut", "--method", "lora", "--start", "cut", "--calibration", text]
    given += ["--steps", 2, "--train-batch-size", 4, "--train-seq-len", 16, "--verify", "load"]
    result = slicer(*given, "--rank-sweep", "2,8,4", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["healing"]
    assert record["rank_sweep"]["picked"] == picked == record["settings"]["rank"]
    assert set(record["rank_sweep"]["scores"]) == trained | {"none"}
    assert json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"] == record
    assert sorted(os.listdir(tmp_path)) == ["cut", "out", "whole"]
    again = slicer(*given, "--rank-sweep", "2", "-o", tmp_path / "out")
    assert again.exit_code == 1 and "not empty" in again.output
    for more in (["--rank-sweep", "2,x"], ["--rank-sweep", "2", "--rank", 4], ["--rank-metric", "loss"]):
        assert slicer(*given, *more, "-o", tmp_path / "again").exit_code == 2
