"""Writes a result: to a temporary path, with figures and card, checked there, then renamed into place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.checkpoint import card, export
from slicer.checkpoint import config as configs
from slicer.checkpoint.export import Contents
from slicer.checkpoint.hub import Source
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import Sizes, measure_sizes, sizes_of
from slicer.heal.patch import Patch
from slicer.jobs.request import Output
from slicer.measure.analysis import Analysis
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.files import atomic_directory

if TYPE_CHECKING:
    from slicer.heal.finetune.callbacks import TrainingHistory
    from slicer.model.verify import Expected


@dataclass(frozen=True)
class Result:
    """What is to be written, and what the card and the summary tell about it.

    Attributes:
        plan: of the result; written unless it drops nothing (a checkpoint that slicer did not make).
        before: sizes of the source.
        name: of the directory, where none is given.
        analysis: what the cut was chosen by, to be drawn. history: of a training, to be drawn.
        warnings: about checkpoints that load but do not work everywhere.
        card: whether the model card is made anew; else that of `contents.origin` gets a paragraph.
    """

    contents: Contents
    plan: Plan
    before: Sizes
    name: str
    analysis: Analysis | None = None
    history: TrainingHistory | None = None
    warnings: tuple[str, ...] = ()
    card: bool = True

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
        Raises ArchitectureError where config.json cannot express the cut.
        """
        ...

    @classmethod
    def of_base(
        cls,
        base: Checkpoint,
        plan: Plan,
        patch: Patch,
        history: TrainingHistory | None = None,
        before: Sizes | None = None,
    ) -> Result:
        """`base`, a checkpoint on disk, with the tensors of `patch.replaced` (keys of the base) in place.

        `plan`: what the result's plan.json gets; the record of `patch`, if any, becomes its `healing`. `before`: sizes
        of the source; None: no new card is made, and the sizes are those of the base.
        """
        ...


@dataclass(frozen=True)
class Written:
    """What convert, heal or merge did.

    Attributes:
        out: the directory; None: nothing was written (a dry run).
        before, after: sizes of the source and of the result.
        verified: how the result was checked: "none", "load", "logits", or "nothing written".
        logits_error: largest difference from the expected logits, relative to the largest logit; rounding_error: the
            part of it that rounding the weights makes.
    """

    out: Path | None
    plan: Plan
    before: Sizes
    after: Sizes
    verified: str
    logits_error: float | None = None
    rounding_error: float | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """For `--json`: plain values, the plan under its own names."""
        plan = self.plan
        below = {
            "no_attention": list(plan.no_attention),
            "no_ffn": list(plan.no_ffn),
            "joined": [list(pair) for pair in plan.joined],
            "form": plan.form,
        }
        return {
            "out": None if self.out is None else str(self.out),
            "source": plan.source,
            "revision": plan.revision,
            "model_type": plan.model_type,
            "strategy": plan.strategy,
            "kept": list(plan.kept),
            "dropped": list(plan.dropped),
            **(below if plan.below_layers else {}),
            "distance": plan.distance,
            "runners_up": [other.to_dict() for other in plan.runners_up],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "healing": plan.healing and plan.healing.to_dict(),
            "merged": [record.to_dict() for record in plan.merged],
            "verified": self.verified,
            "logits_error": self.logits_error,
            "rounding_error": self.rounding_error,
            "warnings": list(self.warnings),
        }


def write_verified(
    result: Result, expected: Expected | None, output: Output, compute: Compute, progress: Progress
) -> Written:
    """Write `result` to `output.out` (None: a directory named after it), checked, whole or not at all.

    `expected`: the logits to compare with, and the text to measure the loss on, which becomes the record's
    `loss.after`; None: keys, shapes and changed tensors are checked alone. `output.verify` "none" skips the check of
    keys and shapes. Raises OutputError, VerificationError.
    """
    ...
