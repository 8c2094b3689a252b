"""The main job, its stages in order: open, measure, select, export, verify, and only then appear.

resolve -> Checkpoint.open -> [load -> calibrate -> measure -> select] -> [heal] -> write -> verify -> rename
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.checkpoint import config as configs
from slicer.checkpoint import hub, sublayers
from slicer.checkpoint.export import check_output
from slicer.checkpoint.reader import Checkpoint, refuse_quantized
from slicer.checkpoint.sizes import measure_sizes, sizes_after
from slicer.checkpoint.tensors import DTYPES
from slicer.errors import ArchitectureError, PlanError
from slicer.heal.finetune.settings import METHODS
from slicer.jobs.materials import CalibrationData, Configs, SourceModel
from slicer.jobs.options import Options, Summary, check_options, output_name
from slicer.jobs.output import write
from slicer.jobs.repair import closed_again, compensation_of, repair, trained_again
from slicer.jobs.trained import convert_and_train
from slicer.plan.amounts import Amount, Goal
from slicer.plan.choose import choose
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.files import check_space
from slicer.runtime.versions import versions

if TYPE_CHECKING:
    from slicer.heal.patch import Patch
    from slicer.measure.analysis import Analysis


def convert(
    source: str,
    goal: Goal | None,
    out: Path | None = None,
    options: Options | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Slice `source` (Hub id, directory or "demo") by `goal`, or by a saved `plan`, into the directory `out`.

    `out` defaults to the source's name with the new depth, in the working directory. Nothing appears at `out`
    unless everything succeeded. Raises SlicerError children; see `slicer.errors`.
    """
    options, progress = options or Options(), progress or Progress()
    check_options(options, goal, plan)
    if plan is not None:
        options = trained_again(plan, options)
    if options.heal in METHODS and not options.dry_run:
        return convert_and_train(convert, source, goal, out, options, plan, progress)
    progress.stage("Opening the checkpoint")
    found = hub.resolve(source)
    checkpoint = Checkpoint.open(found.path)
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    if out is not None and not options.dry_run:
        check_output(out, found.path, force=options.force)
    model = SourceModel(checkpoint, options, progress)
    data = CalibrationData(checkpoint, options, model, progress)
    config_of = Configs(checkpoint, options)
    analysis: Analysis | None = None
    if plan is not None:
        if plan.depth != checkpoint.depth:
            _mismatch(plan, checkpoint)
        if plan.merged:
            progress.note(
                "an adapter was merged into that plan's checkpoint; slicer merge does it again to this one"
            )
        if options.format is not None:
            plan = plan.in_form(options.format)
        config_of(plan)
        options = closed_again(plan, options, data)
    else:
        assert goal is not None
        plan, analysis = chosen_plan(checkpoint, goal, options, model, data, config_of, progress)
    if options.emulate is not None:
        from slicer.heal.patch import form_for

        plan = form_for(checkpoint, plan, options.emulate, options.rank)
    config = config_of(plan)
    plan = replace(
        plan,
        source=source,
        revision=found.revision,
        model_type=checkpoint.config.get("model_type"),
        dtype=options.dtype,
        versions=versions(),
        command=options.command,
        parent=Plan.load(found.path) if (found.path / "slicer" / "plan.json").is_file() else None,
        healing=None,
        merged=(),
    )
    out = out or Path(output_name(source, plan.size_name))
    cast = DTYPES[options.dtype] if options.dtype else None
    before, after = measure_sizes(checkpoint), sizes_after(checkpoint, plan, config, cast)
    # The notes are on how vLLM reads the source's own architecture.
    native = plan.form != "blockwise" and len(plan.kept) < plan.depth
    warnings = tuple(configs.warnings(checkpoint.config, plan.kept, config_of(plan.kept))) if native else ()
    if options.dry_run:
        return Summary(None, plan, before, after, "nothing written", warnings=warnings)
    check_output(out, found.path, force=options.force)
    check_space(out, after.total_bytes)
    verify = _verification(options, model, progress)
    summary = Summary(out, plan, before, after, verify, warnings=warnings)
    patch: Patch | None = None
    compensation = compensation_of(plan, options, data, progress)
    if compensation is not None:
        patch = repair(checkpoint, model.walk(), plan, data.get(), compensation, cast=cast, progress=progress)
        plan, config = replace(plan, healing=patch.record), patch.configured(config)
        after = sizes_after(checkpoint, plan, config, cast, patch.added)
        summary = replace(summary, plan=plan, after=after)
    return write(checkpoint, summary, config, analysis, model, patch, options, progress)


def chosen_plan(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    model: SourceModel,
    data: CalibrationData,
    config_of: Configs,
    progress: Progress,
) -> tuple[Plan, Analysis | None]:
    """The plan that reaches the goal, and what it was chosen by where that was measured.

    A budget takes the fewest layers that meet it. Raises PlanError where no cut does, ArchitectureError where the
    config can express none.
    """
    first, cast = goal.count(checkpoint.depth), DTYPES[options.dtype] if options.dtype else None
    if goal.budget:
        _check_reach(checkpoint, goal, cast)
    if options.offset == "half":
        sublayers.check_joinable(checkpoint)
    analysis = None
    if goal.measured(options.strategy):
        from slicer.measure.distances import measure_text

        analysis = measure_text(model.walk(), data.get(), _halves(checkpoint, goal, options), progress)
    for n in range(first, checkpoint.depth) if goal.budget else [first]:
        chosen = choose(
            Goal(drop=Amount(count=n)) if goal.budget else goal,
            checkpoint.depth,
            analysis,
            config_of.why_not,
            strategy=options.strategy,
            offset=options.offset,
            form=options.format,
        )
        sizes = measure_sizes(checkpoint, chosen.plan.kept, cast)
        if goal.met(sizes.parameters, sizes.total_bytes):
            if chosen.passed_over:
                progress.note(
                    f"layers {chosen.passed_over} lie closest, but this architecture's config cannot express that cut; "
                    "the closest block that it can express was taken"
                )
            return chosen.plan, analysis
    raise PlanError(f"{goal}: out of reach of the strategy {options.strategy}; name the layers to drop")


def _halves(checkpoint: Checkpoint, goal: Goal, options: Options) -> bool | None:
    """Whether to measure within the layers too: needed, not wanted, or (None) where it can be done, as it may win."""
    if goal.sublayers or options.offset == "half":
        return True
    bare = options.heal == "none" or options.emulate is not None
    if options.offset == "whole" or not (
        bare or (options.fold == "resolve" and sublayers.adds_directly(checkpoint))
    ):
        return False
    try:
        sublayers.check_joinable(checkpoint)
    except ArchitectureError:
        return False
    return None


def _check_reach(checkpoint: Checkpoint, goal: Goal, cast: str | None) -> None:
    """Raise PlanError, before anything is measured, where no layer has to go or a single one is too much."""
    whole = measure_sizes(checkpoint, cast=cast)
    if goal.met(whole.parameters, whole.total_bytes):
        raise PlanError(f"{goal}: the model already meets it with all {whole.depth} layers; nothing to drop")
    lightest = min(range(whole.depth), key=whole.layer_bytes.__getitem__)
    one = measure_sizes(checkpoint, (lightest,), cast)
    if not goal.met(one.parameters, one.total_bytes):
        raise PlanError(
            f"{goal}: out of reach; one layer alone still has {one.parameters} parameters and {one.total_bytes} bytes"
        )


def _verification(options: Options, model: SourceModel, progress: Progress) -> str:
    if options.verify != "auto":
        return options.verify
    if model.fits:
        return "logits"
    progress.note("the model does not fit in memory: its keys and shapes are checked, its logits are not")
    return "load"


def _mismatch(plan: Plan, checkpoint: Checkpoint) -> None:
    raise PlanError(
        f"the plan is for a model of {plan.depth} layers but {checkpoint.path} has {checkpoint.depth}; "
        "make a plan for this one with --dry-run"
    )
