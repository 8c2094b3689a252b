"""Benchmark of dropping attention, feed-forward sublayers, whole layers or half-offset blocks, with each repair.

    python -m slicer.benchmarks.rivals.sublayers --model DIR --calibration TEXT --held-out TEXT
        [--samples 32] [--seq-len 256] [--held-out-samples 16] [--rank 32] [--train-steps N]
        [--shapley PASSES [--shapley-samples N]] --out DIR

1/6, 1/4 and 1/3 of each kind are dropped, chosen by angular distance at the last token of the calibration text, in one
pass. For each cut the loss on the held-out text is measured: bare, with a constant, with a low-rank linear map
(`slicer.heal.compensate.linear`) and folded (`slicer.heal.compensate.fold`), all fitted on the same calibration tokens;
with --train-steps the linear map is also trained on them for that many steps. With --shapley the attention sublayers
are also chosen by leave-one-out loss and by Shapley values on the calibration text.
Finished cells are kept in OUT/sublayers.json and not run again; the tables go to OUT/sublayers.md.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.script import options
from slicer.checkpoint import hub
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.linear import linear, train
from slicer.heal.patch import holds, written_dtype
from slicer.measure.analysis import Analysis
from slicer.measure.distances import measure_halves
from slicer.measure.shapley import Coalitions, leave_one_out, shapley
from slicer.model.load import load_model
from slicer.model.pruned import Edits, pruned
from slicer.model.verify import text_loss
from slicer.model.walk import Walk
from slicer.plan.amounts import Amount, Goal
from slicer.plan.blocks import rank_sublayers
from slicer.plan.choose import choose
from slicer.plan.plan import METRIC, Plan, spell_dropped
from slicer.runtime.workdir import Notebook

FRACTIONS = {"1/6": 1 / 6, "1/4": 1 / 4, "1/3": 1 / 3}
KINDS = ("attention", "feed-forward", "whole layers", "half-offset")
WAYS = ("bare", "bias", "linear", "fold")
TRAINED = "linear, trained"


def main() -> None:
    defaults = {"samples": 32, "held_out_samples": 16, "seq_len": 256, "batch_size": 4, "rank": 32, "dtype": "float32"}
    parser = options(__doc__, **defaults)
    parser.add_argument("--model", required=True, help="directory, Hub id or demo")
    parser.add_argument("--calibration", required=True, help="text to choose and fit on")
    parser.add_argument("--held-out", required=True, help="text to measure the loss on")
    parser.add_argument("--train-steps", type=int, default=0, help="also train the linear maps for this many steps")
    parser.add_argument("--shapley", type=float, default=0, help="forward passes for Shapley values")
    parser.add_argument("--shapley-samples", type=int, help="calibration sequences for them [default: all]")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


def run(given: argparse.Namespace) -> None:
    """Run all missing cells, then write the tables."""
    given.out.mkdir(parents=True, exist_ok=True)
    book = Notebook(given.out / "sublayers.json")
    settings = {k: str(v) for k, v in vars(given).items() if k != "out" and v}
    if book.take("settings", lambda: settings) != settings:
        raise SystemExit(f"{given.out / 'sublayers.json'}: holds figures of other settings; choose another --out")
    path = hub.resolve(given.model).path
    source, model = Checkpoint.open(path), load_model(path, dtype=given.dtype, device="cpu")
    walk = Walk.in_memory(model)
    depth = walk.depth

    def batches(text: str, samples: int) -> list[torch.Tensor]:
        spec = TextSpec(source=text, samples=samples, seq_len=given.seq_len, batch_size=given.batch_size)
        return token_batches(spec, path, model).batches

    fitted, judged = batches(given.calibration, given.samples), batches(given.held_out, given.held_out_samples)
    # nats per token, of one sequence at a time
    rows = [(row, row) for batch in judged for row in batch.split(1)]

    def cell(plan: Plan, way: str) -> dict[str, Any]:
        started = time.perf_counter()
        edits: Edits = {}
        if way == "fold":
            edits = fold(walk, fitted, plan, holds=holds(source), written=written_dtype(source, None)).edits
        elif way != "bare":
            found = linear(walk, fitted, plan, way.split(",")[0], given.rank if "linear" in way else None)
            edits = (train(walk, fitted, plan, found, given.train_steps) if way == TRAINED else found).edits
        seconds = time.perf_counter() - started
        with pruned(model, plan, edits):
            loss = text_loss(model, rows)
        return {"loss": loss, "seconds": round(seconds, 1), "dropped": spell_dropped(plan)}

    book.take("whole model", lambda: {"loss": text_loss(model, rows)})
    layers, halves = measure_halves(walk, fitted)
    measured = Analysis(layers.depth, layers.samples, layers.seq_len, {METRIC: layers}, sublayers={METRIC: halves})
    for name, fraction in FRACTIONS.items():
        for kind in KINDS:
            plan = chosen(kind, round(fraction * depth), measured)
            for way in (*WAYS, *([TRAINED] if given.train_steps else [])):
                key = f"{kind} {name} {way}"
                print(key, book.take(key, partial(cell, plan, way))["loss"], flush=True)
    if given.shapley:
        few = list(torch.cat(fitted)[: given.shapley_samples].split(given.batch_size))
        found = book.take("importances", lambda: importances(walk, few, given.shapley))
        orders = {by: sorted(range(1, depth), key=lambda i: found[by][2 * i]) for by in ("leave-one-out", "Shapley")}
        orders["angular distance"] = [i for _, i, _ in rank_sublayers(halves, range(1, depth), ())]
        for name, fraction in FRACTIONS.items():
            for by, order in orders.items():
                plan = Plan.whole(depth).without(order[: round(fraction * depth)], ())
                book.take(f"by {by} {name}", partial(cell, plan, "bare"))
    (given.out / "sublayers.md").write_text(tables(book.values), "utf-8")
    print(tables(book.values))


def chosen(kind: str, n: int, measured: Analysis) -> Plan:
    """The plan that drops n of a kind, by angular distance."""
    amount = Amount(count=n)
    goal = {"attention": Goal(drop_attention=amount), "feed-forward": Goal(drop_ffn=amount)}
    offset = "half" if kind == "half-offset" else "whole"
    return choose(goal.get(kind, Goal(drop=amount)), measured.depth, measured, lambda plan: None, offset=offset).plan


def importances(walk: Walk, batches: list[torch.Tensor], passes: float) -> dict[str, Any]:
    """The importance of every sublayer for the loss on `batches`, by leaving it out and by its Shapley value."""
    coalitions = Coalitions(walk, batches, sublayers=True)
    alone, together = leave_one_out(coalitions), shapley(coalitions, passes)
    return {
        "loss": 0.0, "leave-one-out": alone.mean, "Shapley": together.mean, "pairs": len(together.samples),
        "error": together.standard_error, "passes": together.passes,
    }  # fmt: skip


def tables(cells: dict[str, Any]) -> str:
    """Markdown tables: losses of every kind, fraction and method; and of the choices of attention, if measured."""
    whole = cells["whole model"]["loss"]
    ways = [way for way in (*WAYS[:3], TRAINED, WAYS[3]) if f"{KINDS[0]} {next(iter(FRACTIONS))} {way}" in cells]
    rows = []
    for kind in KINDS:
        for name in FRACTIONS:
            label = f"{name}, half-offset" if kind == "half-offset" else f"{name} of {kind}"
            rows.append([label, *(f"{cells[f'{kind} {name} {way}']['loss']:.3f}" for way in ways)])
    lines = [f"Whole model: {whole:.3f} nats per token.", "", *markdown_table(["removed", *ways], rows)]
    if "importances" in cells:
        by = ("angular distance", "leave-one-out", "Shapley")
        rows = [[name, *(f"{cells[f'by {b} {name}']['loss']:.3f}" for b in by)] for name in FRACTIONS]
        lines += ["", *markdown_table(["attention removed, chosen by", *by], rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
