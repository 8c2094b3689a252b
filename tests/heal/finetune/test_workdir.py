"""The directories of an unfinished training, beside where its result is to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sources
from commands import slicer, succeeds

pytest.importorskip("peft")
FEW = ["--max-steps", 6, "--train-seq-len", 16, "--train-batch-size", 2]


@pytest.mark.parametrize("force", [[], ["--overwrite"]])
def test_what_is_not_slicers_is_neither_used_nor_removed(tmp_path: Path, force: list[str]) -> None:
    whole, text = sources.save_llama(tmp_path / "whole"), sources.save_text(tmp_path / "t.jsonl", 60)
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", tmp_path / "cut")
    sweep = ["--rank-sweep", "2", "--rank-metric", "loss"]
    for given, ending in (
        (["heal", tmp_path / "cut", "--method", "lora"], "training"),
        (["convert", whole, "--drop", "2-3", "--heal", "lora"], "training"),
        (["convert", whole, "--drop", "2-3", "--heal", "lora"], "cut"),
        (["heal", tmp_path / "cut", "--method", "lora", *sweep], "ranks"),
        (["convert", whole, "--drop", "2-3", "--heal", "lora", *sweep], "ranks"),
    ):
        theirs = tmp_path / f"out.{ending}" / "diary.txt"
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("Mine.")
        result = slicer(*given, "--calibration", text, *FEW, *force, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "not created by slicer" in result.output, result.output
        assert [path.name for path in theirs.parent.iterdir()] == ["diary.txt"]
        theirs.unlink()
        theirs.parent.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "t.jsonl", "whole"]


def test_a_cut_whose_making_was_stopped_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer.jobs.convert as module

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    whole, text = sources.save_llama(tmp_path / "whole"), sources.save_text(tmp_path / "t.jsonl", 60)
    given = ["convert", whole, "--drop", "2-3", "--heal", "lora", "--train-from", "cut", "--calibration", text]
    given += [*FEW, "--validation-samples", 4]
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_verified", stopped)
        assert slicer(*given, "-o", tmp_path / "out").exit_code == 130
    assert sorted(os.listdir(tmp_path)) == ["out.cut", "t.jsonl", "whole"]
    succeeds(*given, "-o", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "t.jsonl", "whole"]
