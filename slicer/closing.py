"""What closes the cut of a conversion in memory: a fold, or an emulation of what is gone.

Asked for, by default, or as a plan that is replayed had it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from slicer.checkpoint import architectures
from slicer.checkpoint.export import DTYPES
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, HealError
from slicer.heal.settings import of_record
from slicer.materials import CalibrationData, SourceModel
from slicer.measure.calibration import CalibrationSpec
from slicer.options import Options, Summary
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.heal.carry import Standing
    from slicer.heal.healing import Healing


def form_for(checkpoint: Checkpoint, plan: Plan, options: Options) -> Plan:
    """`plan` in the form that can carry what is to stand for the removed parts."""
    if options.emulate is None:
        return plan
    from slicer.heal import carry
    from slicer.heal.emulate import check_rank

    width = architectures.text_config(checkpoint.config).get("hidden_size")
    if isinstance(width, int):
        check_rank(options.emulate, options.rank, width)
    return carry.form_for(checkpoint, plan, options.emulate)


def emulate(
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
    # A half-offset block that was not asked for is closed as whole layers are: where that can be done and helps.
    unasked = options.heal == "auto" or (
        options.heal is None and options.offset == "auto" and bool(plan.joined) and plan.complete
    )
    if method is None and plan.below_layers and (unasked or options.heal == "fold"):
        if unasked and not data.at_hand:
            progress.note(
                "not healed: there is no calibration data at hand; --calibration DATA heals the cut"
            )
            return None
        method = "fold"
    if method is None:
        if plan.below_layers and options.heal is None and data.at_hand:
            progress.note("not healed: below the layer that is done when asked for; --heal fold or --emulate")
        return None
    from slicer.heal import carry, emulation
    from slicer.heal.emulate import emulate as fill
    from slicer.heal.emulate_train import train
    from slicer.heal.fold_parts import fold_parts

    walk, batches = model.walk(), data.get()
    cast = DTYPES[options.dtype] if options.dtype else None
    try:
        if method == "fold":
            found = fold_parts(
                walk,
                batches.batches,
                plan,
                storable=partial(carry.storable, checkpoint),
                progress=progress,
            )
        else:
            found = fill(walk, batches.batches, plan, method, options.rank, progress=progress)
        if options.emulate_steps:
            found = train(
                walk,
                batches.batches,
                plan,
                found,
                options.emulate_steps,
                seed=data.spec.seed,
                progress=progress,
            )
    except (HealError, ArchitectureError) as error:
        if method != "fold" or not unasked:
            raise
        progress.note(f"not healed: {error}")
        return None
    losses = found.losses
    if not found.helps:
        words = (
            f"the loss on calibration text held out does not fall ({found.loss:.4f} nats a token, "
            f"{losses['cut']:.4f} without)"
        )
        left = method == "fold" and unasked
        progress.note(f"not healed: {words}" if left else f"done as asked, but {words}")
        if left:
            return None
    if method == "fold":
        return carry.fold(checkpoint, plan, config, found, batches.provenance, cast)
    standing = carry.carry(checkpoint, plan, copy.deepcopy(config), found, cast)
    return replace(standing, record=HealingRecord.of(emulation.record_of(found, batches.provenance)))


def heal(
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
    ):  # `emulate` does the last
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
        loss = healing.record.loss
        words = (
            f"it does not lower the loss on calibration text held out ({loss.after:.4f} nats a token, "
            f"{loss.before:.4f} without)"
        )
        progress.note(f"healed as asked, but {words}" if asked else f"not healed: {words}")
        return healing if asked else None
    return healing


def trained_again(plan: Plan, options: Options) -> Options:
    """A plan that was healed by training is trained again: on the same text, unless other text is given, and unless
    another way to heal is."""
    record = plan.healing
    if record is None or record.training is None or options.heal or options.emulate:
        return options
    training = options.training or of_record(record.training.asked)
    spec = options.calibration
    spec = _text_of(record) if spec.source is None else replace(spec, seed=spec.seed or training.seed)
    return replace(
        options, heal=record.method, training=training, calibration=spec, fold=record.solver or options.fold
    )


def closed_again(plan: Plan, options: Options, data: CalibrationData) -> Options:
    """A plan is replayed as it was: folded or with the same maps, solved on the same text, or left as it is, unless
    other options are given."""
    if options.heal is not None or options.emulate is not None:
        return options
    record = plan.healing
    if record is None:
        return options if options.calibration.source is not None else replace(options, heal="none")
    if options.calibration.source is None:
        data.spec = _text_of(record)
    elif not record.adds_maps:
        return options
    if record.adds_maps:
        return replace(options, emulate=record.method, rank=record.rank, emulate_steps=record.steps)
    return replace(options, heal="fold", fold=record.solver or options.fold)


def _text_of(record: HealingRecord) -> CalibrationSpec:
    """The calibration text that a repair was solved on."""
    text = record.text
    if text is None:
        return CalibrationSpec()
    return CalibrationSpec(text.source, text.samples, text.seq_len, text.batch_size, text.seed, text.column)
