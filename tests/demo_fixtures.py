"""The embedded model, and text that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import succeeds

from slicer.checkpoint.hub import DEMO
from slicer.model.load import load_model


@pytest.fixture(scope="session")
def held_out_ids() -> list[int]:
    """Tokens of the held-out text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO.parent / "heldout.txt").read_text("utf-8")
    return list(tokenizer(text, verbose=False)["input_ids"])


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out text by itself in a directory."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes((DEMO.parent / "heldout.txt").read_bytes())
    return file


@pytest.fixture(scope="session")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of the embedded model, in float32."""
    out = tmp_path_factory.mktemp("models") / "sliced"
    succeeds("convert", "demo", "--drop", "2-9", "--heal", "none", "--dtype", "float32", "-o", out)
    return out


@pytest.fixture(scope="module")
def model() -> Any:
    """In float32; a test that changes it puts it back."""
    return load_model(DEMO, dtype="float32", device="cpu")
