"""Benchmark of dropping attention, feed-forward parts, whole layers or half-offset blocks, with each weight
compensation.

    python -m slicer.benchmarks.sublayers --model DIR --calibration TEXT --held-out TEXT [--samples 32] [--seq-len 256]
        [--held-out-samples 16] [--rank 32] [--train-steps N] [--shapley PASSES [--shapley-samples N]]
        --out DIR

Drops 1/6, 1/4 and 1/3 of each kind, by angular distance of the last token on the calibration text, measured in one
pass. Each cut is scored by its loss on the held-out text: bare, with a constant, with a low-rank linear map
(`slicer.heal.emulate`) and folded (`slicer.heal.fold_parts`), all fitted on the same calibration tokens. --train-steps
also trains the linear map on them. --shapley also chooses attention by leave-one-out loss and by Shapley values on the
calibration text. Finished cells are stored in OUT/sublayers.json and not run again; the tables go to OUT/sublayers.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.model import load_model
from slicer.heal.emulate import emulate
from slicer.heal.emulate_train import train
from slicer.heal.emulation import emulated
from slicer.heal.fold_parts import fold_parts
from slicer.measure.calibration import CalibrationSpec, token_batches
from slicer.measure.halves import measure_halves
from slicer.measure.shapley import Coalitions, leave_one_out, shapley
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan, spell_dropped
from slicer.select import rank, rank_offset, rank_sublayers

FRACTIONS = {"1/6": 1 / 6, "1/4": 1 / 4, "1/3": 1 / 3}
KINDS = ("attention", "feed-forward", "whole layers", "half-offset")
WAYS = ("bare", "bias", "linear", "fold")
TRAINED = "linear, trained"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory, Hub id or demo")
    parser.add_argument("--calibration", required=True, help="text to choose and fit on")
    parser.add_argument("--held-out", required=True, help="text to measure the loss on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--train-steps", type=int, default=0, help="also train the linear maps for this many steps"
    )
    parser.add_argument("--shapley", type=float, default=0, help="forward passes for Shapley values")
    parser.add_argument("--shapley-samples", type=int, help="calibration sequences for them [default: all]")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


def run(given: argparse.Namespace) -> None:
    """Run all missing cells, then write the tables."""
    given.out.mkdir(parents=True, exist_ok=True)
    store = _CellStore(
        given.out / "sublayers.json", {k: str(v) for k, v in vars(given).items() if k != "out" and v}
    )
    path = hub.resolve(given.model).path
    model = load_model(path, dtype=given.dtype, device="cpu")

    def batches(source: str, samples: int) -> list[torch.Tensor]:
        spec = CalibrationSpec(
            source=source, samples=samples, seq_len=given.seq_len, batch_size=given.batch_size
        )
        return token_batches(spec, path, model).batches

    fitted, judged = (
        batches(given.calibration, given.samples),
        batches(given.held_out, given.held_out_samples),
    )
    walk = Walk.in_memory(model)
    store.take("whole model", lambda: {"loss": loss_of(model, judged)})
    layers, halves = measure_halves(walk, fitted)
    depth = walk.depth
    for name, fraction in FRACTIONS.items():
        n = round(fraction * depth)
        for kind in KINDS:
            plan = chosen(kind, n, depth, layers, halves)
            for way in (*WAYS, *([TRAINED] if given.train_steps else [])):
                key = f"{kind} {name} {way}"
                store.take(key, lambda p=plan, w=way: _cell(walk, model, fitted, judged, p, w, given))
                print(key, store.cells[key]["loss"], flush=True)
    if given.shapley:
        few = torch.cat(fitted)[: given.shapley_samples].split(given.batch_size)
        _choices(store, walk, model, few, judged, halves, given)
    (given.out / "sublayers.md").write_text(tables(store.cells), "utf-8")
    print(tables(store.cells))


def chosen(kind: str, n: int, depth: int, layers: Any, halves: Any) -> Plan:
    """The plan that drops n of a kind, by angular distance."""
    if kind == "whole layers":
        return Plan.dropping(depth, rank(layers, n)[0].dropped)
    if kind == "half-offset":
        i = rank_offset(halves, n)[0].start
        kept = tuple(k for k in range(depth) if not i < k <= i + n)
        return Plan(depth, kept, joined=((i, i + n),))
    which = "attention" if kind == "attention" else "ffn"
    every = (
        {"attention": range(1, depth), "ffn": ()}
        if which == "attention"
        else {"attention": (), "ffn": range(depth)}
    )
    gone = [i for _, i, _ in rank_sublayers(halves, **every)[:n]]
    return Plan.cutting(depth, **{which: gone})


def _cell(
    walk: Walk, model: Any, fitted: Any, judged: Any, plan: Plan, way: str, given: argparse.Namespace
) -> dict[str, Any]:
    started = time.perf_counter()
    found = None
    if way != "bare":
        found = (
            fold_parts(walk, fitted, plan)
            if way == "fold"
            else emulate(walk, fitted, plan, way.split(",")[0], given.rank if "linear" in way else None)
        )
    if way == TRAINED and found is not None:
        found = train(walk, fitted, plan, found, given.train_steps)
    seconds = time.perf_counter() - started
    with emulated(model, plan, found):
        loss = loss_of(model, judged)
    return {"loss": loss, "seconds": round(seconds, 1), "dropped": spell_dropped(plan)}


@torch.inference_mode()
def loss_of(model: Any, batches: Sequence[torch.Tensor]) -> float:
    """Loss in nats per token."""
    total, count = 0.0, 0
    for batch in batches:
        for row in batch.split(1):
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += row.shape[1] - 1
    return total / count


def _choices(
    store: _CellStore,
    walk: Walk,
    model: Any,
    fitted: Any,
    judged: Any,
    halves: Any,
    given: argparse.Namespace,
) -> None:
    """Losses without the attention sublayers chosen by each of three importance metrics, bare."""
    depth = walk.depth

    def values() -> dict[str, Any]:
        coalitions = Coalitions(walk, fitted, parts=True)
        alone = leave_one_out(coalitions)
        together = shapley(coalitions, given.shapley)
        return {
            "loss": 0.0,
            "leave-one-out": alone.mean,
            "Shapley": together.mean,
            "pairs": len(together.samples),
            "error": together.standard_error,
            "passes": together.passes,
        }

    store.take("importances", values)
    found = store.cells["importances"]
    orders = {
        "angular distance": [i for _, i, _ in rank_sublayers(halves, range(1, depth), ())],
        "leave-one-out": sorted(range(1, depth), key=lambda i: found["leave-one-out"][2 * i]),
        "Shapley": sorted(range(1, depth), key=lambda i: found["Shapley"][2 * i]),
    }
    for name, fraction in FRACTIONS.items():
        for by, order in orders.items():
            plan = Plan.cutting(depth, attention=order[: round(fraction * depth)])
            store.take(f"by {by} {name}", lambda p=plan: _cell(walk, model, fitted, judged, p, "bare", given))


class _CellStore:
    """Finished cells, stored in a file."""

    def __init__(self, file: Path, settings: dict[str, str]) -> None:
        self._file, self.cells = file, {"settings": settings}  # type: Path, dict[str, Any]
        if file.is_file():
            before = json.loads(file.read_text("utf-8"))
            if before["settings"] != settings:
                raise SystemExit(f"{file}: contains results of other settings; choose another --out")
            self.cells = before

    def take(self, name: str, make: Any) -> None:
        if name in self.cells:
            return
        self.cells[name] = make()
        part = self._file.with_name(self._file.name + ".part")
        part.write_text(json.dumps(self.cells, indent=1), "utf-8")
        part.replace(self._file)


def tables(cells: dict[str, Any]) -> str:
    """Markdown tables: losses of every kind, fraction and method; and of the choices of attention, if measured."""
    whole = cells["whole model"]["loss"]
    ways = [
        way for way in (*WAYS[:3], TRAINED, WAYS[3]) if f"{KINDS[0]} {next(iter(FRACTIONS))} {way}" in cells
    ]
    lines = [f"Whole model: {whole:.3f} nats per token.", ""]
    lines += ["| removed | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for kind in KINDS:
        for name in FRACTIONS:
            row = [f"{cells[f'{kind} {name} {way}']['loss']:.3f}" for way in ways]
            lines.append(f"| {name} of {kind}" if kind != "half-offset" else f"| {name}, half-offset")
            lines[-1] += " | " + " | ".join(row) + " |"
    if "importances" in cells:
        by = ("angular distance", "leave-one-out", "Shapley")
        lines += ["", "| attention removed, chosen by | " + " | ".join(by) + " |", "|---|" + "---|" * len(by)]
        for name in FRACTIONS:
            lines.append(
                f"| {name} | " + " | ".join(f"{cells[f'by {b} {name}']['loss']:.3f}" for b in by) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
