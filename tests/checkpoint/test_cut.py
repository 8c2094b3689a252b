"""What is opened to work on, and whether a config can express a cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sources
import tiny
from cuts import cutting

from slicer.checkpoint.config import expand_config, why_not
from slicer.checkpoint.hub import open_source
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SourceError
from slicer.plan.plan import Plan


def test_a_source_is_opened_and_checked_at_once(tmp_path: Path) -> None:
    path = sources.save_llama(tmp_path / "tiny", layers=3)
    source = open_source(str(path))
    assert source.name == str(path) and source.path == path and source.revision is None
    assert source.checkpoint.depth == 3 and len(source.checkpoint.layers) == 3
    config = json.loads((path / "config.json").read_text())
    for change, word in (
        ({"num_hidden_layers": 5}, "5 layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ):
        (path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(SourceError, match=word):
            open_source(str(path))


def test_the_reason_why_a_cut_cannot_be_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.save_tiny("gemma2", tmp_path / "gemma2"))
    assert why_not(checkpoint, Plan.dropping(tiny.DEPTH, [2, 3])) is None
    blockwise = cutting(tiny.DEPTH, attention=[2], form="blockwise")
    assert "supports only" in (why_not(checkpoint, blockwise) or "")


def test_what_transformers_makes_of_a_config_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tiny.save_tiny("gemma2", tmp_path / "gemma2")
    read = expand_config(path)
    read["hidden_size"] = 0  # a caller's copy
    again = expand_config(path)
    assert again["hidden_size"] == tiny.tiny_model("gemma2").config.hidden_size
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    assert expand_config(path)["rms_norm_eps"] == 0.125
