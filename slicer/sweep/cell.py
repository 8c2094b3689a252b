"""Trains the healing of one sweep cell: on files in the sweep directory, in a single process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.export import export
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import EvaluationError, HealError, OutputError
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.distributed import alone
from slicer.runtime.workdir import owned

if TYPE_CHECKING:
    from slicer.data.sources import TextSpec
    from slicer.heal.finetune.settings import Training
    from slicer.sweep.grid import Cell
    from slicer.sweep.store import Journal


TRAINED = "qlora"


def require(heals: Iterable[str]) -> None:
    """Raise EvaluationError if the libraries of a healing method are not installed."""
    if any(heal.startswith(TRAINED) for heal in heals):
        from slicer.heal.finetune import model as adapters

        try:
            adapters.require(TRAINED)
        except HealError as error:
            raise EvaluationError(f"--heal {TRAINED}: {error}") from None


def training_of(cell: Cell, training: Training) -> Training:
    """The settings for a cell such as `qlora@8`: its own seed and rank, everything else from `training`."""
    rank = cell.heal.partition("@")[2]
    return replace(training, method=TRAINED, seed=cell.seed, rank=int(rank) if rank else training.rank)


def check_alike(journal: Journal, cells: Iterable[Cell], training: Training) -> None:
    """Raise OutputError if an earlier run trained one of `cells` with other options: a table must not mix them."""
    for cell in cells:
        before = (journal.get(cell.name) or {}).get("training")
        if before is not None and before != asdict(training_of(cell, training)):
            raise OutputError(
                f"{journal.directory}: cell {cell.name} was trained with other options; pass those again, or "
                "choose another directory with -o"
            )


def trained(
    checkpoint: Checkpoint,
    source: str,
    plan: Plan,
    training: Training,
    calibration: TextSpec,
    directory: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Cut by `plan`, then train. Returns (healed checkpoint in `directory`, its record); resumes a stopped training.

    Raises SlicerError children.
    """
    from slicer.heal.finetune.run import TrainOptions, train_cut

    bare, out = directory / "cut", directory / "healed"
    with (
        owned(directory, what="an unfinished training of a sweep", overwrite=True,
              training=asdict(training), text=calibration.identity, dropped=plan.dropped),
        alone(),
    ):  # fmt: skip
        if not bare.is_dir():
            export(checkpoint, replace(plan, source=source), bare, trust_remote_code=trust_remote_code)
        if not out.is_dir():
            options = TrainOptions(
                training=training,
                calibration=calibration,
                verify="load",
                device=device,
                trust_remote_code=trust_remote_code,
            )
            train_cut(str(bare), source, out, options, progress=progress)
    record = Plan.load(out).healing
    assert record is not None
    return out, replace(record, tensors=()).to_dict()
