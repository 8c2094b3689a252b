"""`--save-adapter DIR`: the adapter as peft saves it, with its base weights if they would be deleted otherwise.

DIR/adapter_config.json, adapter_model.safetensors
DIR/slicer.json     which base weights it belongs to (`slicer.checkpoint.adapter`)
DIR/base            those weights, if training started from a fold, or from a cut that convert made temporarily
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.checkpoint import card
from slicer.checkpoint.adapter import BASE, Adapter, note_base
from slicer.checkpoint.export import copy_unchanged
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.sublayers import new_keys
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError, OutputError, UsageError
from slicer.heal.finetune.full import homes_of, probe_of, spans_of
from slicer.heal.finetune.settings import TrainingSettings
from slicer.jobs.heal import Healed
from slicer.model import verify
from slicer.model.adapter import Probe, check_merged, merged_spans, placed, reference_logits
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord, Losses
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory, link_or_copy
from slicer.runtime.memory import fits
from slicer.runtime.workdir import beside

if TYPE_CHECKING:
    from slicer.heal.finetune.callbacks import TrainingHistory
    from slicer.heal.finetune.run import TrainOptions


_CONFIG = "adapter_config.json"


def _going(out: Path) -> list[Path]:
    """The directories that are removed once `out` is there."""
    return [beside(out, kind) for kind in ("training", "ranks", "cut")]


def check_keeping(place: Path | None, method: str, out: Path, others: Iterable[Path], *, force: bool) -> None:
    """Raise UsageError or OutputError if the adapter of a training for `out` cannot be saved at `place`.

    `others`: the checkpoints it is made from. `force` replaces an existing adapter.
    """
    if place is None:
        return
    if method == "full":
        raise UsageError("--save-adapter: --method full has no adapter; leave it out")
    real = place.resolve()
    for other in (out, *_going(out), *others):
        if real.is_relative_to(other.resolve()) or other.resolve().is_relative_to(real):
            raise OutputError(f"--save-adapter {place}: overlaps {other}; choose another directory")
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise OutputError(f"--save-adapter {place}: not a directory; choose another one")
    if place.is_dir() and any(place.iterdir()):
        if not force:
            raise OutputError(f"--save-adapter {place}: not empty; choose another directory, or use --force")
        if not (place / _CONFIG).is_file():
            raise OutputError(
                f"--save-adapter {place}: --force replaces only adapters, and this has no {_CONFIG}; remove it yourself"
            )
    parent = next(path for path in real.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--save-adapter {place}: {parent} is not writable; choose another directory")


@contextlib.contextmanager
def keeping(
    place: Path | None, weights: Path | None, base: Checkpoint, out: Path, *, force: bool, progress: Progress
) -> Iterator[None]:
    """Put the adapter `weights`, trained on `base`, at `place` when the block ends without an exception.

    A `base` in one of the work directories of `out`, which go, is kept beside the adapter.
    """
    if place is None or weights is None:
        if place is not None:
            progress.note(f"no adapter saved in {place}: no step was better than the start")
        yield
        return
    with atomic_directory(place, replace=force) as directory:
        shutil.copytree(
            weights, directory, ignore=shutil.ignore_patterns("training_args.bin"), dirs_exist_ok=True
        )
        found = base.path.resolve()
        if any(found.is_relative_to(work.resolve()) for work in _going(out)):
            shutil.copytree(found, directory / BASE, copy_function=link_or_copy)
            found = place.resolve() / BASE
        note_base(directory, base, str(found))
        config = json.loads((directory / _CONFIG).read_text("utf-8"))
        before, config["base_model_name_or_path"] = config.get("base_model_name_or_path"), str(found)
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        card = directory / "README.md"
        if before and card.is_file():
            card.write_text(card.read_text("utf-8").replace(before, str(found)), "utf-8")
        yield


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
    course: TrainingHistory
    settings: TrainingSettings
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
    from slicer.figures.training import loss_curve

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
