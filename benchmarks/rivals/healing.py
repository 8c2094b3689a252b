"""Benchmark of healing methods: the share of a cut's loss increase that each removes, on held-out text.

    python -m slicer.benchmarks.rivals.healing --model DIR --calibration A.jsonl --calibration B.txt \
        --held-out wiki=wiki.test.txt --held-out c4=docs.jsonl [--drop 2,4,6,8] [--samples 64] [--seq-len 512]

Baselines in the same run, on the same tokens: the bare cut, and ReplaceMe's transform (`--solver transform`). Layers
are chosen by angular distance on the calibration text, as in `slicer convert`. The share removed is
(bare - healed) / (bare - all layers) in nats per token, averaged over the held-out texts; new tensors are rounded to
the checkpoint's dtypes. The source's activations are computed once for all depths and methods; their time is listed
separately, and a single fold needs it too.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from slicer.benchmarks.process import peak_memory
from slicer.benchmarks.script import options
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.regression import split
from slicer.heal.patch import holds, written_dtype
from slicer.measure.analysis import Distances
from slicer.measure.distances import table
from slicer.measure.metrics import angles
from slicer.model.load import load_model
from slicer.model.pruned import Edits, pruned
from slicer.model.verify import text_loss
from slicer.model.walk import SourceActivations, Walk
from slicer.plan.amounts import parse_amount, spell_layers
from slicer.plan.blocks import rank
from slicer.plan.plan import METRIC, Plan


def main() -> None:
    defaults = {"drop": "2,4,6,8", "samples": 64, "seq_len": 512, "held_out_samples": 8, "ways": "transform,resolve"}
    parser = options(__doc__, model=DEMO, **defaults, dtype="float32", device="auto")
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--halves", type=Path, metavar="FILE", help="Calibrate on every other paragraph, hold out the rest."
    )
    parser.add_argument("--layers", help="Drop these layers instead of choosing, e.g. 10-13.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slicer-healing-") as scratch:
        run(parser, given, Path(scratch))


def run(parser: argparse.ArgumentParser, given: argparse.Namespace, scratch: Path) -> None:
    """Print the table, row by row."""
    if given.halves is not None:
        paragraphs = given.halves.read_text("utf-8").split("\n\n")
        for name, part in (("fitted", paragraphs[::2]), ("held", paragraphs[1::2])):
            (scratch / f"{name}.txt").write_text("\n\n".join(part), "utf-8")
        given.calibration.append(str(scratch / "fitted.txt"))
        given.held_out.append(f"{given.halves.stem}={scratch / 'held.txt'}")
    if not given.calibration or not given.held_out:
        parser.error("pass --calibration and --held-out, or --halves")
    model = load_model(given.model, dtype=given.dtype, device=given.device)
    checkpoint = Checkpoint.open(given.model)
    walk = Walk.in_memory(model)
    activations = SourceActivations(1 << 62)

    def tokens(sources: list[str], samples: int, seed: int) -> torch.Tensor:
        spec = TextSpec(",".join(sources), samples, given.seq_len, batch_size=samples, seed=seed)
        return torch.cat(token_batches(spec, given.model, model).batches)

    batches = list(tokens(given.calibration, given.samples, 0).split(4))
    texts = dict(pair.split("=", 1) for pair in given.held_out)
    held = {name: tokens([file], given.held_out_samples, 1) for name, file in texts.items()}
    started = time.perf_counter()
    distances = angular(walk, split(batches).batches, activations)
    print(f"activations of the source: {time.perf_counter() - started:.0f} s")
    if given.layers is None:
        cuts = [rank(distances, int(n))[0].dropped for n in given.drop.split(",")]
    else:
        cuts = [parse_amount(given.layers).layers or ()]

    def loss(dropped: Sequence[int], edits: Edits) -> list[float]:
        """Nats per token on each held-out text, of the source without `dropped` and with `edits`."""
        with pruned(model, Plan.dropping(walk.depth, dropped), edits) if dropped else contextlib.nullcontext():
            return [text_loss(model, [(row, row) for row in part.split(1)]) for part in held.values()]

    whole = loss((), {})
    names = list(held)
    print(f"all {walk.depth} layers: " + ", ".join(f"{n} {x:.4f}" for n, x in zip(names, whole, strict=True)))
    print(f"\n| dropped | method | {' | '.join(names)} | closed | seconds |\n|---|---|{'---|' * len(names)}---|---|")
    settled = {"holds": holds(checkpoint), "written": written_dtype(checkpoint, None), "activations": activations}
    for dropped in cuts:
        bare = loss(dropped, {})
        gap = sum(bare) - sum(whole)
        show(dropped, "bare", bare, None, None)
        for way in given.ways.split(","):
            started = time.perf_counter()
            found = fold(walk, batches, Plan.dropping(walk.depth, dropped), solver=way, **settled)
            seconds = time.perf_counter() - started
            now = loss(dropped, found.edits)
            show(dropped, way, now, (sum(bare) - sum(now)) / gap, seconds)
            for entry in found.report:
                print("   ", entry, flush=True)
            print("   ", found.losses, flush=True)
    print(f"\npeak resident memory {peak_memory(False) / 1e9:.1f} GB, {torch.get_num_threads()} threads")


def show(dropped: Sequence[int], way: str, values: list[float], closed: float | None, seconds: float | None) -> None:
    cells = [f"{x:.4f}" for x in values]
    cells += ["" if closed is None else f"{closed:.0%}", "" if seconds is None else f"{seconds:.0f}"]
    print(f"| {spell_layers(dropped)} | {way} | {' | '.join(cells)} |", flush=True)


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
