"""Sizes of a checkpoint from its headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import widest_output


@pytest.mark.parametrize(("model_type", "widest"), [("llama", 96), ("gpt2", 256), ("mixtral", 64)])
def test_the_widest_map_into_the_stream(model_type: str, widest: int, tmp_path: Path) -> None:
    """Also where it is stored transposed; the experts of a layer have one map, of their sum."""
    assert widest_output(Checkpoint.open(tiny.save_tiny(model_type, tmp_path / "model"))) == widest
