"""Writes the result of a training: merged weights, record, model card and loss curve; verified, then renamed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.checkpoint import card, verify
from slicer.checkpoint.adapter import Adapter, placed
from slicer.checkpoint.export import copy_unchanged
from slicer.checkpoint.merge import Probe, check_merged, merged_spans, reference_logits
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.sublayers import new_keys
from slicer.errors import HealError
from slicer.heal.full import homes_of, probe_of, spans_of
from slicer.heal.job import Healed
from slicer.heal.settings import Settings
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord, Losses
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory
from slicer.runtime.memory import fits

if TYPE_CHECKING:
    from slicer.heal.trained import TrainOptions
    from slicer.heal.watch import Course


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        base: what it started from; whole: the source.
        loss_of: loss on the held-out text of a checkpoint directory, nats a token; None where that cannot be measured.
        record: for plan.json, with its training, without the figures.
        started: `time.monotonic` of the start.
    """

    base: Checkpoint
    whole: Checkpoint
    course: Course
    settings: Settings
    loss_of: Callable[[Path], float | None]
    record: HealingRecord
    started: float


def write(result: Result, plan: Plan, out: Path, options: TrainOptions, progress: Progress) -> Healed:
    """Merge what was trained into the base and write it to `out`, whole or not at all. Raises VerificationError."""
    base, whole, remote = result.base, result.whole, options.trust_remote_code
    checked = options.verify
    if checked == "auto":
        checked = "logits" if fits(4 * base.parameters, options.device) else "load"
    losses = Losses(result.loss_of(whole.path), result.loss_of(base.path))
    spans, probe = _changes(result, checked == "logits", options, progress)
    if probe is None and checked == "logits":  # nothing was trained, or peft cannot apply the adapter
        checked = "load"
    errors: tuple[float | None, float | None] = None, None
    with atomic_directory(out, replace=options.force) as directory:
        progress.stage("Writing", base.total_bytes, "bytes")
        copy_unchanged(
            base,
            directory,
            replaced=spans,
            max_shard_bytes=options.max_shard_bytes,
            progress=progress.advance,
        )
        if checked != "none":
            progress.stage("Checking every key and shape")
            verify.check_load(directory, trust_remote_code=remote)
        if probe is not None:
            progress.stage("Comparing logits")
            errors = check_merged(base, directory, probe, device=options.device, trust_remote_code=remote)
        progress.stage("Measuring the loss after")
        losses = replace(losses, after=result.loss_of(directory))
        healing = _record(result, plan, losses, spans)
        plan = replace(plan, healing=healing, command=plan.command or options.command)
        _tell(result, plan, directory)
    return Healed(out, plan, checked, errors[0], healing.measured.falls, errors[1])


def _changes(
    result: Result, check: bool, options: TrainOptions, progress: Progress
) -> tuple[dict[str, TensorSpan], Probe | None]:
    """(raw key -> tensor to write, logits that the result must give)."""
    base, weights, remote = result.base, result.course.weights, options.trust_remote_code
    if weights is None:  # no step was better than the start
        return {}, None
    if result.settings.method == "full":
        trained, homes = Checkpoint.open(weights), homes_of(base, trust_remote_code=remote)
        spans = spans_of(base, trained, homes)
        if not check:
            return spans, None
        progress.stage("Reference logits of the trained weights")
        return spans, probe_of(base, trained, homes, device=options.device, trust_remote_code=remote)
    adapter = Adapter.open(weights)
    places = placed(base, adapter, trust_remote_code=remote)
    probe = None
    if check:
        progress.stage("Reference logits of the base with the adapter")
        try:
            probe = reference_logits(base, adapter, places, options.device, remote)
        except HealError as error:
            if options.verify == "logits":
                raise
            progress.note(f"checking keys and shapes only, not logits: {error}")
    return merged_spans(base, adapter, places), probe


def _record(result: Result, plan: Plan, losses: Losses, spans: Mapping[str, TensorSpan]) -> HealingRecord:
    """For plan.json: what was done, on what, and the figures."""
    course, training = result.course, result.record.training
    assert training is not None
    sources = {new: old for old, new in new_keys(result.whole, plan, result.whole.tensors).items()}
    earlier = plan.healing.tensors if plan.healing else ()
    return replace(
        result.record,
        loss=losses,
        best_step=course.best,
        steps=max(course.train, default=0),
        tensors=tuple(sorted({*earlier, *(sources[key] for key in spans)})),
        training=replace(
            training,
            held_out={step: round(value, 6) for step, value in course.held_out.items()},
            ended=course.ended,
            seconds=round(time.monotonic() - result.started, 1),
        ),
    )


def _tell(result: Result, plan: Plan, directory: Path) -> None:
    """Write plan.json, the model card, the losses of every step and the curve."""
    from slicer.judge.loss_plot import loss_curve

    course, told = result.course, directory / "slicer"
    told.mkdir(exist_ok=True)
    (told / "plan.json").write_text(plan.to_json(), "utf-8")
    history = {"train": course.train, "held_out": course.held_out, "best_step": course.best}
    (told / "training.json").write_text(json.dumps(history, indent=1) + "\n", "utf-8")
    loss_curve(course.train, course.held_out, course.best, told / "training.png")
    figures = (told / "distances.png").is_file()
    text = card.for_slice(
        result.whole, plan, measure_sizes(result.whole), measure_sizes(result.base), figures=figures
    )
    (directory / "README.md").write_text(text, "utf-8")
