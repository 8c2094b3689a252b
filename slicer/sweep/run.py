"""The cells of a sweep in order, shared between processes; finished ones are stored and never made again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.config import why_not
from slicer.checkpoint.hub import Source, open_source
from slicer.data.sources import TextSpec, check_sources, local_files
from slicer.errors import ArchitectureError, EvaluationError, HealError, OutOfMemory
from slicer.evaluate.results import Evaluation
from slicer.evaluate.suite import Suite, SuiteSpec, describe
from slicer.heal.compensate.regression import TOGETHER
from slicer.heal.finetune.settings import Training
from slicer.jobs.costs import (
    LIBRARIES,
    Cut,
    Shape,
    Stage,
    Work,
    folding,
    folding_bytes,
    measuring,
    total_flops,
    work_of_training,
)
from slicer.jobs.forecast import Clock
from slicer.jobs.recipe import settings_of
from slicer.measure.analysis import Analysis
from slicer.measure.distances import measure
from slicer.plan.amounts import Amount, Goal
from slicer.plan.choose import choose
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import world
from slicer.runtime.files import digest_of, within_disk, write_atomically
from slicer.sweep.cell import TRAINED, SharedModel, check_alike, evaluated, in_memory, on_disk, require, training_of
from slicer.sweep.grid import UNPRUNED, Cell
from slicer.sweep.store import Store, began_with

_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class SweepRequest:
    """Cut `source` in many ways and evaluate every cut, into `directory`.

    Attributes:
        suite: what every cut is evaluated on.
        text: calibration text, for similarity and healing; training: of trained cells.
    """

    source: str
    directory: Path
    suite: SuiteSpec = field(default_factory=SuiteSpec)
    text: TextSpec = field(default_factory=TextSpec)
    training: Training = field(default_factory=Training)
    command: str | None = None


@dataclass(frozen=True)
class OpenSweep:
    """A sweep that is being run: its request, source, loaded suite, finished cells, and the model they share."""

    request: SweepRequest
    source: Source
    suite: Suite
    store: Store
    shared: SharedModel
    progress: Progress

    @property
    def depth(self) -> int:
        return self.source.checkpoint.depth

    def record(self, cell: Cell) -> dict[str, Any]:
        """The record of a finished cell: its evaluation, or the reason why the cut could not be made."""
        record = self.store.get(cell.name)
        assert record is not None
        return record


@contextlib.contextmanager
def open_sweep(request: SweepRequest, progress: Progress) -> Iterator[OpenSweep]:
    """Raises SourceError, EvaluationError, CalibrationError or OutputError before any cell starts."""
    source = open_source(request.source)
    if request.suite.backend != "hf":
        raise EvaluationError("sweep needs --backend hf: it cuts the model in memory")
    given = Compute(request.suite.device, trust_remote_code=request.suite.trust_remote_code)
    compute = replace(given.pinned(), dtype=_precision(request, source, given))
    with Suite(request.suite, progress) as suite:
        settings = {
            "source": request.source, "revision": source.revision, "depth": source.checkpoint.depth,
            **describe(request.suite), "precision": compute.dtype,
            "text": suite.excerpts and suite.excerpts.digest,
            "task_files": digest_of(suite.files), "calibration": asdict(request.text),
            "calibration_files": digest_of(local_files(request.text)),
        }  # fmt: skip
        with contextlib.closing(Store(request.directory, settings)) as store:
            shared = SharedModel(source, compute, request.text, request.directory, progress)
            with within_disk(request.directory):
                yield OpenSweep(request, source, suite, store, shared, progress)


def _precision(request: SweepRequest, source: Source, compute: Compute) -> str:
    """The given dtype. For "auto": that of the unfinished sweep in the directory, else the faster one. It is recorded
    because the cells of a table must share one precision, and other machines may have less memory."""
    asked = request.suite.dtype
    if asked != "auto":
        return asked
    begun = began_with(request.directory)
    same = ("source", request.source), ("revision", source.revision), ("dtype", asked)
    if begun.get("precision") and all(begun.get(key) == value for key, value in same):
        return str(begun["precision"])
    is_cpu = compute.pinned().torch_device().type == "cpu"
    float32_is_faster = is_cpu and not torch.cpu._is_amx_tile_supported()  # no matrix instructions for 16-bit numbers
    return "float32" if float32_is_faster and memory.fits(source.checkpoint.bytes_as("float32"), compute) else asked


def run_cells(sweep: OpenSweep, cells: Sequence[Cell]) -> None:
    """Finish all of `cells`, together with other processes of the sweep; returns when every cell is finished.

    A cut that cannot be expressed or healed is stored as a finished cell with its error. Raises CalibrationError before
    any cell starts, and OutOfMemory if healing runs out of memory: the next run tries that cell again.
    """
    store = sweep.store
    require({cell.heal for cell in cells})
    check_alike(store, cells, sweep.request.training)
    check_text(sweep, cells)
    if (work := expected_work(sweep, [cell for cell in cells if store.get(cell.name) is None])).stages:
        Clock(sweep.progress).expect(work, sweep.shared.compute)
    while todo := [cell for cell in cells if store.get(cell.name) is None]:
        worked = False
        for cell in todo:
            with store.claim(cell.name) as mine:
                if not mine or store.get(cell.name) is not None:
                    continue
                sweep.progress.note(f"{cell.name}: {time_left(store, cells, sweep.depth)}")
                store.put(cell.name, _work(sweep, cell))
                worked = True
        if not worked:
            time.sleep(_WAIT_SECONDS)  # the remaining cells are locked by other processes


def check_text(sweep: OpenSweep, cells: Sequence[Cell]) -> None:
    """Raise CalibrationError if one of `cells` needs calibration text that cannot be read."""
    left = [cell for cell in cells if sweep.store.get(cell.name) is None]
    measures = sweep.store.get("distances") is None and any(c.strategy == "similarity" for c in left)
    if measures or any(cell.heal != "none" for cell in left):
        check_sources(sweep.request.text)


def expected_work(sweep: OpenSweep, cells: Sequence[Cell]) -> Work:
    """The work of `cells` beside their evaluation, whose time the first finished ones tell."""
    checkpoint, compute, text, depth = sweep.source.checkpoint, sweep.shared.compute, sweep.request.text, sweep.depth
    shape, stages = Shape.of(checkpoint, compute.dtype), list[Stage]()
    if sweep.store.get("distances") is None and any(cell.strategy == "similarity" for cell in cells):
        stages.append(measuring(shape, text, streams=False))
    healed = [cell for cell in cells if cell.heal != "none" and cell.n]
    cuts = [Cut.expected(None, cell.strategy, depth, cell.n) for cell in healed]
    flops = total_flops(stage for cut in cuts for stage in folding(shape, text, cut, streams=False))
    if healed:
        stages.append(Stage(f"Folding {len(healed)} cells", flops))
    trainings, disk = list[Stage](), dict[Path, int]()
    for cell in healed:
        if cell.heal.startswith(TRAINED):
            place = sweep.request.directory / "training" / cell.name
            asked = training_of(cell, sweep.request.training)
            settings, _ = settings_of(asked, sweep.request.source, checkpoint, compute)
            work = work_of_training(
                settings, text, compute, checkpoint, depth - cell.n, place, None, base=True, cut=True
            )
            trainings += [stage for stage in work.stages if stage.flops]
            disk = {place: max(sum(work.disk.values()), *disk.values(), 0)}  # one at a time
    if trainings:
        stages.append(Stage(f"Training {len(trainings)} cells", total_flops(trainings)))
    device, kept = folding_bytes(shape, text, max(cuts, key=lambda cut: cut.rest)) if cuts else (0, 0)
    on_gpu, weights = compute.torch_device().type == "cuda", shape.total_bytes + device
    activations = min(depth * shape.itemsize * shape.d * text.samples * text.seq_len if cuts else 0,
                      int(memory.ACTIVATIONS_SHARE * memory.budget(compute)))  # fmt: skip
    host = LIBRARIES + kept + activations + (0 if on_gpu else weights)
    tokens, file = min(text.batch_size * text.seq_len, TOGETHER), next(iter(checkpoint.tensors.values())).file
    return Work(
        tuple(stages), host, weights if on_gpu else 0, disk, shape, tokens, file, "; beside the evaluation of each cell"
    )


def plan_of(sweep: OpenSweep, cell: Cell) -> Plan:
    """Which layers a cell drops. Raises PlanError, ArchitectureError if no such cut can be expressed."""
    asked = partial(why_not, sweep.source.checkpoint, trust_remote_code=sweep.shared.compute.trust_remote_code)
    measured = _measured(sweep) if cell.strategy == "similarity" else None
    goal = Goal(drop=Amount(count=cell.n))
    return choose(goal, sweep.depth, measured, asked, strategy=cell.strategy, seed=cell.seed).plan


def _measured(sweep: OpenSweep) -> Analysis:
    """Measured once a sweep, by one process, and kept."""
    while (kept := sweep.store.get("distances")) is None:
        with sweep.store.claim("distances") as mine:
            if not mine:
                time.sleep(_WAIT_SECONDS)
                continue
            found = measure(sweep.shared.walk, sweep.shared.text, False, sweep.progress)
            write_atomically(sweep.request.directory / "distances.json", found.distances().to_json())
            sweep.store.put("distances", {"analysis": found.to_json()})
    return Analysis.from_json(kept["analysis"])


def _work(sweep: OpenSweep, cell: Cell) -> dict[str, Any]:
    """The record of a cell that was made and evaluated, or of the reason why it cannot be."""
    started = time.monotonic()
    record: dict[str, Any] = {"cell": asdict(cell), "depth": sweep.depth, "error": None, "evaluation": None}
    try:
        record["evaluation"] = _evaluated(sweep, cell, record).to_dict()
    except OutOfMemory:  # not a property of the cut: a second run may succeed
        raise
    except (ArchitectureError, HealError) as error:  # a property of this cut: continue with the others
        record["error"] = str(error)
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


def _evaluated(sweep: OpenSweep, cell: Cell, record: dict[str, Any]) -> Evaluation:
    request, shared, suite = sweep.request, sweep.shared, sweep.suite
    name = f"{request.source} {cell.name}"
    if cell == UNPRUNED:
        return evaluated(shared.walk.model, sweep.source.path, suite, name)
    plan = plan_of(sweep, cell)
    record |= {"dropped": list(plan.dropped), "distance": plan.distance}
    healing: HealingRecord | None
    if cell.heal.startswith(TRAINED):
        training, place = training_of(cell, request.training), request.directory / "training" / cell.name
        record["training"] = asdict(training)
        evaluation, healing = on_disk(plan, training, shared, place, suite, name)
    else:
        evaluation, healing = in_memory(cell, plan, shared, sweep.store.stages(cell.name), suite, name)
    if healing is not None:
        record["healing"] = replace(healing, tensors=()).to_dict()
    return evaluation


def time_left(store: Store, cells: Sequence[Cell], depth: int) -> str:
    """The remaining time, from the seconds per layer of finished cells with the same healing method."""
    rates: dict[str, list[float]] = {}
    records = [(cell, store.get(cell.name)) for cell in cells]
    todo = [cell for cell, record in records if record is None]
    for cell, record in records:
        if record is not None and record.get("seconds"):
            rates.setdefault(cell.heal, []).append(record["seconds"] / (depth - cell.n))
    done = f"{len(cells) - len(todo)} of {len(cells)} cells done"
    if not rates:
        return done
    means = {heal: sum(each) / len(each) for heal, each in rates.items()}
    slowest = max(max(each) for each in rates.values())
    seconds = sum(means.get(cell.heal, slowest) * (depth - cell.n) for cell in todo) / world()
    return f"{done}, about {f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'} left"


def record_cells(store: Store, cells: Sequence[Cell], command: str | None) -> None:
    """Add `cells` and the command that requested them to the sweep's grid.json."""
    file = store.directory / "grid.json"
    before: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(file.read_text("utf-8"))["cells"]
    asked = [asdict(cell) | {"name": cell.name, "command": command} for cell in cells]
    known = {cell["name"] for cell in before}
    merged = before + [cell for cell in asked if cell["name"] not in known]
    write_atomically(file, json.dumps({"cells": merged, "command": command}, indent=1) + "\n")
