"""Benchmark of `--method qlora` and `lora` against a bare peft training loop on the same batches, in tokens per second.

    python -m slicer.benchmarks.rivals.training [--model DIR] [--method qlora] [--steps 12] [--seq-len 128]
        [--batch-size 2]

The bare loop has the same NF4 (or unquantized) weights, the same LoRA on the same modules, AdamW, and nothing else:
forward, backward, step. slicer's has the Trainer, the schedule, clipping, determinism and the recorded loss of each
step. Each round is a fresh process, rounds are interleaved, and the fastest of each counts; the first steps,
evaluations and checkpoints are not timed. Peak memory is that of the whole process (or of the GPU), next to the
formula of docs/guide/scaling.md and the memory beyond that of the libraries alone, which the formula leaves out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slicer.benchmarks.process import Peak, memory_of, peak_memory, run_module, synchronize
from slicer.benchmarks.script import options
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.corpus import prepare
from slicer.data.sources import TextSpec
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.memory import ModelShape, needed
from slicer.heal.finetune.settings import Training, resolve
from slicer.progress import Progress
from slicer.runtime.compute import Compute

WAYS = ("slicer", "bare")
_WARM = 2  # steps that are not timed


def main() -> None:
    parser = options(
        __doc__, model=DEMO, calibration=str(DEMO.parent / "heldout.txt"), steps=12, seq_len=128, batch_size=2, rank=8,
        compute="auto", gradient_checkpointing=False, rounds=3,
    )  # fmt: skip
    parser.add_argument("--method", choices=["qlora", "lora"], default="qlora")
    given = parser.parse_args()
    if given.steps < _WARM + 2:
        parser.error(f"--steps {given.steps}: the first {_WARM} are not timed; pass at least {_WARM + 2}")
    if given.worker:
        way, work = given.worker
        print(json.dumps(run(given, way, Path(work))))
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="slicer-training-") as work:
        for _ in range(given.rounds):
            for way in WAYS:
                found = run_module(way, "rivals.training", *sys.argv[1:], "--worker", way, work)
                print(
                    f"{way:<8}{found['tokens_per_second']:>10.1f} tokens/s{found['peak_gb']:>8.2f} GB"
                    f"{found['taken_gb']:>8.2f} GB beyond the libraries{found['formula_gb']:>8.2f} GB by the formula",
                    flush=True,
                )
                if way not in best or found["tokens_per_second"] > best[way]["tokens_per_second"]:
                    best[way] = found
    ratio = best["slicer"]["tokens_per_second"] / best["bare"]["tokens_per_second"]
    memory = best["slicer"]["peak_gb"] / best["bare"]["peak_gb"]
    print(f"{given.method}: {ratio:.3f} x the tokens per second of the bare loop, {memory:.2f} x its peak memory")


def run(given: argparse.Namespace, way: str, work: Path) -> dict[str, float]:
    adapters.require(given.method)
    asked = Training(
        method=given.method, max_steps=given.steps, batch_size=given.batch_size, micro_batch=given.batch_size,
        seq_len=given.seq_len, lora_r=given.rank, learning_rate=1e-4, compute=given.compute, validation_samples=1,
        eval_every=given.steps, gradient_checkpointing=given.gradient_checkpointing,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    base = Checkpoint.open(given.model)
    settings, _ = resolve(asked, str(given.model), base.parameters, most_tokens=None, on_gpu=on_gpu)
    corpus = prepare(TextSpec(given.calibration), settings.size, base, work / "corpus")
    formula = needed(
        ModelShape.of(base.config), method=given.method, rank=given.rank,
        micro_batch=settings.micro_batch, seq_len=given.seq_len,
        gradient_checkpointing=given.gradient_checkpointing,
        bytes_a_value=getattr(torch, settings.compute).itemsize,
    )  # fmt: skip
    with Peak(lambda: memory_of("RssAnon")) as memory:
        model = adapters.load(base, settings, Compute())
        if way == "slicer":
            times = _slicer(model, corpus, settings, work / f"run-{os.getpid()}")
        else:
            times = _bare(model, corpus, settings)
    steps = len(times) - 1 - _WARM
    seconds = times[-1] - times[_WARM]
    peak = peak_memory(on_gpu)
    return {
        "tokens_per_second": steps * given.batch_size * given.seq_len / seconds,
        "peak_gb": peak / 1e9,
        "taken_gb": (peak if on_gpu else memory.most - memory.before) / 1e9,
        "formula_gb": formula["all"] / 1e9,
    }


def _slicer(model: Any, corpus: Any, settings: Any, work: Path) -> list[float]:
    """The end time of each step, in seconds."""
    from slicer.heal.finetune.trainer import train  # imports transformers

    class Clock(Progress):
        times: list[float] = []

        def advance(self, amount: int = 1) -> None:
            self.times += [time.monotonic()] * amount

    clock = Clock()
    train(model, corpus, settings, work, clock)
    return clock.times


def _bare(model: Any, corpus: Any, settings: Any) -> list[float]:
    device = model.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate)
    model.train()
    times, batch_size = [], settings.asked.batch_size
    for step in range(settings.asked.max_steps):
        rows = range(step * batch_size, (step + 1) * batch_size)
        tokens = torch.stack([corpus.train[i % len(corpus.train)]["input_ids"] for i in rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.compute == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.monotonic())
    return times


if __name__ == "__main__":
    main()
