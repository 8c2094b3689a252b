"""Weight compensation of a cut in closed form: solved in memory, then placed in the tensors of the output."""

from __future__ import annotations

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import DTYPES
from slicer.data.calibration import TokenBatches
from slicer.errors import ArchitectureError, HealError, OutOfMemory
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.linear import linear, train
from slicer.heal.patch import NONE, Patch, holds, place, written_dtype
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import Compensation
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import SOLVERS
from slicer.progress import Progress
from slicer.runtime import memory


def repair(
    checkpoint: Checkpoint,
    walk: Walk | None,
    plan: Plan,
    text: TokenBatches | None,
    how: Recipe | Compensation,
    progress: Progress,
) -> Patch:
    """The repair of the cut of `plan` from the source `checkpoint`, fitted on `text`; `walk`: over the source.

    `NONE` if the recipe has no repair. With `walk.activations` (of the same text), the next fold skips the pass through
    the source. Raises HealError and ArchitectureError if the cut cannot be repaired, OutOfMemory. An automatic fold is
    left out instead, with a note, also if it does not lower the held-out loss; but if memory runs out before a
    training, OutOfMemory is raised, because a second run may have enough.
    """
    asked, compensation = (how.asked, how.repair) if isinstance(how, Recipe) else (True, how)
    if compensation.method == "none":
        if isinstance(how, Recipe) and how.unhealed is not None:
            progress.note(f"not healed: {how.unhealed}")
        return NONE
    assert walk is not None and text is not None
    cast = DTYPES[plan.dtype] if plan.dtype else None
    trains, size = isinstance(how, Recipe) and how.training is not None, len(text.batches[0])
    ways = ["--train-from cut"] * trains + [f"--batch-size {size // 4 or 1}"] * (size > 1) + ["--device cpu"]
    solved = None
    try:
        with memory.within_memory("healing the cut", ways):
            if compensation.method == "fold":
                solved = fold(
                    walk,
                    text.batches,
                    plan,
                    holds=holds(checkpoint),
                    solver=compensation.solver or SOLVERS[0],
                    written=written_dtype(checkpoint, cast),
                    activations=walk.activations,
                    progress=progress,
                )
            else:
                assert compensation.method is not None
                batches, seed = text.batches, text.record.seed
                solved = linear(walk, batches, plan, compensation.method, compensation.rank, progress=progress)
                if compensation.steps:  # of the constants or maps alone
                    solved = train(walk, batches, plan, solved, compensation.steps, seed=seed, progress=progress)
    except (HealError, ArchitectureError) as error:
        if asked or (trains and isinstance(error, OutOfMemory)):
            raise
        progress.note(f"not healed: {error}")
    if solved is None:
        memory.release()  # memory that the error referred to
        return NONE
    losses = solved.losses
    if not losses.falls:
        progress.note(
            f"{'healed as asked' if asked else 'not healed'}: it does not lower the loss on calibration text held out "
            f"({losses.after:.4f} nats a token, {losses.before:.4f} without)"
        )
        if not asked:
            return NONE
    return place(checkpoint, plan, solved, text.record, cast)
