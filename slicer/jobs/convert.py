"""`slicer convert`: open, decide, measure, choose, repair, write and verify."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from slicer.checkpoint.config import why_not
from slicer.checkpoint.export import output_name
from slicer.checkpoint.hub import Source, open_source, resolve
from slicer.checkpoint.reader import has_weights, refuse_quantized
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.tensors import DTYPES
from slicer.data.calibration import read_text
from slicer.errors import OutOfMemory, PlanError, SourceError, UsageError
from slicer.heal.patch import NONE, form_for
from slicer.jobs.costs import work_of
from slicer.jobs.forecast import Clock
from slicer.jobs.output import Result, Written, check_place, described, recorded, write_verified
from slicer.jobs.recipe import Recipe
from slicer.jobs.repair import repair
from slicer.jobs.request import ConvertRequest
from slicer.jobs.work import measured, working
from slicer.measure.analysis import Analysis
from slicer.model.load import blueprint
from slicer.model.verify import expected_logits
from slicer.model.walk import open_walk
from slicer.plan.amounts import Amount, Goal
from slicer.plan.choose import Chosen, choose
from slicer.plan.plan import Plan
from slicer.progress import SILENT, Progress
from slicer.runtime.versions import versions


def convert(request: ConvertRequest, progress: Progress = SILENT) -> Written:
    """Drop layers or sublayers of a source and write an ordinary checkpoint, repaired and verified.

    Nothing appears at the output directory unless everything succeeded; the finished stages of a stopped
    run stay in a work directory beside it, from which the same request resumes. A plan that was healed by training
    gives the cut before that training, with a note. Raises SlicerError children; see `slicer.errors`.
    """
    progress = clock = Clock.over(progress)
    progress.stage("Opening the checkpoint")
    if request.output.dry_run and (source := without_weights(request)) is not None:
        return foreseen(request, source, clock)
    source = open_source(request.source)  # config and headers: no tensor is read
    recipe = Recipe.of(request, source)  # all decisions; nothing below changes them
    expect(request, recipe, source, clock)
    recipe.announce(progress)
    trusted = recipe.compute.trust_remote_code
    out = request.output.out or Path(output_name(source.name, "cut"))
    with working(recipe, source, request.output) as directory:
        opened = open_walk(source.checkpoint, recipe.compute, loads=recipe.loads, directory=directory)
        with opened if recipe.needs_model else nullcontext() as walk:
            text = read_text(recipe.text, source.path, walk, progress)
            analysis = measured(walk, text, recipe, progress)
            plan = chosen_plan(source, recipe, analysis, progress)
            bare = Result.of_cut(source, plan, NONE, analysis, trust_remote_code=trusted)
            if request.output.dry_run:
                return replace(described(bare), forecast=clock.forecast)
            check_place(bare, request.output)
            clock.expect(work_of(recipe, source.checkpoint, out, plan), recipe.compute)
            patch = repair(source.checkpoint, walk, plan, text, recipe, progress)
            expected = expected_logits(walk, plan, patch.edits, recipe.verify, progress)
        result = Result.of_cut(source, plan, patch, analysis, trust_remote_code=trusted)
        written = write_verified(result, expected, request.output, recipe.compute, progress)
    return recorded(written, clock)


def without_weights(request: ConvertRequest) -> Source | None:
    """The source as its config describes it, if its weights are not here, and would be downloaded; else None."""
    found = resolve(request.source, weights=False)
    if has_weights(found.path):
        return None
    checkpoint = blueprint(found.path, trust_remote_code=request.compute.trust_remote_code)
    refuse_quantized(checkpoint)
    return Source(found.name, found.path, found.revision, checkpoint=checkpoint)


def foreseen(request: ConvertRequest, source: Source, clock: Clock) -> Written:
    """The dry run of a `source` without weights: the forecast, and the sizes of a cut with as many layers.

    Raises SourceError for sublayers that must be measured to be chosen.
    """
    warnings, trusted = list[str](), request.compute.trust_remote_code
    expect(request, Recipe.of(request, source), source, clock)
    if request.goal is not None and request.goal.measured(request.selection.strategy):
        request = replace(request, selection=replace(request.selection, strategy="deepest", offset="whole"))
        warnings = ["the weights are not here, so no layer is chosen yet; those shown stand for as many others"]
    recipe = Recipe.of(request, source)
    if recipe.measures:
        raise SourceError(f"{source.name}: its weights are not here, and sublayers are chosen by measuring them")
    result = Result.of_cut(source, chosen_plan(source, recipe, None, clock), NONE, trust_remote_code=trusted)
    return replace(described(result), forecast=clock.forecast, warnings=(*result.warnings, *warnings))


def expect(request: ConvertRequest, recipe: Recipe, source: Source, clock: Clock) -> None:
    """The forecast of the whole conversion; of a dry run, that of the same conversion if it is no dry run."""
    output = request.output
    if output.dry_run:
        try:
            recipe = Recipe.of(replace(request, output=replace(output, out=None, dry_run=False)), source)
        except (OutOfMemory, UsageError) as error:
            clock.note(f"without --dry-run: {error}")
            return
    work = work_of(
        recipe, source.checkpoint, output.out or Path(output_name(source.name, "cut")), recipe.plan, measures=True
    )
    clock.expect(work, recipe.compute, always=output.dry_run, disk=not output.dry_run)


def chosen_plan(source: Source, recipe: Recipe, analysis: Analysis | None, progress: Progress) -> Plan:
    """The plan for the goal, or the replayed plan, with its origin.

    Raises PlanError if no cut reaches the goal, ArchitectureError if the config can express none.
    """
    checkpoint = source.checkpoint
    plan = recipe.plan
    if plan is None:
        assert recipe.goal is not None
        chosen = _fewest(recipe.goal, source, recipe, analysis)
        if chosen.passed_over:
            progress.note(
                f"the closest block is {chosen.passed_over}, which the config of this architecture cannot express; the "
                "closest block that it can express was taken"
            )
        plan = chosen.plan
    plan = form_for(checkpoint, plan, recipe.repair.method, recipe.repair.rank)
    return replace(
        plan,
        source=source.name,
        revision=source.revision,
        model_type=checkpoint.config.get("model_type"),
        dtype=recipe.compute.dtype,
        memory=recipe.memory,
        versions=versions(),
        command=recipe.command,
        parent=checkpoint.plan,
        healing=None,
        merged=(),
    )


def _fewest(goal: Goal, source: Source, recipe: Recipe, analysis: Analysis | None) -> Chosen:
    """The cut for `goal`; for a budget, that with the fewest layers that meets it."""
    checkpoint, selection = source.checkpoint, recipe.selection
    cast = DTYPES[recipe.compute.dtype] if recipe.compute.dtype else None
    asked = partial(why_not, checkpoint, trust_remote_code=recipe.compute.trust_remote_code)
    first = goal.count(checkpoint.depth)
    for n in range(first, checkpoint.depth) if goal.budget else [first]:
        wanted = Goal(drop=Amount(count=n)) if goal.budget else goal
        chosen = choose(wanted, checkpoint.depth, analysis, asked, **vars(selection))
        sizes = measure_sizes(checkpoint, chosen.plan.kept, cast)
        if goal.met(sizes.parameters, sizes.total_bytes):
            return chosen
    raise PlanError(f"{goal}: out of reach of the strategy {selection.strategy}; name the layers to drop")
