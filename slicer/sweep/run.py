"""Estimates the remaining time of a sweep from the cells already finished."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint import hub
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.reader import Checkpoint, refuse_quantized
from slicer.data.sources import TextSpec, check_sources, local_files
from slicer.errors import ArchitectureError, EvaluationError, HealError, OutOfMemory
from slicer.evaluate import backends
from slicer.evaluate.results import Evaluation
from slicer.evaluate.suite import Suite, SuiteSpec, describe
from slicer.heal.finetune.settings import Training
from slicer.measure.analysis import Analysis, Distances
from slicer.plan.amounts import Amount, Goal
from slicer.plan.choose import choose
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import TextRecord
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import world
from slicer.runtime.files import digest_of, write_atomically
from slicer.sweep import cell as cell_jobs
from slicer.sweep.grid import UNPRUNED, Cell
from slicer.sweep.prefix import Prefix
from slicer.sweep.store import Journal, began_with

if TYPE_CHECKING:
    from slicer.data.calibration import TokenBatches
    from slicer.model.walk import SourceActivations


class Clock:
    """Remaining time, from the seconds per layer of finished cells with the same healing method."""

    def __init__(self, journal: Journal, cells: Sequence[Cell], depth: int) -> None:
        self._journal, self._cells, self._depth = journal, cells, depth

    def left(self) -> str:
        rates: dict[str, list[float]] = {}
        todo = []
        for cell in self._cells:
            record = self._journal.get(cell.name)
            if record is None:
                todo.append(cell)
            elif record.get("seconds"):
                rates.setdefault(cell.heal, []).append(record["seconds"] / (self._depth - cell.n))
        done = len(self._cells) - len(todo)
        known = [rate for each in rates.values() for rate in each]
        if not known:
            return f"{done} of {len(self._cells)} cells done"
        slowest = max(known)
        seconds = (
            sum(
                (sum(rates[c.heal]) / len(rates[c.heal]) if c.heal in rates else slowest)
                * (self._depth - c.n)
                for c in todo
            )
            / world()
        )
        minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f"{done} of {len(self._cells)} cells done, about {minutes} left"


_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class SweepOptions:
    """How every cell is made and evaluated."""

    evaluation: SuiteSpec = field(default_factory=SuiteSpec)
    calibration: TextSpec = field(default_factory=TextSpec)
    training: Training = field(default_factory=Training)
    command: str | None = None


class Sweep:
    """One source, one suite, one directory of finished cells. Use as a context manager.

    Raises SourceError, EvaluationError, CalibrationError or OutputError before any cell starts.
    """

    def __init__(
        self, source: str, directory: Path, options: SweepOptions, progress: Progress | None = None
    ) -> None:
        self.source, self.options, self.progress = source, options, progress or Progress()
        self.found = hub.resolve(source)
        self.checkpoint = Checkpoint.open(self.found.path)
        refuse_quantized(self.checkpoint)
        self.checkpoint.check_layers()
        self.depth = self.checkpoint.depth
        if options.evaluation.backend != "hf":
            raise EvaluationError("sweep needs --backend hf: it cuts the model in memory")
        self._precision = self._pick_precision(directory)
        self.suite = Suite(options.evaluation, self.progress)
        try:
            settings = {
                "source": source, "revision": self.found.revision, "depth": self.depth,
                **describe(options.evaluation), "precision": self._precision,
                "text": self.suite.excerpts and self.suite.excerpts.digest,
                "task_files": digest_of(self.suite.files), "calibration": asdict(options.calibration),
                "calibration_files": digest_of(local_files(options.calibration)),
            }  # fmt: skip
            self.journal = Journal(directory, settings)
        except BaseException:
            self.suite.close()
            raise
        self._text_checked = False
        self._model: Any = None
        self._first_layers: Prefix | None = None
        self._course: SourceActivations | None = None  # activation cache of the source, shared by all folds
        self._batches: TokenBatches | None = None
        self._distances: Distances | None = None
        self._provenance: dict[str, Any] = {}

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.suite.close()
        self.journal.close()

    # --- cells -----------------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell]) -> None:
        """Finish all of `cells`, together with other processes of the sweep; returns when every cell is finished.

        A cut that cannot be expressed or healed is stored as a finished cell with its error. Raises CalibrationError
        before any cell starts, and OutOfMemory if healing runs out of memory: the next run tries that cell again.
        """
        cell_jobs.require({cell.heal for cell in cells})
        cell_jobs.check_alike(self.journal, cells, self.options.training)
        self.check_text(cells)
        clock = Clock(self.journal, cells, self.depth)
        while todo := [cell for cell in cells if self.journal.get(cell.name) is None]:
            worked = False
            for cell in todo:
                with self.journal.claim(cell.name) as mine:
                    if not mine or self.journal.get(cell.name) is not None:
                        continue
                    self.suite.progress.note(f"{cell.name}: {clock.left()}")
                    self.journal.put(cell.name, self._work(cell))
                    worked = True
            if not worked:
                time.sleep(_WAIT_SECONDS)  # the remaining cells are locked by other processes

    def check_text(self, cells: Sequence[Cell]) -> None:
        """Raise CalibrationError if one of `cells` needs calibration text that cannot be read."""
        if self._text_checked:
            return
        left = [cell for cell in cells if self.journal.get(cell.name) is None]
        measures = self.journal.get("distances") is None and any(c.strategy == "similarity" for c in left)
        if measures or any(cell.heal != "none" for cell in left):
            check_sources(self.options.calibration)
            self._text_checked = True

    def result(self, cell: Cell) -> Evaluation | None:
        """The evaluation of a finished cell; None if the architecture cannot express the cut."""
        record = self.journal.get(cell.name)
        assert record is not None
        return Evaluation.from_dict(record["evaluation"]) if record["evaluation"] else None

    def plan(self, cell: Cell) -> Plan:
        """Which layers a cell drops."""

        def why_not(plan: Plan) -> str | None:
            try:
                sliced_config(self.checkpoint, plan, trust_remote_code=self._trusted)
            except ArchitectureError as error:
                return str(error)
            return None

        goal, measured = Goal(drop=Amount(count=cell.n)), None
        if cell.strategy == "similarity":
            distances = self.distances()
            measured = Analysis(
                self.depth,
                distances.samples,
                distances.seq_len,
                {METRIC: distances},
                calibration=TextRecord.of(self._provenance),
            )
        return choose(goal, self.depth, measured, why_not, strategy=cell.strategy, seed=cell.seed).plan

    def _work(self, cell: Cell) -> dict[str, Any]:
        started = time.monotonic()
        record: dict[str, Any] = {"cell": cell.to_dict(), "depth": self.depth, "error": None}
        name = f"{self.source} {cell.name}"
        try:
            if cell == UNPRUNED:
                evaluation = self._measure(name)
            else:
                plan = self.plan(cell)
                record |= {"dropped": list(plan.dropped), "distance": plan.distance}
                config = sliced_config(self.checkpoint, plan, trust_remote_code=self._trusted)
                evaluation = self._cut(cell, plan, config, name, record)
        except OutOfMemory:  # not a property of the cut: a second run may succeed
            raise
        except (ArchitectureError, HealError) as error:  # a property of this cut: continue with the others
            record |= {"error": str(error), "evaluation": None}
        else:
            record["evaluation"] = evaluation.to_dict()
        record["seconds"] = round(time.monotonic() - started, 1)
        return record

    def _cut(
        self, cell: Cell, plan: Plan, config: Mapping[str, Any], name: str, record: dict[str, Any]
    ) -> Evaluation:
        from slicer.model.pruned import shortened

        if cell.heal == "none":
            with self._prefix().shared(min(plan.dropped)), shortened(self.model(), plan, config):
                return self._measure(name)
        if cell.heal == "fold":
            from slicer.jobs.repair import Compensation, repair
            from slicer.model.walk import SourceActivations, Walk

            walk = Walk.in_memory(self.model())
            self._course = self._course or SourceActivations(
                int(memory.ACTIVATIONS_SHARE * memory.available())
            )
            patch = repair(
                self.checkpoint,
                walk,
                plan,
                self._calibration(),
                Compensation(),
                activations=self._course,
                progress=self.progress,
            )
            assert patch.record is not None
            record["healing"] = replace(patch.record, tensors=()).to_dict()
            first = min(*plan.dropped, *patch.edits)
            with self._prefix().shared(first), shortened(self.model(), plan, config, patch.edits):
                return self._measure(name)
        return self._trained(cell, plan, name, record)

    def _trained(self, cell: Cell, plan: Plan, name: str, record: dict[str, Any]) -> Evaluation:
        from slicer.model.load import load_model

        device = self._device()
        # free the memory for training, which reads from files
        self._model = self._batches = self._first_layers = self._course = None
        gc.collect()
        place = self.journal.directory / "training" / cell.name
        training = cell_jobs.training_of(cell, self.options.training)
        record["training"] = asdict(training)
        path, record["healing"] = cell_jobs.trained(
            self.checkpoint, self.source, plan, training, self.options.calibration, place,
            device=device, trust_remote_code=self._trusted, progress=self.progress,
        )  # fmt: skip
        model = load_model(path, dtype=self._precision, device=device, trust_remote_code=self._trusted)
        lm = self._wrap(model, path)
        evaluation = self.suite.run(lm, name, backends.vocabulary_of(model))
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: another process trains in it
            place.parent.rmdir()
        return evaluation

    def _measure(self, name: str) -> Evaluation:
        model = self.model()
        lm = self._wrap(model, self.found.path)
        return self.suite.run(lm, name, backends.vocabulary_of(model))

    # --- the model and the data of its cuts ------------------------------------------------------------------------

    def _wrap(self, model: Any, path: Path) -> Any:
        spec = self.options.evaluation
        return backends.wrap(
            model,
            path,
            spec.batch_size,
            trust_remote_code=spec.trust_remote_code,
            last_logits_only=True,
        )

    def model(self) -> Any:
        """The source, loaded on first use; in a distributed run, on this process's GPU."""
        if self._model is None:
            from slicer.model.load import load_model

            self.progress.stage("Loading the model")
            self._model = load_model(
                self.found.path, dtype=self._precision, device=self._device(), trust_remote_code=self._trusted
            )
        return self._model

    def _prefix(self) -> Prefix:
        if self._first_layers is None:
            self._first_layers = Prefix(self.model())
        return self._first_layers

    def _pick_precision(self, directory: Path) -> str:
        """The given dtype. For "auto": that of the unfinished sweep in `directory`, else the faster one. It is recorded
        because the free memory may change between runs, and the cells of a table must share one precision."""
        asked = self.options.evaluation.dtype
        if asked != "auto":
            return asked
        begun = began_with(directory)
        same = ("source", self.source), ("revision", self.found.revision), ("dtype", asked)
        if begun.get("precision") and all(begun.get(key) == value for key, value in same):
            return str(begun["precision"])
        return "float32" if _float32_is_faster(self._device(), self.checkpoint) else asked

    def _device(self) -> str:
        return Compute(self.options.evaluation.device).pinned().device

    @property
    def _trusted(self) -> bool:
        return self.options.evaluation.trust_remote_code

    def distances(self) -> Distances:
        """Measured once a sweep, and kept."""
        from slicer.measure.distances import measure_loaded

        if self._distances is None:
            file = self.journal.directory / "distances.json"
            while (kept := self.journal.get("distances")) is None:
                with self.journal.claim("distances") as mine:
                    if not mine:
                        time.sleep(_WAIT_SECONDS)
                        continue
                    data = self._calibration()
                    self.progress.stage("Measuring layers")
                    text = measure_loaded(self.model(), data.batches).to_json()
                    write_atomically(file, text)
                    self.journal.put("distances", {"distances": text, "provenance": data.record.to_dict()})
            self._distances = Distances.from_json(kept["distances"])
            self._provenance = kept["provenance"]
        return self._distances

    def _calibration(self) -> TokenBatches:
        """The calibration batches for similarity and healing, drawn once per process."""
        from slicer.data.calibration import token_batches

        if self._batches is None:
            model = self.model()
            self.progress.stage("Calibration data")
            self._batches = token_batches(
                self.options.calibration, self.found.path, model, trust_remote_code=self._trusted
            )
        return self._batches


def _float32_is_faster(device: str, checkpoint: Checkpoint) -> bool:
    """Whether the device is a CPU without 16-bit matrix instructions (AMX), and the model fits in float32."""
    import torch

    if Compute(device).torch_device().type != "cpu" or torch.cpu._is_amx_tile_supported():
        return False
    return memory.fits(checkpoint.bytes_as("float32"), "cpu")


def record_cells(journal: Journal, cells: Sequence[Cell], command: str | None) -> None:
    """Add `cells` and the command that requested them to the sweep's grid.json."""
    file = journal.directory / "grid.json"
    before: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(file.read_text("utf-8"))["cells"]
    asked = [cell.to_dict() | {"name": cell.name, "command": command} for cell in cells]
    known = {cell["name"] for cell in before}
    merged = before + [cell for cell in asked if cell["name"] not in known]
    write_atomically(file, json.dumps({"cells": merged, "command": command}, indent=1) + "\n")
