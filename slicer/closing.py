"""Weight compensation of a cut: `repair` computes it by the method asked for.

What is asked for comes from the options, the defaults, or the record of a plan that is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, HealError
from slicer.heal.settings import METHODS, of_record
from slicer.measure.calibration import CalibrationSpec, TokenBatches
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord, TextRecord
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.heal.patch import Patch
    from slicer.materials import CalibrationData
    from slicer.measure.states import Course
    from slicer.measure.stream import Walk
    from slicer.options import Options


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
        and not (options.offset == "auto" and plan.joined and plan.ordinary)
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
    activations: Course | None = None,
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
                seed = int(data.provenance.get("seed", 0))
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
    return place(checkpoint, plan, solved, text_record(data.provenance), cast)


def text_record(provenance: Mapping[str, Any]) -> TextRecord | None:
    """The typed record of calibration text; None where its source was not recorded."""
    if not provenance.get("source"):
        return None
    renamed = {"text_column": "column", "tokens_sha256": "sha256"}
    known = {f.name for f in fields(TextRecord)}
    given = {renamed.get(name, name): value for name, value in provenance.items()}
    return TextRecord(**{"samples": 0, "seq_len": 0} | {k: v for k, v in given.items() if k in known})


def recorded(plan: Plan, record: HealingRecord | None) -> Plan:
    """`plan` with the record of its repair, as a mapping in the words of plan.json, format 2."""
    from slicer.heal.patch import MAPS

    if record is None:
        return plan
    loss, maps = record.loss, record.method in MAPS
    found: dict[str, Any] = {"method": record.method, "held_out_sequences": []}
    if record.text is not None:
        text = vars(record.text)
        renamed = {"column": "text_column", "sha256": "tokens_sha256"}
        found["calibration"] = {renamed.get(k, k): v for k, v in text.items() if k != "held_out"}
        found["held_out_sequences"] = list(record.text.held_out)
    if maps:
        found |= {"rank": record.rank}
        found |= {"steps": record.steps, "best_step": record.best_step} if record.steps else {}
        solved = loss.after if loss.solved is None else loss.solved
        found["loss"] = {"source": loss.source, "cut": loss.before, "emulated": solved}
        found["loss"] |= {} if loss.solved is None else {"trained": loss.after}
        found["behind"] = [
            {"part": e.module, "layer": e.layer, "error_left": e.error_left} for e in record.solved
        ]
        return replace(plan, emulated=found)
    found |= {"solver": record.solver, "precision": record.precision, "tensors": list(record.tensors)}
    found["loss"] = {"source": loss.source, "sliced": loss.before, "healed": loss.after}
    found["solved"] = [{k: v for k, v in vars(e).items() if v is not None} for e in record.solved]
    found |= {"command": record.command} if record.command else {}
    return replace(plan, healing=found)


def trained_again(plan: Plan, options: Options) -> Options:
    """A plan that was healed by training is trained again: on the same text, unless other text is given, and unless
    another way to heal is."""
    record = plan.healing or {}
    if record.get("method") not in METHODS or options.heal or options.emulate:
        return options
    training = options.training or of_record(record)
    spec = options.calibration
    spec = _text_of(record) if spec.source is None else replace(spec, seed=spec.seed or training.seed)
    return replace(options, heal=record["method"], training=training, calibration=spec, fold=record["solver"])


def closed_again(plan: Plan, options: Options, data: CalibrationData) -> Options:
    """A plan is replayed as it was: folded or emulated on the same text, or left as it is, unless other options are
    given."""
    if options.heal is not None or options.emulate is not None:
        return options
    record = plan.emulated or plan.healing
    if record is None:
        return options if options.calibration.source is not None else replace(options, heal="none")
    if options.calibration.source is None:
        data.spec = _text_of(record)
    elif plan.emulated is None:
        return options
    if plan.emulated is not None:
        steps = int(record.get("steps", 0))
        return replace(
            options, emulate=str(record.get("method")), rank=record.get("rank"), emulate_steps=steps
        )
    return replace(options, heal="fold", fold=str(record.get("solver", options.fold)))


def _text_of(record: Mapping[str, Any]) -> CalibrationSpec:
    """The calibration text that a record of healing names."""
    names = {f.name for f in fields(CalibrationSpec)}
    return CalibrationSpec(**{k: v for k, v in (record.get("calibration") or {}).items() if k in names})
