"""Writes a result: to a temporary path, with figures and card, checked there, then renamed into place."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from slicer.checkpoint import card, export
from slicer.checkpoint import config as configs
from slicer.checkpoint.export import Contents, check_output, output_name
from slicer.checkpoint.hub import Source
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import Sizes, measure_sizes, sizes_of
from slicer.figures import layers
from slicer.figures.training import loss_curve
from slicer.heal.patch import Patch
from slicer.jobs.forecast import Clock, Forecast
from slicer.jobs.request import Output
from slicer.measure.analysis import Analysis
from slicer.model.verify import Errors, Expected, check_contents
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord, plain
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.files import atomic_directory, check_space

if TYPE_CHECKING:
    from slicer.heal.finetune.callbacks import TrainingHistory


@dataclass(frozen=True)
class Result:
    """What to write, with the facts for the model card and the summary.

    Attributes:
        plan: of the result; written unless it drops nothing (a checkpoint that slicer did not make).
        before: sizes of the source.
        name: of the directory, if none is given.
        analysis: the measurements that the cut was chosen by, and history: of a training; both for the figures.
        warnings: about checkpoints that load but do not work everywhere.
        merge: the record of a merged adapter; the results of the check are added to it.
    """

    contents: Contents
    plan: Plan
    before: Sizes
    name: str
    analysis: Analysis | None = None
    history: TrainingHistory | None = None
    warnings: tuple[str, ...] = ()
    merge: MergeRecord | None = None

    @classmethod
    def of_cut(
        cls,
        source: Source,
        plan: Plan,
        patch: Patch,
        analysis: Analysis | None = None,
        origin: Path | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> Result:
        """The cut of `plan` from `source`, repaired by `patch`.

        `origin`: the same cut on disk, whose companion files and figures are kept; None: the source's companion files.
        Raises ArchitectureError if config.json cannot express the cut.
        """
        checkpoint = source.checkpoint
        config = configs.sliced_config(checkpoint, plan, dtype=plan.dtype, trust_remote_code=trust_remote_code)
        contents = export.sliced(checkpoint, plan, patch.configured(config), patch.replaced, patch.added)
        if origin is not None:
            contents = replace(contents, origin=origin, continues=True)
        # These warnings are about how vLLM reads the architecture of the source.
        native = plan.form != "blockwise" and len(plan.kept) < plan.depth
        warnings = tuple(configs.warnings(checkpoint.config, plan.kept, config)) if native else ()
        name, plan = output_name(source.name, plan.size_name), replace(plan, healing=patch.record)
        return cls(contents, plan, measure_sizes(checkpoint), name, analysis, warnings=warnings)

    @classmethod
    def of_base(
        cls,
        base: Checkpoint,
        plan: Plan,
        patch: Patch,
        history: TrainingHistory | None = None,
        before: Sizes | None = None,
        merge: MergeRecord | None = None,
    ) -> Result:
        """`base`, a checkpoint on disk, with the tensors of `patch.replaced` (keys of the base) in place.

        `plan`: of the base; the record of `patch`, if any, becomes its `healing`. `before`: sizes of the source; None:
        those of the base.
        """
        contents, name = export.unchanged(base, patch.replaced), output_name(str(base.path), plan.size_name)
        plan = replace(plan, healing=patch.record or plan.healing)
        return cls(contents, plan, before or measure_sizes(base), name, history=history, merge=merge)


def check_place(result: Result, output: Output) -> None:
    """Raise OutputError if `result` cannot be written: the directory may not be replaced, or the disk is too full."""
    out = output.out or Path(result.name)
    check_output(out, result.contents.origin, overwrite=output.overwrite)
    check_space(out, result.contents.total_bytes)


@dataclass(frozen=True)
class Written:
    """What convert, heal or merge did.

    Attributes:
        out: the directory; None: nothing was written (a dry run).
        before, after: sizes of the source and of the result.
        verified: how the result was checked: "none", "load", "logits", or "nothing written".
        logits_error: largest difference from the expected logits, relative to the largest logit; rounding_error: the
            part that comes from rounding the weights.
        forecast, took: time, memory and disk as expected at the start, and as they were; None: there was no forecast.
    """

    out: Path | None
    plan: Plan
    before: Sizes
    after: Sizes
    verified: str
    logits_error: float | None = None
    rounding_error: float | None = None
    warnings: tuple[str, ...] = ()
    forecast: Forecast | None = None
    took: Forecast | None = None

    def to_dict(self) -> dict[str, object]:
        """For `--json`: plain values, the plan under its own names."""
        below = ("no_attention", "no_ffn", "joined", "form") if self.plan.below_layers else ()
        cut = ("source", "revision", "model_type", "strategy", "kept", "dropped", *below, "distance", "runners_up")
        return {
            "out": None if self.out is None else str(self.out),
            **{name: plain(getattr(self.plan, name)) for name in cut},
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            **{name: plain(getattr(self.plan, name)) for name in ("healing", "merged")},
            **{name: plain(getattr(self, name)) for name in ("verified", "logits_error", "rounding_error", "warnings")},
            **{name: found and found.to_dict() for name, found in (("forecast", self.forecast), ("took", self.took))},
        }


def write_verified(
    result: Result, expected: Expected | None, output: Output, compute: Compute, progress: Progress
) -> Written:
    """Write `result` to `output.out` (None: a directory with its name), verified, whole or not at all.

    `expected`: the logits to compare with, and the text to measure the loss on, which becomes the record's
    `loss.after`; None: only keys, shapes and changed tensors are checked. `output.verify` "none" skips the check of
    keys and shapes. Raises OutputError, VerificationError.
    """
    out, after = output.out or Path(result.name), sizes_of(result.contents)
    plan, errors = result.plan, Errors()
    compared = expected is not None and expected.logits is not None
    verified = "logits" if compared else "none" if output.verify == "none" else "load"
    with atomic_directory(out, replace=output.overwrite) as directory:
        progress.stage("Writing", after.total_bytes, "bytes")
        export.write(result.contents, directory, max_shard_bytes=output.max_shard_bytes, progress=progress.advance)
        if verified != "none" or result.contents.changed or expected is not None:
            errors = check_contents(directory, result.contents, expected, compute, progress, load=verified != "none")
            if errors.loss is not None and plan.healing is not None:
                loss = replace(plan.healing.loss, after=errors.loss)
                plan = replace(plan, healing=replace(plan.healing, loss=loss))
        if result.merge is not None:
            merge = replace(result.merge, verified=verified, logits_error=errors.same, rounding_error=errors.rounding)
            plan = replace(plan, merged=(*plan.merged, merge))
        _describe(replace(result, plan=plan), after, directory)
    return Written(out, plan, result.before, after, verified, errors.same, errors.rounding, result.warnings)


def recorded(written: Written, clock: Clock) -> Written:
    """`written` with its forecast and what it took."""
    forecast, took = clock.finish(written.out)
    return replace(written, forecast=forecast, took=took)


def described(result: Result) -> Written:
    """What would be written: the result of a dry run."""
    after = sizes_of(result.contents)
    return Written(None, result.plan, result.before, after, "nothing written", warnings=result.warnings)


def _describe(result: Result, after: Sizes, directory: Path) -> None:
    """Write plan, figures and model card."""
    plan, origin, notes = result.plan, result.contents.origin, directory / "slicer"
    if plan.gone != (frozenset(), frozenset()):  # else slicer did not make the checkpoint, and there is no plan
        notes.mkdir(exist_ok=True)
        (notes / "plan.json").write_text(plan.to_json(), "utf-8")
    if result.analysis is not None:
        _draw(result.analysis, plan, notes)
    if result.history is not None:
        train, held_out, best = result.history.train, result.history.held_out, result.history.best
        losses = {"train": train, "held_out": held_out, "best_step": best}
        (notes / "training.json").write_text(json.dumps(losses, indent=1) + "\n", "utf-8")
        loss_curve(train, held_out, best, notes / "training.png")
        if plan.healing is not None and plan.healing.training is not None:  # `--config` takes the file
            settings = yaml.safe_dump(dict(plan.healing.training.settings), sort_keys=False)
            (notes / "training.yaml").write_text(settings, "utf-8")
    if result.merge is None:
        figures = (notes / "distances.png").is_file()
        text = card.for_plan(origin, plan, result.before, after, figures=figures)
        (directory / "README.md").write_text(text, "utf-8")
    elif (origin / "README.md").is_file():
        text = (origin / "README.md").read_text("utf-8") + card.merged(result.merge)
        (directory / "README.md").write_text(text, "utf-8")


def _draw(measured: Analysis, plan: Plan, directory: Path) -> None:
    distances = measured.distances()
    (directory / "distances.json").write_text(distances.to_json(), "utf-8")
    if measured.sublayers and plan.below_layers:
        (directory / "half-layers.json").write_text(measured.halves().to_json(), "utf-8")
    n = len(plan.dropped)
    chosen = (plan.dropped[0], n) if n and not plan.joined else None
    layers.heat_map(distances, directory / "distances.png", chosen=chosen, offset=plan.half_offset)
    layers.curves(distances, directory / "curves.png", chosen=chosen, offset=plan.half_offset)
