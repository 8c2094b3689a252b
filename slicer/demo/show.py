"""The demonstration: slice the embedded model, then let the original and the sliced model continue a prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from slicer import demo
from slicer.data.sources import TextSpec
from slicer.jobs.convert import convert
from slicer.jobs.options import Options, Summary
from slicer.plan.amounts import Goal, parse_amount
from slicer.progress import Progress

PROMPT = "The captain of the ship"


@dataclass(frozen=True)
class Shown:
    """The result of the demonstration: the conversion, and a continuation by each model."""

    summary: Summary
    prompt: str
    original: str
    sliced: str


def show(drop: str, out: Path | None, progress: Progress) -> Shown:
    """Convert the embedded model and generate a line with both models; without `out`, delete the result."""
    with tempfile.TemporaryDirectory(prefix="slicer-demo-") as scratch:
        target = out or Path(scratch) / "sliced"
        options = Options(
            calibration=TextSpec(source="self", samples=64, seq_len=128),  # enough, and takes seconds
            command=f"slicer convert demo --drop {drop} --samples 64 --seq-len 128",
        )
        summary = convert("demo", Goal(drop=parse_amount(drop)), target, options, progress=progress)
        progress.stage("Generating a line with each model")
        return Shown(summary, PROMPT, _continue(demo.path()), _continue(target))


def _continue(path: Path, new_tokens: int = 40) -> str:
    """The greedy continuation of the prompt, as one line."""
    import torch
    from transformers import AutoTokenizer

    from slicer.model.load import load_model

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    model = load_model(path, dtype="float32", device="cpu")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
