"""Weight compensation of a cut in closed form: solved in memory, then placed in the tensors of the output."""

from __future__ import annotations

from dataclasses import replace

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import DTYPES
from slicer.data.calibration import TokenBatches
from slicer.errors import ArchitectureError, HealError, OutOfMemory
from slicer.heal.compensate.fold import fold
from slicer.heal.compensate.linear import linear, train
from slicer.heal.patch import NONE, Patch, holds, place, written_dtype
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import Compensation
from slicer.measure.faithfulness import faithfulness
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
    trains = isinstance(how, Recipe) and how.training is not None
    ways = ["--train-from cut"] * trains + memory.smaller(len(text.batches[0]))
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
                    adapt=compensation.adapt,
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
    kinds = faithfulness(walk, plan, solved.edits, text.kinds, progress)
    if kinds and text.record.source != "self" and not any(kind.seen for kind in kinds):
        progress.note(
            f"{text.record.source}: too short, or too few documents, to keep some of them for the report; it has other "
            "kinds of text only (fewer --samples leave more)"
        )
    if worse := [kind for kind in kinds if kind.rises]:
        which = ", ".join(f"{kind.kind} (KL {kind.before:.3f} to {kind.after:.3f})" for kind in worse)
        progress.note(f"{'healed as asked' if asked else 'not healed'}: it leads away from the source on {which}")
        if not asked:
            return NONE
    return place(checkpoint, plan, replace(solved, kinds=kinds, adapt=compensation.adapt), text.record, cast)
