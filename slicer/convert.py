"""The main job, its stages in order: open, measure, select, export, verify, and only then appear.

resolve -> Checkpoint.open -> [load -> calibrate -> measure -> select] -> [heal] -> write -> verify -> rename
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer import __version__
from slicer.checkpoint import architectures, blockwise, hub
from slicer.checkpoint.export import DTYPES, check_output, refuse_quantized
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes, sizes_after
from slicer.checkpoint.writer import check_space
from slicer.choose import Measured, choose
from slicer.errors import ArchitectureError, HealError, PlanError
from slicer.heal.settings import METHODS, Training, of_record
from slicer.materials import CalibrationData, Configs, SourceModel
from slicer.measure.calibration import CalibrationSpec
from slicer.options import Goal, Options, Summary, check_options
from slicer.plan import Plan
from slicer.produce import write
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.heal.carry import Standing
    from slicer.heal.healing import Healing


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
        options = _training_again(plan, options)
    if options.heal in METHODS and not options.dry_run:
        return _convert_and_train(source, goal, out, options, plan, progress)
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
        if options.format is not None:
            plan = replace(plan, form=blockwise.form_for(checkpoint, plan, options.format))
        config_of(plan)
        options = _emulating_again(plan, _healing_again(plan, options, data), data)
    else:
        assert goal is not None
        plan, measured = choose(checkpoint, goal, options, model, data, config_of, progress)
    plan = _form(checkpoint, plan, options)
    config = config_of(plan)
    plan = replace(
        plan,
        source=source,
        revision=found.revision,
        model_type=checkpoint.config.get("model_type"),
        dtype=options.dtype,
        versions=library_versions(),
        command=options.command,
        parent=_parent(found.path),
        healing=None,
        emulated=None,
    )
    out = out or Path(f"{_short_name(source)}-{_size_name(plan)}")
    cast = DTYPES[options.dtype] if options.dtype else None
    before, after = measure_sizes(checkpoint), sizes_after(checkpoint, plan, config, cast)
    # The notes are on how vLLM reads the source's own architecture.
    native = plan.form != "blockwise" and len(plan.kept) < depth
    warnings = (
        tuple(architectures.warnings(checkpoint.config, plan.kept, config_of(plan.kept))) if native else ()
    )
    if options.dry_run:
        return Summary(None, plan, before, after, "nothing written", warnings=warnings)
    check_output(out, found.path, force=options.force)
    check_space(out, after.total_bytes)
    verify = _verification(options, model, progress)
    summary = Summary(out, plan, before, after, verify, warnings=warnings)
    standing = _emulate(checkpoint, summary, config, model, data, options, progress)
    if standing is not None:
        folded = standing.found.method == "fold"
        plan = replace(plan, healing=standing.record) if folded else replace(plan, emulated=standing.record)
        after = sizes_after(checkpoint, plan, standing.config, cast, standing.added)
        summary = replace(summary, plan=plan, after=after)
    healing = _heal(checkpoint, summary, model, data, options, progress)
    if healing is not None:
        summary = replace(summary, plan=replace(plan, healing=healing.record))
    return write(checkpoint, summary, config, measured, model, healing, standing, options, progress)


def _form(checkpoint: Checkpoint, plan: Plan, options: Options) -> Plan:
    """`plan` in the form that can carry what is to stand for the removed parts."""
    if options.emulate is None:
        return plan
    from slicer.heal import carry
    from slicer.heal.emulate import check_rank

    width = architectures.text_config(checkpoint.config).get("hidden_size")
    if isinstance(width, int):
        check_rank(options.emulate, options.rank, width)
    return carry.form_for(checkpoint, plan, options.emulate)


def _emulate(
    checkpoint: Checkpoint,
    summary: Summary,
    config: dict[str, Any],
    model: SourceModel,
    data: CalibrationData,
    options: Options,
    progress: Progress,
) -> Standing | None:
    """What stands for the removed parts, as --emulate asks; also the fold of a cut below the layer."""
    plan = summary.plan
    method = options.emulate
    if method is None and plan.below_layers and options.heal in ("fold", "auto"):
        if options.heal == "auto" and not data.at_hand:
            progress.note(
                "not healed: there is no calibration data at hand; --calibration DATA heals the cut"
            )
            return None
        method = "fold"
    if method is None:
        return None
    from slicer.heal import carry, emulate, emulation

    walk, batches = model.walk(), data.get()
    cast = DTYPES[options.dtype] if options.dtype else None
    try:
        found = emulate.emulate(walk, batches.batches, plan, method, options.rank, progress=progress)
    except (HealError, ArchitectureError) as error:
        if options.heal != "auto":
            raise
        progress.note(f"not healed: {error}")
        return None
    losses = found.losses
    if not found.helps:
        words = (
            f"the loss on calibration text held out does not fall ({losses['emulated']:.4f} nats a token, "
            f"{losses['cut']:.4f} without)"
        )
        progress.note(f"done as asked, but {words}" if options.heal != "auto" else f"not healed: {words}")
        if options.heal == "auto":
            return None
    standing = carry.carry(checkpoint, plan, copy.deepcopy(config), found, cast)
    record = emulation.record_of(found, batches.provenance)
    return replace(standing, record=carry.as_healing(record, standing) if method == "fold" else record)


def _emulating_again(plan: Plan, options: Options, data: CalibrationData) -> Options:
    """A plan that was emulated is emulated again on the same text, unless other options are given."""
    record = plan.emulated
    if record is None or options.emulate is not None or options.heal is not None:
        return options
    if options.calibration.source is None:
        given = dict(record.get("calibration") or {})
        names = {f.name for f in fields(CalibrationSpec)}
        data.spec = CalibrationSpec(**{k: v for k, v in given.items() if k in names})
    return replace(options, emulate=str(record.get("method")), rank=record.get("rank"))


def _convert_and_train(
    source: str, goal: Goal | None, out: Path | None, options: Options, plan: Plan | None, progress: Progress
) -> Summary:
    """The bare cut beside `out`, kept until the training that starts from it is done."""
    from slicer.heal.adapters import require
    from slicer.heal.place import cut_for, discarding, workplace_of
    from slicer.heal.trained import TrainOptions, train_cut
    from slicer.measure.share import Share

    training = replace(
        options.training or Training(), method=str(options.heal), seed=options.calibration.seed
    )
    training.check()
    require(training.method)
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    bare = replace(options, heal="none", command=None)
    if out is None:
        counts = list(goal.counts(checkpoint.depth)) if goal is not None else []
        if len(counts) > 1:  # a budget: its name tells how many layers are left
            plan = convert(source, goal, None, replace(bare, dry_run=True), progress=progress).plan
            goal = None
        left = len(plan.kept) if plan is not None else checkpoint.depth - counts[0]
        out = Path(f"{_short_name(source)}-{left}L")
    check_output(out, checkpoint.path, force=options.force)
    asked = {"goal": str(goal), "plan": plan and plan.to_json(), **{k: getattr(options, k) for k in _OF_CUT}}

    def cut() -> tuple[str, Summary]:
        def make(place: Path) -> None:
            convert(
                source, goal, place, replace(bare, force=True, verify="load"), plan=plan, progress=progress
            )

        path = cut_for(out, checkpoint, options.calibration, asked, make, force=options.force)
        again = replace(bare, dry_run=True)
        return str(path), convert(source, None, None, again, plan=Plan.load(path), progress=progress)

    path, summary = Share.of_environment().first(cut)
    given = {k: getattr(options, k) for k in _OF_TRAINING}
    given_to = TrainOptions(training=training, **given)
    with discarding(out):
        if options.rank_sweep is None:
            done = train_cut(path, source, out, given_to, progress=progress)
        else:
            from slicer.heal.rank_sweep import pick_rank

            done = pick_rank(path, source, out, given_to, options.rank_sweep, progress=progress)
            if done is not None:
                shutil.rmtree(workplace_of(out))
    Share.of_environment().leave()
    if done is None:  # not the first of several processes
        return replace(summary, out=out)
    return replace(
        summary,
        out=out,
        plan=done.plan,
        verified=done.verified,
        logits_error=done.logits_error,
        rounding_error=done.rounding_error,
    )


_OF_CUT = ("strategy", "dtype")
_OF_TRAINING = (
    *(
        "calibration",
        "fold",
        "save_adapter",
        "verify",
        "device",
        "max_shard_bytes",
        "force",
        "trust_remote_code",
    ),
    "command",
)


def _training_again(plan: Plan, options: Options) -> Options:
    """A plan that was healed by training is trained again on the same text, unless other options are given."""
    record = plan.healing or {}
    if (
        record.get("method") not in METHODS
        or options.heal is not None
        or options.calibration.source is not None
    ):
        return options
    names = {f.name for f in fields(CalibrationSpec)}
    spec = CalibrationSpec(**{k: v for k, v in record["calibration"].items() if k in names})
    training = options.training or of_record(record)
    return replace(options, heal=record["method"], training=training, calibration=spec, fold=record["solver"])


def _heal(
    checkpoint: Checkpoint,
    summary: Summary,
    model: SourceModel,
    data: CalibrationData,
    options: Options,
    progress: Progress,
) -> Healing | None:
    """The new weights around the cut, or None; unasked, only where that can be done and helps."""
    asked = options.heal == "fold"
    if (
        options.heal == "none" or options.emulate is not None or summary.plan.below_layers
    ):  # `_emulate` does the last
        return None
    if not asked and not data.at_hand:
        progress.note("not healed: there is no calibration data at hand; --calibration DATA heals the cut")
        return None
    from slicer.heal.healing import fold_checkpoint

    walk, batches = model.walk(), data.get()
    cast = DTYPES[options.dtype] if options.dtype else None
    try:
        healing = fold_checkpoint(
            checkpoint, walk, batches, summary.plan.dropped, solver=options.fold, cast=cast, progress=progress
        )
    except (HealError, ArchitectureError) as error:
        if asked:
            raise
        progress.note(f"not healed: {error}")
        return None
    if not healing.helps:
        loss = healing.record["loss"]
        words = (
            f"it does not lower the loss on calibration text held out ({loss['healed']:.4f} nats a token, "
            f"{loss['sliced']:.4f} without)"
        )
        progress.note(f"healed as asked, but {words}" if asked else f"not healed: {words}")
        return healing if asked else None
    return healing


def _healing_again(plan: Plan, options: Options, data: CalibrationData) -> Options:
    """A plan is replayed as it was: healed on the same text, or not at all, unless other options are given."""
    record = plan.healing
    if options.heal is not None or options.calibration.source is not None or plan.emulated is not None:
        return options
    if record is None:
        return replace(options, heal="none")
    given = dict(record.get("calibration") or {})
    names = {f.name for f in fields(CalibrationSpec)}
    data.spec = CalibrationSpec(**{k: v for k, v in given.items() if k in names})
    return replace(options, heal="fold", fold=str(record.get("solver", options.fold)))


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


def _size_name(plan: Plan) -> str:
    """ "20L", and what is left of attention and feed-forward parts where some are missing: "24L-16A"."""
    layers = len(plan.kept)
    attention = f"-{layers - len(plan.no_attention)}A" if plan.no_attention else ""
    return f"{layers}L{attention}" + (f"-{layers - len(plan.no_ffn)}F" if plan.no_ffn else "")


def _short_name(source: str) -> str:
    name = source.rsplit("@", 1)[0] if not Path(source).exists() else str(Path(source).resolve())
    return Path(name).name or "model"


def library_versions() -> dict[str, str]:
    """What made an output: slicer and the libraries that its figures depend on."""
    from importlib.metadata import version

    return {"slicer-llm": __version__} | {
        name: version(name) for name in ("torch", "transformers", "safetensors")
    }


def _parent(path: Path) -> dict[str, Any] | None:
    """The plan of a source that was itself sliced."""
    import json

    if not (path / "slicer" / "plan.json").is_file():
        return None
    plan = Plan.load(path)
    return dict(json.loads(plan.to_json()))
