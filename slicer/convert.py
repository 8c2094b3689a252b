"""The main job, its stages in order: open, measure, select, export, verify, and only then appear.

resolve -> Checkpoint.open -> [load -> calibrate -> measure -> select] -> [heal] -> write -> verify -> rename
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slicer.checkpoint import blockwise, hub, rewrite
from slicer.checkpoint.export import DTYPES, check_output, refuse_quantized
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes, sizes_after
from slicer.choose import Measured, choose
from slicer.closing import closed_again, emulate, form_for, heal, trained_again
from slicer.errors import PlanError
from slicer.heal.settings import METHODS
from slicer.materials import CalibrationData, Configs, SourceModel
from slicer.options import Goal, Options, Summary, check_options, output_name
from slicer.plan.plan import Plan
from slicer.produce import write
from slicer.progress import Progress
from slicer.runtime.files import check_space
from slicer.runtime.versions import versions
from slicer.trained import convert_and_train


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
    depth = checkpoint.depth
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    if out is not None and not options.dry_run:
        check_output(out, found.path, force=options.force)
    model = SourceModel(checkpoint, options, progress)
    data = CalibrationData(checkpoint, options, model, progress)
    config_of = Configs(checkpoint, options)
    measured: Measured | None = None
    if plan is not None:
        if plan.depth != depth:
            _mismatch(plan, checkpoint)
        if plan.merged:
            progress.note(
                "an adapter was merged into that plan's checkpoint; slicer merge does it again to this one"
            )
        if options.format is not None:
            plan = replace(plan, form=blockwise.form_for(checkpoint, plan, options.format))
        config_of(plan)
        options = closed_again(plan, options, data)
    else:
        assert goal is not None
        plan, measured = choose(checkpoint, goal, options, model, data, config_of, progress)
    plan = form_for(checkpoint, plan, options)
    config = config_of(plan)
    plan = replace(
        plan,
        source=source,
        revision=found.revision,
        model_type=checkpoint.config.get("model_type"),
        dtype=options.dtype,
        versions=versions(),
        command=options.command,
        parent=_parent(found.path),
        healing=None,
        merged=(),
        emulated=None,
    )
    out = out or Path(output_name(source, plan.size_name))
    cast = DTYPES[options.dtype] if options.dtype else None
    before, after = measure_sizes(checkpoint), sizes_after(checkpoint, plan, config, cast)
    # The notes are on how vLLM reads the source's own architecture.
    native = plan.form != "blockwise" and len(plan.kept) < depth
    warnings = tuple(rewrite.warnings(checkpoint.config, plan.kept, config_of(plan.kept))) if native else ()
    if options.dry_run:
        return Summary(None, plan, before, after, "nothing written", warnings=warnings)
    check_output(out, found.path, force=options.force)
    check_space(out, after.total_bytes)
    verify = _verification(options, model, progress)
    summary = Summary(out, plan, before, after, verify, warnings=warnings)
    standing = emulate(checkpoint, summary, config, model, data, options, progress)
    if standing is not None:
        folded = standing.found.method == "fold"
        plan = replace(plan, healing=standing.record) if folded else replace(plan, emulated=standing.record)
        after = sizes_after(checkpoint, plan, standing.config, cast, standing.added)
        summary = replace(summary, plan=plan, after=after)
    healing = heal(checkpoint, summary, model, data, options, progress)
    if healing is not None:
        summary = replace(summary, plan=replace(plan, healing=healing.record))
    return write(checkpoint, summary, config, measured, model, healing, standing, options, progress)


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


def _parent(path: Path) -> dict[str, Any] | None:
    """The plan of a source that was itself sliced."""
    import json

    if not (path / "slicer" / "plan.json").is_file():
        return None
    plan = Plan.load(path)
    return dict(json.loads(plan.to_json()))
