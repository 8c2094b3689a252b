"""What a command does, decided once from its request: the repair, the text, the checks, where the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slicer.checkpoint.cut import CutOnDisk
from slicer.checkpoint.hub import Source
from slicer.data.sources import TextSpec
from slicer.heal.finetune.settings import Training, TrainingSettings
from slicer.jobs.request import Compensation, ConvertRequest, HealRequest, Selection
from slicer.plan.amounts import Goal
from slicer.plan.plan import Plan
from slicer.runtime.compute import Compute


@dataclass(frozen=True)
class Recipe:
    """What a command does. Made by `Recipe.of` or `Recipe.of_heal`; nothing decides again later.

    Attributes:
        goal, plan: how much to drop, or the plan that is replayed: one of the two.
        repair: weight compensation in closed form; its method is "none", "fold", "bias" or "linear".
        asked: False for a fold that nobody asked for: it may fail, and is left out where it does not help.
        text: the text that is measured and repaired on; None: none is read.
        halves: whether to measure within the layers too: needed, not wanted, or (None) where it can be done.
        compute: where models run, in the precision of the result.
        loads: whether the source fits in memory; else its layers are read one at a time.
        verify: "none", "load" or "logits".
        training, settings: as asked, and every value used; None: nothing is trained.
        notes: for the user.
    """

    goal: Goal | None
    plan: Plan | None
    selection: Selection
    repair: Compensation
    asked: bool
    text: TextSpec | None
    halves: bool | None
    compute: Compute
    loads: bool
    verify: str
    training: Training | None = None
    settings: TrainingSettings | None = None
    notes: tuple[str, ...] = ()
    command: str | None = None

    @property
    def measures(self) -> bool:
        """Whether the source is measured to choose the cut."""
        return self.goal is not None and self.goal.measured(self.selection.strategy)

    @property
    def needs_model(self) -> bool:
        """Whether the source is run: to measure, to repair, or for its logits."""
        return self.measures or self.repair.method != "none" or self.verify == "logits"

    @classmethod
    def of(cls, request: ConvertRequest, source: Source) -> Recipe:
        """Of a conversion. Raises SlicerError children for what cannot be done."""
        ...

    @classmethod
    def of_heal(cls, request: HealRequest, cut: CutOnDisk) -> Recipe:
        """Of a repair or a training of a cut on disk. Raises SlicerError children for what cannot be done."""
        ...

    def marks(self, cut: CutOnDisk) -> Mapping[str, object]:
        """JSON values that a training must share with the one whose work it resumes."""
        ...
