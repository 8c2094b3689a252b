"""Benchmark of healing methods: the share of a cut's distance from its source that each closes, by kind of text.

    python -m slicer.benchmarks.rivals.healing --model DIR --calibration A.jsonl --calibration B.txt \
        [--held-out wiki=wiki.test.txt] [--drop 2,4,6,8] [--samples 64] [--seq-len 512]

Rows: the bare cut, with KL(source || cut) in nats a token; then each method, with 1 - KL(source || healed) /
KL(source || bare) and its standard error over documents. Baseline in the same run, on the same tokens: ReplaceMe's
transform (`--solver transform`); `adapt` is the fold with `--adapt`. Columns: the kinds that come with slicer,
documents of the calibration text that were not fitted, and those of `--held-out`; `least` is of the kinds that were not
fitted. Layers are chosen by angular distance on the calibration text, as in `slicer convert`; new tensors are rounded
to the checkpoint's dtypes. The source's activations are computed once for all depths and methods; their time is listed
separately, and a single fold needs it too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from slicer.benchmarks.process import peak_memory
from slicer.benchmarks.script import options
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import token_batches
from slicer.data.kinds import KindText
from slicer.data.packing import open_tokenizer
from slicer.data.sources import TextSpec, documents
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.regression import split
from slicer.heal.patch import holds, written_dtype
from slicer.measure.analysis import Distances
from slicer.measure.distances import table
from slicer.measure.faithfulness import faithfulness
from slicer.measure.metrics import angles
from slicer.model.load import load_model
from slicer.model.walk import SourceActivations, Walk
from slicer.plan.amounts import parse_amount, spell_layers
from slicer.plan.blocks import rank
from slicer.plan.plan import METRIC, Plan
from slicer.progress import SILENT


def main() -> None:
    defaults = {"drop": "2,4,6,8", "samples": 64, "seq_len": 512, "ways": "transform,resolve"}
    parser = options(__doc__, model=DEMO, **defaults, dtype="float32", device="auto")
    parser.add_argument("--calibration", action="append", default=[], required=True)
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--layers", help="Drop these layers instead of choosing, e.g. 10-13.")
    run(parser.parse_args())


def run(given: argparse.Namespace) -> None:
    """Print the table, row by row."""
    model = load_model(given.model, dtype=given.dtype, device=given.device)
    checkpoint, tokenizer = Checkpoint.open(given.model), open_tokenizer(given.model, False)
    walk = Walk.in_memory(model)
    activations = SourceActivations(1 << 62)
    spec = TextSpec(",".join(given.calibration), given.samples, given.seq_len)
    text = token_batches(spec, given.model, model)
    kinds = list(text.kinds)
    for name, _, file in (pair.partition("=") for pair in given.held_out):
        kinds.append(KindText.of(name, documents(TextSpec(file)), tokenizer))
    started = time.perf_counter()
    distances = angular(walk, split(text.batches).batches, activations)
    print(f"activations of the source: {time.perf_counter() - started:.0f} s")
    if given.layers is None:
        cuts = [rank(distances, int(n))[0].dropped for n in given.drop.split(",")]
    else:
        cuts = [parse_amount(given.layers).layers or ()]
    names = [kind.kind + (" (fitted)" if kind.seen else "") for kind in kinds]
    print(f"\n| dropped | method | {' | '.join(names)} | least | seconds |\n|---|---|{'---|' * len(names)}---|---|")
    settled = {"holds": holds(checkpoint), "written": written_dtype(checkpoint, None), "activations": activations}
    for dropped in cuts:
        plan, first = Plan.dropping(walk.depth, dropped), True
        for way in given.ways.split(","):
            started = time.perf_counter()
            solver, adapt = ("resolve", True) if way == "adapt" else (way, False)
            found = fold(walk, text.batches, plan, solver=solver, adapt=adapt, **settled)
            seconds = time.perf_counter() - started
            records = faithfulness(walk, plan, found.edits, kinds, SILENT)
            if first:
                show(dropped, "bare", [f"{kind.before:.3f}" for kind in records], "", "")
            cells = [f"{kind.closed:.0%} ±{kind.closed_error:.0%}" for kind in records]
            least = min(kind.closed for kind in records if not kind.seen)
            show(dropped, way, cells, f"{least:.0%}", f"{seconds:.0f}")
            first = False
    print(f"\npeak resident memory {peak_memory(False) / 1e9:.1f} GB, {torch.get_num_threads()} threads")


def show(dropped: Sequence[int], way: str, cells: Sequence[str], least: str, seconds: str) -> None:
    print(f"| {spell_layers(dropped)} | {way} | {' | '.join(cells)} | {least} | {seconds} |", flush=True)


def angular(walk: Walk, batches: list[torch.Tensor], activations: SourceActivations) -> Distances:
    """Angular distances of the last tokens; fills the activation cache that the folds use."""
    states = walk.start(batches)
    ends = [torch.cat([state[:, -1] for state in states])]
    for i in range(walk.depth):
        activations.advance(walk, i, states)
        ends.append(torch.cat([state[:, -1] for state in states]))
    return table(METRIC, angles(torch.stack(ends)), seq_len=batches[0].shape[1])


if __name__ == "__main__":
    main()
