"""Requests: the options of a job as frozen values. In all of them None means "not given".

`slicer.jobs.recipe` applies the defaults, once; a request is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from slicer.data.sources import TextSpec
from slicer.errors import UsageError
from slicer.heal.finetune.settings import Training
from slicer.plan.amounts import Goal
from slicer.plan.plan import FORMS, Plan
from slicer.plan.records import MAPS, SOLVERS
from slicer.runtime.compute import Compute

STRATEGIES = ("similarity", "deepest", "tail")
OFFSETS = ("auto", "whole", "half")
COMPENSATIONS = ("none", "auto", "fold", *MAPS)
CANDIDATES = 4  # closest blocks of a size that an analysis compares by their loss after a fold
VERIFICATIONS = ("auto", "none", "load", "logits")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UsageError unless `value` is one of `allowed`, or None."""
    if value is not None and value not in allowed:
        raise UsageError(f"{name} {value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Text:
    """Calibration or training text; see `slicer.data.sources.TextSpec` for the fields."""

    source: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    column: str | None = None

    def over(self, spec: TextSpec) -> TextSpec:
        """`spec` with the fields that are given here replaced."""
        return replace(spec, **{k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def of(cls, spec: TextSpec) -> Text:
        """The request for exactly this text."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Selection:
    """How the layers are chosen and how the result is written.

    Attributes:
        strategy: "similarity", "deepest" or "tail".
        offset: of similarity: "whole" layers, "half"-offset blocks, or "auto", the closer of the two.
        form: how layers without attention or feed-forward are written: "blockwise" or "zeroed"; None: "blockwise"
            if a layer lacks one, else "native".
    """

    strategy: str = "similarity"
    offset: str = "auto"
    form: str | None = None

    def __post_init__(self) -> None:
        check_choice("--strategy", self.strategy, STRATEGIES)
        check_choice("--offset", self.offset, OFFSETS)
        check_choice("--format", self.form, FORMS)
        if self.offset == "half" and self.strategy != "similarity":
            raise UsageError(f"--offset half: chosen by similarity, not by --strategy {self.strategy}")


@dataclass(frozen=True)
class Compensation:
    """Weight compensation in closed form.

    Attributes:
        method: "none", "fold", "bias", "linear" or "auto" (a fold if there is text and it helps).
        solver: of a fold, one of `SOLVERS`.
        rank: of linear maps.
        steps: training steps of the constants or linear maps, and of nothing else.
        adapt: whether a fold also adapts the model to the kind of the calibration text.
    """

    method: str | None = None
    solver: str | None = None
    rank: int | None = None
    steps: int | None = None
    adapt: bool = False

    def __post_init__(self) -> None:
        check_choice("--heal", self.method, COMPENSATIONS)
        check_choice("--solver", self.solver, SOLVERS)
        if (self.method == "linear") != (self.rank is not None):
            raise UsageError("--heal linear needs --rank, and no other method has one: --heal linear --rank 32")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: must lie between 1 and the model's width")
        if self.steps and self.method not in MAPS:
            raise UsageError("--heal-steps: trains what --heal bias or linear adds; give one of them")


@dataclass(frozen=True)
class Output:
    """Where the result goes and how it is checked.

    Attributes:
        out: the directory; None: named after the source, in the working directory.
        verify: "none"; "load", every key and shape; "logits", also the logits; "auto": logits if the model fits.
        dry_run: nothing is written.
    """

    out: Path | None = None
    overwrite: bool = False
    verify: str = "auto"
    max_shard_bytes: int = 5 * 10**9
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_choice("--verify", self.verify, VERIFICATIONS)


@dataclass(frozen=True)
class ConvertRequest:
    """Drop layers of `source` by a `goal`, or by a saved `plan`: exactly one of the two."""

    source: str
    goal: Goal | None = None
    plan: Plan | None = None
    selection: Selection = Selection()
    compensation: Compensation = Compensation()
    text: Text = Text()
    output: Output = Output()
    compute: Compute = Compute()
    command: str | None = None

    def __post_init__(self) -> None:
        if (self.goal is None) == (self.plan is None):
            raise UsageError(
                "give either an amount to drop (--drop, --keep-layers, --max-params, --max-bytes, --drop-attention, "
                "--drop-ffn, --drop-sublayers) or --plan"
            )

    @property
    def identity(self) -> dict[str, object]:
        """JSON values that determine the cut."""
        return {
            "source": self.source,
            "goal": None if self.goal is None else str(self.goal),
            "plan": self.plan and self.plan.to_json(),
            "selection": asdict(self.selection),
            "text": asdict(self.text),
            "dtype": self.compute.dtype,
        }


@dataclass(frozen=True)
class HealRequest:
    """Repair `cut`, which slicer made from `source` (None: as in its plan): by `training`, else in closed form."""

    cut: str
    source: str | None = None
    training: Training | None = None
    compensation: Compensation = Compensation("fold")
    text: Text = Text()
    output: Output = Output()
    compute: Compute = Compute()
    save_adapter: Path | None = None
    command: str | None = None


@dataclass(frozen=True)
class MergeRequest:
    """Merge a LoRA adapter into `cut`; `renumber`: it was trained on the unsliced model."""

    cut: str
    adapter: Path
    renumber: bool = False
    output: Output = Output()
    compute: Compute = Compute()
    command: str | None = None


@dataclass(frozen=True)
class Measures:
    """What an analysis measures besides the distances between layers.

    Attributes:
        positions: number of tokens of each sequence, evenly spaced, that averages over tokens use.
        losses: block sizes whose blocks are also measured by the loss without each of them.
        greedy: number of layers to remove one by one, by the loss (SLEB); 0: none.
        taylor: |gradient x weight| of each layer.
        sublayers: attention and feed-forward separately, and half-offset cuts.
        shapley: forward passes to spend on Shapley values of the layers, or of their sublayers; 0: none.
        against: the cost that these divide: "loss", "kl", or "task:NAME", the score of an lm-eval task.
        questions: of that task; data: its local files (None: the Hub's).
        healed: block sizes whose closest blocks are also compared by the loss after a fold.
    """

    positions: int = 16
    losses: tuple[int, ...] = ()
    greedy: int = 0
    taylor: bool = False
    sublayers: bool = False
    shapley: int = 0
    against: str = "loss"
    questions: int = 64
    data: Path | None = None
    healed: tuple[int, ...] = ()


@dataclass(frozen=True)
class AnalyzeRequest:
    """Measure `source` into the directory `out`; `beside`: another analysis, to plot both against each other."""

    source: str
    out: Path
    measures: Measures = Measures()
    beside: Path | None = None
    overwrite: bool = False
    text: Text = Text()
    compute: Compute = Compute()
    command: str | None = None
