"""The demonstration: slice the embedded model, then let the original and the sliced model continue a prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from slicer.checkpoint.hub import DEMO
from slicer.jobs.convert import convert
from slicer.jobs.output import Written
from slicer.jobs.request import ConvertRequest, Output, Text
from slicer.model.load import load_model
from slicer.plan.amounts import Goal, parse_amount
from slicer.progress import Progress

PROMPT = "The captain of the ship"


@dataclass(frozen=True)
class Shown:
    """The result of the demonstration: the conversion, and a continuation by each model."""

    written: Written
    prompt: str
    original: str
    sliced: str


def show(drop: str, out: Path | None, progress: Progress) -> Shown:
    """Convert the embedded model and generate a line with both models; without `out`, delete the result."""
    with tempfile.TemporaryDirectory(prefix="slicer-demo-") as scratch:
        target = out or Path(scratch) / "sliced"
        request = ConvertRequest(
            "demo",
            Goal(drop=parse_amount(drop)),
            text=Text("self", samples=64, seq_len=128),  # enough, and takes seconds
            output=Output(target),
            command=f"slicer convert demo --drop {drop} --samples 64 --seq-len 128",
        )
        written = convert(request, progress)
        progress.stage("Generating a line with each model")
        return Shown(written, PROMPT, _continue(DEMO), _continue(target))


def _continue(path: Path, new_tokens: int = 40) -> str:
    """The greedy continuation of the prompt, as one line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    model = load_model(path, dtype="float32", device="cpu")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
