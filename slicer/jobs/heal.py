"""`slicer heal`: repairs a cut on disk, in closed form or by training, and writes what was verified."""

from __future__ import annotations

from dataclasses import replace

from slicer.checkpoint.cut import CutOnDisk, open_cut
from slicer.jobs.bridge import open_walk, read_text
from slicer.jobs.output import Result, Written, write_verified
from slicer.jobs.recipe import Recipe
from slicer.jobs.repair import repair
from slicer.jobs.request import HealRequest
from slicer.model.verify import Expected, expected_logits
from slicer.progress import Progress


def heal(request: HealRequest, progress: Progress | None = None) -> Written | None:
    """Repair a cut that slicer made: solve the weights around it again, or train it.

    In a distributed run every process calls this; the first one writes, and the others return None. Nothing appears at
    the output directory unless everything succeeded. Raises SlicerError children; see `slicer.errors`.
    """
    progress = progress or Progress()
    progress.stage("Opening the checkpoints")
    cut = open_cut(request.cut, request.source)  # the cut, its plan, its source: checked to belong together
    recipe = Recipe.of_heal(request, cut)
    recipe.announce(progress)
    result, expected = folded(cut, recipe, progress)
    return write_verified(result, expected, request.output, recipe.compute, progress)


def folded(cut: CutOnDisk, recipe: Recipe, progress: Progress) -> tuple[Result, Expected | None]:
    """The cut with the weights around it solved again, and the logits that it must have.

    Written from the source by the plan of the cut, so an earlier repair is undone; companion files and figures are
    those of the cut.
    """
    source, plan = cut.source, cut.plan
    with open_walk(source.checkpoint, recipe.compute, loads=recipe.loads) as walk:
        text = read_text(recipe.text, source.path, walk, progress)
        patch = repair(source.checkpoint, walk, plan, text, recipe, progress)
        expected = expected_logits(walk, plan, patch.edits, recipe.verify, progress)
    if patch.record is not None:
        patch = replace(patch, record=replace(patch.record, command=recipe.command))
    trusted, origin = recipe.compute.trust_remote_code, cut.checkpoint.path
    return Result.of_cut(source, plan, patch, origin=origin, trust_remote_code=trusted), expected
