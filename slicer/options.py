"""What a conversion is asked for and what it answers: the goal, the options, the summary. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.export import DTYPES
from slicer.checkpoint.sizes import Sizes
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.errors import PlanError, UsageError
from slicer.heal.settings import METHODS, Training
from slicer.measure.calibration import CalibrationSpec
from slicer.plan import Amount, Plan

if TYPE_CHECKING:
    from slicer.heal.rank_sweep import RankSweep

STRATEGIES = ("similarity", "deepest", "tail")
HEALINGS = ("none", "auto", "fold", *METHODS)


@dataclass(frozen=True)
class Goal:
    """How deep to cut: exactly one field is set. Budgets ask for the smallest n that meets them."""

    drop: Amount | None = None
    keep: int | None = None
    max_params: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in asdict(self).values()) != 1:
            raise UsageError(
                "say how much to drop with exactly one of --drop, --keep, --max-params and --max-bytes"
            )

    def counts(self, depth: int) -> Iterable[int]:
        """The numbers of layers to drop to try, in order; `met` says when to stop."""
        if self.drop is not None:
            return (self.drop.resolve(depth),)
        if self.keep is not None:
            if not 0 < self.keep < depth:
                raise PlanError(
                    f"--keep {self.keep}: the model has {depth} layers; keep between 1 and {depth - 1}"
                )
            return (depth - self.keep,)
        return range(1, depth)

    def met(self, sizes: Sizes) -> bool:
        """Whether `sizes` is within the budget."""
        within_parameters = self.max_params is None or sizes.parameters <= self.max_params
        return within_parameters and (self.max_bytes is None or sizes.total_bytes <= self.max_bytes)

    def __str__(self) -> str:
        return next(f"--{k.replace('_', '-')} {v}" for k, v in asdict(self).items() if v is not None)


@dataclass(frozen=True)
class Options:
    """How to convert; every default of the command line lives here.

    Attributes:
        verify: "none", "load", "logits", or "auto": logits while the model fits in memory, load otherwise.
        dtype: None keeps the stored one; otherwise a key of `export.DTYPES` for the written tensors and the model
            that measures.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        memory: bytes that the weights may take; a larger model is read from disk a layer at a time. None: what is free.
        heal: "none"; "fold"; or "auto", which folds where there is calibration data, the architecture allows it and
            it lowers the loss on held-out text; or a way to train. None is "auto", but a plan is replayed as
            it was, healed or not.
        fold: the solver, one of `slicer.heal.fold.SOLVERS`.
        training: how to train, where `heal` says so; None: as the method's preset has it.
        save_adapter: where the trained adapter goes as well.
        rank_sweep: ranks to choose among.
    """

    strategy: str = "similarity"
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    verify: str = "auto"
    dtype: str | None = None
    device: str = "auto"
    memory: int | None = None
    heal: str | None = None
    fold: str = "resolve"
    training: Training | None = None
    save_adapter: Path | None = None
    rank_sweep: RankSweep | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    force: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    command: str | None = None


@dataclass(frozen=True)
class Summary:
    """What convert did: the plan, what it saves, how the result was checked."""

    out: Path | None
    plan: Plan
    before: Sizes
    after: Sizes
    verified: str
    logits_error: float | None = None
    rounding_error: float | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: plain values, the plan under its own names."""
        plan = self.plan
        return {
            "out": None if self.out is None else str(self.out),
            "source": plan.source,
            "revision": plan.revision,
            "model_type": plan.model_type,
            "strategy": plan.strategy,
            "kept": list(plan.kept),
            "dropped": list(plan.dropped),
            "distance": plan.distance,
            "runners_up": list(plan.runners_up),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "healing": None if plan.healing is None else dict(plan.healing),
            "verified": self.verified,
            "logits_error": self.logits_error,
            "rounding_error": self.rounding_error,
            "warnings": list(self.warnings),
        }


def check_options(options: Options, goal: Goal | None, plan: Plan | None) -> None:
    if (goal is None) == (plan is None):
        raise UsageError(
            "say how much to drop (--drop, --keep, --max-params, --max-bytes) or give --plan, not both"
        )
    if options.strategy not in STRATEGIES:
        raise UsageError(f"strategy {options.strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if options.heal is not None and options.heal not in HEALINGS:
        raise UsageError(f"heal {options.heal!r}: choose one of {', '.join(HEALINGS)}")
    if options.verify not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {options.verify!r}: choose auto, none, load or logits")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: choose one of {', '.join(DTYPES)}")
