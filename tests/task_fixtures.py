"""Local files in the layout of --data, and one sweep of the embedded model, made once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from slicer.checkpoint.hub import DEMO

WORDS = ("king", "sea", "sword", "temple")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as --data takes it: one MMLU subject, BoolQ, text for the loss."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("dev", 5), ("test", 12)):
        (root / "mmlu" / split).mkdir(parents=True)
        with open(root / "mmlu" / split / f"astronomy_{split}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            for i in range(count):
                question = f'What did the man see "there", on day {i}?\nSay it.' if i % 3 else f"Which, {i}?"
                writer.writerow([question, *(f"The {word} of {i}" for word in WORDS), "ABCD"[i % 4]])
    (root / "boolq").mkdir()
    with open(root / "boolq" / "dev.jsonl", "w") as stream:
        for i in range(10):
            row = {
                "question": f"is the king in house {i}", "title": "House", "answer": i % 3 == 0,
                "passage": f"The king went to the house {i} and the people were glad.",
            }  # fmt: skip
            stream.write(json.dumps(row) + "\n")
    held = (DEMO.parent / "heldout.txt").read_text("utf-8")
    (root / "text").mkdir()
    with open(root / "text" / "c4-docs.jsonl", "w") as stream:
        for i in range(12):
            stream.write(json.dumps({"text": held[i * 1500 : (i + 1) * 1500]}) + "\n")
    return root
