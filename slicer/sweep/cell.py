"""One cell of a sweep: a cut of the loaded source, healed or not, or a cut that is trained on disk; then evaluated."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.hub import Source
from slicer.data.calibration import TokenBatches, read_text
from slicer.data.sources import TextSpec
from slicer.errors import EvaluationError, HealError, OutputError
from slicer.evaluate import backends
from slicer.evaluate.results import Evaluation
from slicer.evaluate.suite import Suite
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.settings import Training
from slicer.jobs.convert import convert
from slicer.jobs.heal import heal
from slicer.jobs.repair import repair
from slicer.jobs.request import Compensation, ConvertRequest, HealRequest, Output, Text
from slicer.model.load import load_model
from slicer.model.pruned import shortened
from slicer.model.walk import SourceActivations, Walk
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import alone
from slicer.runtime.versions import versions
from slicer.runtime.workdir import owned
from slicer.sweep.grid import Cell
from slicer.sweep.prefix import Prefix
from slicer.sweep.store import Store

TRAINED = "qlora"


class SharedModel:
    """The source, loaded once for all cells in memory, with what they share: text, prefix, activations of the source.

    Each part is made when a cell first needs it; `release` frees them all. `directory` is the sweep's, which keeps the
    text.
    """

    def __init__(self, source: Source, compute: Compute, spec: TextSpec, directory: Path, progress: Progress) -> None:
        self.source, self.compute, self.spec, self.progress = source, compute, spec, progress
        self.directory = directory

    def release(self) -> None:
        """Free the memory for a training, which reads from files."""
        for name in ("walk", "text", "prefix"):
            self.__dict__.pop(name, None)
        memory.release()

    @cached_property
    def walk(self) -> Walk:
        """Over the loaded source; in a distributed run, on this process's GPU."""
        self.progress.stage("Loading the model")
        walk = Walk.in_memory(load_model(self.source.path, self.compute), directory=self.directory)
        walk.trust_remote_code = self.compute.trust_remote_code
        walk.activations = SourceActivations(int(memory.ACTIVATIONS_SHARE * memory.budget(self.compute)))
        return walk

    @cached_property
    def text(self) -> TokenBatches:
        """The calibration text for similarity and healing."""
        found = read_text(self.spec, self.source.path, self.walk, self.progress)
        assert found is not None
        return replace(found, kinds=())  # cells are judged by their scores

    @cached_property
    def prefix(self) -> Prefix:
        """Cache of the layers before the cuts."""
        return Prefix(self.walk.model, int(memory.KEPT_SHARE * memory.budget(self.compute)))

    @contextlib.contextmanager
    def resumable(self, directory: Path) -> Iterator[None]:
        """Inside the block a fold keeps its finished stages in `directory`, or resumes after those of a stopped one of
        the same source and versions. Raises OutputError."""
        same = {"checkpoint": self.source.checkpoint.identity, "versions": versions()}
        with owned(directory, what="an unfinished fold of a sweep", overwrite=True, **same):
            self.walk.directory = directory
            try:
                yield
            finally:
                self.walk.directory = self.directory


def evaluated(model: Any, path: Path, suite: Suite, name: str) -> Evaluation:
    """`suite` on a loaded model, with the tokenizer at `path`."""
    spec = suite.options
    lm = backends.wrap(model, path, spec.batch_size, trust_remote_code=spec.trust_remote_code, last_logits_only=True)
    return suite.run(lm, name, backends.vocabulary_of(model))


def in_memory(
    cell: Cell, plan: Plan, shared: SharedModel, directory: Path, suite: Suite, name: str
) -> tuple[Evaluation, HealingRecord | None]:
    """A bare or folded cell; `directory` keeps the finished stages of a fold. Raises ArchitectureError or HealError if
    the cut cannot be made or healed."""
    checkpoint, compute = shared.source.checkpoint, shared.compute
    config = sliced_config(checkpoint, plan, trust_remote_code=compute.trust_remote_code)
    text, how = None if cell.heal == "none" else shared.text, Compensation(cell.heal)
    with contextlib.nullcontext() if text is None else shared.resumable(directory):
        patch = repair(checkpoint, shared.walk, plan, text, how, shared.progress)
    first = min(*plan.dropped, *patch.edits, plan.depth)
    model = shared.walk.model
    with shared.prefix.shared(first), shortened(model, plan, config, patch.edits):
        return evaluated(model, shared.source.path, suite, name), patch.record


@memory.released()
def on_disk(
    plan: Plan, training: Training, shared: SharedModel, directory: Path, suite: Suite, name: str
) -> tuple[Evaluation, HealingRecord]:
    """A trained cell, made in `directory`, which is removed afterwards. Resumes a stopped training. Raises SlicerError
    children."""
    shared.release()
    cut, out = directory / "cut", directory / "healed"
    source, compute = shared.source.name, replace(shared.compute, dtype=None)
    with (
        owned(directory, what="an unfinished training of a sweep", overwrite=True,
              training=asdict(training), text=shared.spec.identity, dropped=plan.dropped),
        alone(),
    ):  # fmt: skip
        if not cut.is_dir():
            bare = Compensation("none")
            output = Output(cut, verify="load")
            request = ConvertRequest(source, plan=plan, compensation=bare, output=output, compute=compute)
            convert(request, shared.progress)
        if not out.is_dir():
            output = Output(out, verify="load")
            text = Text.of(shared.spec)
            heal(HealRequest(str(cut), source, training, text=text, output=output, compute=compute), shared.progress)
    record = Plan.load(out).healing
    assert record is not None
    evaluation = evaluated(load_model(out, shared.compute), out, suite, name)
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: another process trains in it
        directory.parent.rmdir()
    return evaluation, record


def training_of(cell: Cell, training: Training) -> Training:
    """The settings for a cell such as `qlora@8`: its own seed and rank, everything else from `training`."""
    rank = cell.heal.partition("@")[2]
    return replace(training, method=TRAINED, seed=cell.seed, lora_r=int(rank) if rank else training.lora_r)


def require(heals: Iterable[str]) -> None:
    """Raise EvaluationError if the libraries of a healing method are not installed."""
    if any(heal.startswith(TRAINED) for heal in heals):
        try:
            adapters.require(TRAINED)
        except HealError as error:
            raise EvaluationError(f"--heal {TRAINED}: {error}") from None


def check_alike(store: Store, cells: Iterable[Cell], training: Training) -> None:
    """Raise OutputError if an earlier run trained one of `cells` with other options: a table must not mix them."""
    for cell in cells:
        before = (store.get(cell.name) or {}).get("training")
        if before is not None and before != asdict(training_of(cell, training)):
            raise OutputError(
                f"{store.directory}: cell {cell.name} was trained with other options; pass those again, or "
                "choose another directory with -o"
            )
