"""Writes the result of a training: merged weights, record, model card and loss curve; verified, then renamed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint import card, verify
from slicer.checkpoint.adapter import Adapter, placed
from slicer.checkpoint.export import copy_unchanged
from slicer.checkpoint.merge import Probe, check_merged, merged_spans, reference_logits
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.writer import atomic_directory
from slicer.errors import HealError
from slicer.heal.full import homes_of, probe_of, spans_of
from slicer.heal.healing import new_keys
from slicer.heal.job import Healed
from slicer.heal.settings import Settings
from slicer.plan.plan import Plan
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.heal.trained import TrainOptions
    from slicer.heal.watch import Course


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        base: the checkpoint that training started from; whole: the source.
        loss_of: held-out loss of a checkpoint directory in nats per token; None if it cannot be measured.
        record: for plan.json, without the losses.
        started: `time.monotonic` of the start.
    """

    base: Checkpoint
    whole: Checkpoint
    course: Course
    settings: Settings
    loss_of: Callable[[Path], float | None]
    record: Mapping[str, Any]
    started: float


def write(result: Result, plan: Plan, out: Path, options: TrainOptions, progress: Progress) -> Healed:
    """Merge the trained weights into the base and write them to `out`, atomically. Raises VerificationError."""
    base, whole, course, remote = result.base, result.whole, result.course, options.trust_remote_code
    checked = options.verify
    if checked == "auto":
        checked = "logits" if verify.fits_in_memory(4 * base.parameters, options.device) else "load"
    losses = {"source": result.loss_of(whole.path), "before": result.loss_of(base.path)}
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
        losses["healed"] = result.loss_of(directory)
        plan = replace(
            plan, healing=_record(result, plan, losses, spans), command=plan.command or options.command
        )
        _tell(result, plan, directory)
    before, after = losses["before"], losses["healed"]
    if before is None or after is None:
        before, after = course.held_out[0], course.held_out[course.best]
    return Healed(out, plan, checked, errors[0], after < before, errors[1])


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


def _record(
    result: Result, plan: Plan, losses: Mapping[str, float | None], spans: Mapping[str, TensorSpan]
) -> dict[str, Any]:
    """The record for plan.json: method, settings, text and losses."""
    course = result.course
    sources = {new: old for old, new in new_keys(result.whole, plan, result.whole.tensors).items()}
    earlier = (plan.healing or {}).get("tensors") or ()
    return {
        **result.record,
        "loss": {name: None if value is None else round(value, 6) for name, value in losses.items()},
        "held_out": {str(step): round(value, 6) for step, value in course.held_out.items()},
        "best_step": course.best,
        "steps": max(course.train, default=0),
        "ended": course.ended,
        "seconds": round(time.monotonic() - result.started, 1),
        "tensors": sorted({*earlier, *(sources[key] for key in spans)}),
    }


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
