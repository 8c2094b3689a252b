"""Whose the directory of an unfinished training is."""

from __future__ import annotations

from pathlib import Path

import pytest
import sources
from commands import slicer, succeeds

from slicer.checkpoint.reader import Checkpoint
from slicer.heal.place import cut_for, workplace_of
from slicer.measure.calibration import CalibrationSpec

pytest.importorskip("peft")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_not_slicers_is_neither_used_nor_removed(tmp_path: Path, force: list[str]) -> None:
    whole, text = sources.save_llama(tmp_path / "whole"), sources.save_text(tmp_path / "t.jsonl", 60)
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut")
    few = ["--calibration", text, "--steps", 2, "--train-seq-len", 16, "--train-batch-size", 2, *force]
    sweep = ["--rank-sweep", "2", "--rank-metric", "loss"]
    for given, ending in (
        (["heal", tmp_path / "cut", "--method", "lora"], "training"),
        (["convert", whole, "--drop", "2-3", "--heal", "lora"], "training"),
        (["heal", tmp_path / "cut", "--method", "lora", *sweep], "ranks"),
        (["convert", whole, "--drop", "2-3", "--heal", "lora", *sweep], "ranks"),
    ):
        theirs = tmp_path / f"out.{ending}" / "diary.txt"
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("Mine.")
        result = slicer(*given, *few, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "not slicer's" in result.output, result.output
        assert [path.name for path in theirs.parent.iterdir()] == ["diary.txt"]
        theirs.unlink()
        theirs.parent.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "t.jsonl", "whole"]


def test_a_cut_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    source = Checkpoint.open(sources.save_llama(tmp_path / "whole"))
    work = workplace_of(tmp_path / "out")
    work.mkdir()
    (work / "made-by-slicer").touch()
    (work / "cut").mkdir()  # half of it
    made: list[Path] = []
    for _ in range(2):
        cut_for(tmp_path / "out", source, CalibrationSpec(), {}, made.append, force=False)
    assert made == [work / "cut"]
