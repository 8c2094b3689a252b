"""The adapter kept by itself: with what it belongs to, where nothing is lost by it, checked before anything is done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import files
import pytest
import sources
from commands import slicer, succeeds

pytest.importorskip("peft")

FEW = ["--max-steps", 6, "--train-batch-size", 4, "--train-seq-len", 16, "--learning-rate", 3e-3, "--lora-r", 4]
FEW += ["--verify", "load", "--validation-samples", 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_text(tmp_path_factory.mktemp("text") / "t.jsonl", 60)


def test_a_cut_that_convert_made_on_the_way_is_kept_with_its_adapter(whole: Path, text: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "kept" / "adapter"
    given = ["convert", whole, "--drop", "2-3", "--heal", "lora", "--train-from", "cut", "--calibration", text]
    succeeds(*given, *FEW, "--save-adapter", adapter, "-o", out)
    place = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert place == str(adapter / "base") and place in (adapter / "README.md").read_text()
    succeeds("merge", place, adapter, "-o", tmp_path / "merged")
    assert files.read_tensors(tmp_path / "merged") == files.read_tensors(out)
    assert sorted(os.listdir(tmp_path)) == ["kept", "merged", "out"] and os.listdir(adapter.parent) == ["adapter"]
    # An adapter that is there is replaced when asked, and by no other training.
    again = slicer(*given, *FEW, "--save-adapter", adapter, "-o", tmp_path / "again")
    assert again.exit_code == 1 and "not empty" in again.output
    succeeds(*given, *FEW, "--seed", 1, "--overwrite", "--save-adapter", adapter, "-o", tmp_path / "again")
    (adapter / "slicer.json").write_text("{}")
    result = slicer("merge", place, adapter, "-o", tmp_path / "unchecked")
    assert result.exit_code == 1 and "remove it" in result.output


def test_where_it_cannot_be_kept_nothing_is_begun(whole: Path, text: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "diary.txt").write_text("Mine.")
    out = tmp_path / "out"
    for place, more, words, code in (
        (theirs, [], "not empty", 1),
        (theirs, ["--overwrite"], "replaces only adapters", 1),
        (theirs / "diary.txt", [], "not a directory", 1),
        (theirs / "diary.txt" / "adapter", [], "not writable", 1),
        (out / "adapter", [], "overlaps", 1),
        (tmp_path / "out.training" / "adapter", [], "overlaps", 1),
        (tmp_path / "out.cut" / "adapter", [], "overlaps", 1),
        (whole / "adapter", [], "overlaps", 1),
        (tmp_path / "adapter", ["--heal", "full"], "--method full", 2),
    ):
        given = ["convert", whole, "--drop", "2-3", "--heal", "lora", "--calibration", text, *FEW[:8], *more]
        result = slicer(*given, "--save-adapter", place, "-o", out)
        assert result.exit_code == code and words in result.output, result.output
        assert os.listdir(tmp_path) == ["theirs"] and os.listdir(theirs) == ["diary.txt"]
