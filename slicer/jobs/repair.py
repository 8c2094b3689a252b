"""Weight compensation of a cut: `repair` computes it by the method asked for.

What is asked for comes from the options, the defaults, or the record of a plan that is replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import TokenBatches
from slicer.data.sources import TextSpec
from slicer.errors import ArchitectureError, HealError
from slicer.heal.finetune.settings import of_record
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.heal.patch import Patch
    from slicer.jobs.materials import CalibrationData
    from slicer.jobs.options import Options
    from slicer.model.walk import SourceActivations, Walk


@dataclass(frozen=True)
class Compensation:
    """How a cut is repaired in closed form.

    Attributes:
        method: "fold", or a replacement behind sublayers: "bias" or "linear".
        solver: of a fold. rank: of linear maps. steps: of training for replacements.
        asked: False for a fold that nobody asked for: it may fail, and is left out where it does not help.
    """

    method: str = "fold"
    solver: str = "resolve"
    rank: int | None = None
    steps: int = 0
    asked: bool = True


def compensation_of(
    plan: Plan, options: Options, data: CalibrationData, progress: Progress
) -> Compensation | None:
    """The compensation that the options ask for, or by default a fold where text is at hand; None: none."""
    if options.emulate is not None:
        return Compensation(options.emulate, rank=options.rank, steps=options.emulate_steps)
    if options.heal == "fold":
        return Compensation(solver=options.fold)
    whole = not plan.below_layers
    # A half-offset block that was not asked for is folded as whole layers are.
    if options.heal == "none":
        return None
    if (
        not whole
        and options.heal is None
        and not (options.offset == "auto" and plan.joined and plan.complete)
    ):
        if data.at_hand:
            progress.note("not healed: below the layer that is done when asked for; --heal fold or --emulate")
        return None
    if not data.at_hand:
        progress.note("not healed: there is no calibration data at hand; --calibration DATA heals the cut")
        return None
    return Compensation(solver=options.fold, asked=False)


def repair(
    checkpoint: Checkpoint,
    walk: Walk,
    plan: Plan,
    data: TokenBatches,
    compensation: Compensation,
    *,
    cast: str | None = None,
    activations: SourceActivations | None = None,
    progress: Progress | None = None,
) -> Patch:
    """The repair of the cut of `plan` from the source `checkpoint`, over which `walk` is, fitted on `data`.

    `cast`: safetensors dtype of the output; None: as stored. `activations`, of the same model and text, spares the next
    fold the pass through the source. Raises HealError and ArchitectureError where the cut cannot be repaired; one that
    was not asked for is then left out with a note, as it is where it does not lower the held-out loss.
    """
    from slicer.heal.compensate.fold import fold
    from slicer.heal.compensate.linear import linear, train
    from slicer.heal.patch import NONE, holds, place, written_dtype

    progress, method = progress or Progress(), compensation.method
    try:
        if method == "fold":
            solved = fold(
                walk,
                data.batches,
                plan,
                holds=holds(checkpoint),
                solver=compensation.solver,
                written=written_dtype(checkpoint, cast),
                activations=activations,
                progress=progress,
            )
        else:
            solved = linear(walk, data.batches, plan, method, compensation.rank, progress=progress)
            if compensation.steps:
                seed = data.record.seed
                solved = train(
                    walk, data.batches, plan, solved, compensation.steps, seed=seed, progress=progress
                )
    except (HealError, ArchitectureError) as error:
        if compensation.asked:
            raise
        progress.note(f"not healed: {error}")
        return NONE
    loss = solved.losses
    if not loss.falls:
        words = (
            f"it does not lower the loss on calibration text held out ({loss.after:.4f} nats a token, "
            f"{loss.before:.4f} without)"
        )
        progress.note(f"healed as asked, but {words}" if compensation.asked else f"not healed: {words}")
        if not compensation.asked:
            return NONE
    return place(checkpoint, plan, solved, data.record, cast)


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


def _text_of(record: HealingRecord) -> TextSpec:
    """The calibration text that a repair was solved on."""
    text = record.text
    if text is None:
        return TextSpec()
    return TextSpec(text.source, text.samples, text.seq_len, text.batch_size, text.seed, text.column)
