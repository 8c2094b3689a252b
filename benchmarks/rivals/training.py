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
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from slicer.checkpoint.hub import DEMO

WAYS = ("slicer", "bare")
_WARM = 2  # steps that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--calibration", default=str(DEMO.parent / "heldout.txt"))
    parser.add_argument("--method", choices=["qlora", "lora"], default="qlora")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < _WARM + 2:
        parser.error(f"--steps {given.steps}: the first {_WARM} are not timed; pass at least {_WARM + 2}")
    if given.one:
        print(json.dumps(_run(given, given.one)))
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="slicer-training-") as work:
        for _ in range(given.rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "slicer.benchmarks.rivals.training", *sys.argv[1:], "--one", way]
                done = subprocess.run([*command, "--work", work], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                found = json.loads(done.stdout.splitlines()[-1])
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


def _run(given: argparse.Namespace, way: str) -> dict[str, float]:
    import torch

    from slicer.checkpoint.reader import Checkpoint
    from slicer.data.corpus import prepare
    from slicer.data.sources import TextSpec
    from slicer.heal.finetune import model as adapters
    from slicer.heal.finetune.memory import ModelShape, needed
    from slicer.heal.finetune.settings import Training, resolve
    from slicer.runtime.compute import Compute

    adapters.require(given.method)
    asked = Training(
        method=given.method, max_steps=given.steps, batch_size=given.batch_size, micro_batch=given.batch_size,
        seq_len=given.seq_len, lora_r=given.rank, learning_rate=1e-4, compute=given.compute, validation_samples=1,
        eval_every=given.steps, gradient_checkpointing=given.gradient_checkpointing,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    base = Checkpoint.open(given.model)
    settings, _ = resolve(asked, str(given.model), base.parameters, most_tokens=None, on_gpu=on_gpu)
    corpus = prepare(TextSpec(given.calibration), settings.size, base, given.work / "corpus")
    formula = needed(
        ModelShape.of(base.config), method=given.method, rank=given.rank,
        micro_batch=settings.micro_batch, seq_len=given.seq_len,
        gradient_checkpointing=given.gradient_checkpointing,
        bytes_a_value=getattr(torch, settings.compute).itemsize,
    )  # fmt: skip
    with _Memory() as memory:
        model = adapters.load(base, settings, Compute())
        times = (
            _slicer(model, corpus, settings, given.work / f"run-{os.getpid()}")
            if way == "slicer"
            else _bare(model, corpus, settings)
        )
    steps = len(times) - 1 - _WARM
    seconds = times[-1] - times[_WARM]
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": steps * given.batch_size * given.seq_len / seconds,
        "peak_gb": peak / 1e9,
        "taken_gb": (peak if on_gpu else memory.taken) / 1e9,
        "formula_gb": formula["all"] / 1e9,
    }


class _Memory:
    """Peak anonymous memory of this process while open, beyond that at the start; bytes in `taken`."""

    taken = 0

    def __enter__(self) -> _Memory:
        self._before, self._over = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.taken = max(self.taken, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def _slicer(model: Any, corpus: Any, settings: Any, work: Path) -> list[float]:
    """The end time of each step, in seconds."""
    from slicer.heal.finetune.trainer import train
    from slicer.progress import Progress

    class Clock(Progress):
        times: list[float] = []

        def advance(self, amount: int = 1) -> None:
            self.times += [time.monotonic()] * amount

    clock = Clock()
    train(model, corpus, settings, work, clock)
    return clock.times


def _bare(model: Any, corpus: Any, settings: Any) -> list[float]:
    import torch

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
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
    return times


if __name__ == "__main__":
    main()
