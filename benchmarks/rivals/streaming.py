"""Benchmark of streaming a 13B-shaped checkpoint from disk: rate against plain reading, peak memory, resuming.

    python -m slicer.benchmarks.rivals.streaming [--directory DIR] [--layers 40] [--tokens 16] [--memory 3GB]

Writes the checkpoint (40 layers, hidden size 5120, bfloat16, 26 GB) into DIR and deletes it afterwards; uses fewer
layers if the disk is too small. Every run is a separate process with the files out of the page cache, also the plain
reading (the first ten of the same files, in order, 16 MB at a time). The sequence has few tokens, so that the disk is
the limit; a run of four layers with --compute-tokens measures the speed of computing, and a last run of all layers is
compared with the time that the planning formula predicts from these rates. The walk is that of `slicer analyze`: it
records the states of every metric and is resumable.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import Peak, memory_of, module_command, run_module
from slicer.benchmarks.script import VOCABULARY, drop_cache, options, read_plainly, write_llama

HIDDEN, INTERMEDIATE, HEADS = 5120, 13824, 40
LAYER_PARAMETERS = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
OUTSIDE_PARAMETERS = 2 * VOCABULARY * HIDDEN + HIDDEN
GIB = 2**30


def main() -> None:
    defaults = {"directory": Path(tempfile.gettempdir()), "layers": 40, "tokens": 16, "compute_tokens": 512}
    given = options(__doc__, **defaults, memory="3GB").parse_args()
    if given.worker:
        model, out, tokens, layers, memory = given.worker
        print(json.dumps(work(Path(model), Path(out), int(tokens), int(layers), memory)))
        return
    free = shutil.disk_usage(given.directory).free - 2 * 10**9
    layers = min(given.layers, (free - 2 * OUTSIDE_PARAMETERS) // (2 * LAYER_PARAMETERS))
    if layers < given.layers:
        print(f"{given.directory} has {free / 1e9:.0f} GB free: {layers} layers instead of {given.layers}")
    with tempfile.TemporaryDirectory(prefix="slicer-13b-", dir=given.directory, ignore_cleanup_errors=True) as scratch:
        run(Path(scratch), layers, given)


def run(scratch: Path, layers: int, given: argparse.Namespace) -> None:
    model = scratch / "model"
    write_llama(
        model, num_hidden_layers=layers, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip

    def worker(name: str, tokens: int, layers: int = layers) -> tuple[object, ...]:
        drop_cache(model)
        return ("rivals.streaming", "--worker", model, scratch / name, tokens, layers, given.memory)

    def walk(name: str, *asked: int) -> dict[str, float]:
        return run_module(f"the run {name!r}", *worker(name, *asked))

    plain = read_plainly(model)
    report = walk("whole", given.tokens)
    plain_again = read_plainly(model)
    out = scratch / "killed"
    victim = subprocess.Popen(module_command(*worker("killed", given.tokens)), stdout=subprocess.DEVNULL)
    while not (out / f"layer-{layers // 2:03d}.safetensors").exists():
        if victim.poll() is not None:
            sys.exit("the run finished before it could be killed")
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    resumed = walk("killed", given.tokens)
    states = [f"layer-{i:03d}.safetensors" for i in range(layers + 1)]
    same = all((out / name).read_bytes() == (scratch / "whole" / name).read_bytes() for name in states)
    few = min(4, layers)
    busy = walk("busy", given.compute_tokens, few)
    flops = 2.0 * LAYER_PARAMETERS * given.compute_tokens * few / busy["advance_seconds"]
    many = walk("many", given.compute_tokens)
    rate = 2 * LAYER_PARAMETERS * layers / report["walk_seconds"] / 1e6
    fastest = max(plain, plain_again)
    memory = f"{report['peak'] / GIB:.2f} GiB, {report['anonymous'] / GIB:.2f} GiB"
    rows = [
        ["plain sequential reading, before and after", f"{plain:,.0f} and {plain_again:,.0f} MB/s"],
        ["walk, start to end of the last layer", f"{report['walk_seconds']:.1f} s, {rate:,.0f} MB/s"],
        ["walk / plain (the faster)", f"{rate / fastest:.2f}"],
        ["peak resident memory, without file-backed pages", memory],
        [f"killed after layer {layers // 2 - 1}, resumed at layer", f"{resumed['first']}"],
        ["stored states of the resumed run equal byte for byte", "yes" if same else "NO"],
        [f"computing, {given.compute_tokens} tokens, {few} layers", f"{flops / 1e9:,.0f} GFLOP/s"],
    ]
    for tokens, measured in ((given.tokens, report), (given.compute_tokens, many)):
        # formula of docs/guide/analyze.md
        planned = layers * max(2e-6 * LAYER_PARAMETERS / fastest, 2.0 * LAYER_PARAMETERS * tokens / flops)
        what = f"{tokens} tokens, all layers: predicted from these rates, measured"
        rows.append([what, f"{planned:.1f} s, {measured['walk_seconds']:.1f} s"])
    print(f"\n{layers} layers of {2 * LAYER_PARAMETERS / 1e6:.0f} MB, {given.tokens} tokens, {given.memory}\n")
    print(*markdown_table(["", ""], rows), sep="\n")


def work(model: Path, out: Path, tokens: int, layers: int, memory: str) -> dict[str, float]:
    """The walk itself, in its own process: seconds, and memory in bytes."""
    import torch

    from slicer.measure.distances import distance_tables
    from slicer.measure.recorder import Portion, record
    from slicer.model.walk import Walk
    from slicer.plan.amounts import parse_size
    from slicer.progress import Progress

    class Watch(Progress):
        """Records the layer where the run began."""

        first = 0

        def advance(self, amount: int = 1) -> None:
            if amount > 1:
                self.first = amount

    out.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    with Peak(lambda: memory_of("RssAnon")) as anonymous:
        walk = Walk.out_of_core(model, device="cpu", memory=parse_size(memory, "--memory"))
        batch = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        if out.name == "busy":  # only measures the speed of computing
            states = walk.start([batch])
            spent = 0.0
            for i in range(layers):
                with walk.layer(i):
                    started = time.perf_counter()
                    walk.advance(i, states)
                    spent += time.perf_counter() - started
            return {"advance_seconds": spent}
        began = time.perf_counter()
        portion = Portion.of([batch])
        found = record(walk, portion, out, positions=16, points=16, resumable=True, progress=watch)
        walked = time.perf_counter() - began
        distance_tables(found, portion, Progress())
    return {"walk_seconds": walked, "first": watch.first, "peak": memory_of("VmHWM"), "anonymous": anonymous.most}


if __name__ == "__main__":
    main()
