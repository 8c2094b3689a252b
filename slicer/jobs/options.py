"""What a conversion is asked for and what it answers: the goal, the options, the summary. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.sizes import Sizes
from slicer.checkpoint.tensors import DTYPES
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.data.sources import TextSpec
from slicer.errors import UsageError
from slicer.heal.finetune.settings import METHODS, Training
from slicer.plan.amounts import Goal
from slicer.plan.plan import FORMS, Plan
from slicer.plan.records import MAPS

if TYPE_CHECKING:
    from slicer.sweep.ranks import RankSearch


STRATEGIES = ("similarity", "deepest", "tail")
HEALINGS = ("none", "auto", "fold", *METHODS)
OFFSETS = ("auto", "whole", "half")


def output_name(source: str, size: str) -> str:
    """The name of a result where none is given: "Llama-2-7b-hf-24L" of org/Llama-2-7b-hf@main and "24L"."""
    name = source.rsplit("@", 1)[0] if not Path(source).exists() else str(Path(source).resolve())
    return f"{Path(name).name or 'model'}-{size}"


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
        fold: the solver, one of `slicer.heal.compensate.fold.SOLVERS`.
        training: how to train, where `heal` says so; None: as the method's preset has it.
        save_adapter: where the trained adapter goes as well.
        rank_sweep: ranks to choose among.
        format: how layers without attention or feed-forward part are written: "blockwise" or "zeroed"; None:
            "blockwise" where any is, else "native".
        emulate: "bias" or "linear": what stands for the parts removed, solved in closed form on the calibration data;
            None for nothing, but a plan that was emulated is emulated again.
        rank: of the linear maps.
        emulate_steps: steps of training that what stands for the removed parts then gets, alone; 0 leaves it as solved.
        offset: in similarity mode, blocks of "whole" layers, "half"-offset ones, or "auto": the closer of the two
            (whole layers alone for the fold "transform", for training, and for a fold of experts or behind norms).
    """

    strategy: str = "similarity"
    calibration: TextSpec = field(default_factory=TextSpec)
    verify: str = "auto"
    dtype: str | None = None
    device: str = "auto"
    memory: int | None = None
    heal: str | None = None
    fold: str = "resolve"
    training: Training | None = None
    save_adapter: Path | None = None
    rank_sweep: RankSearch | None = None
    format: str | None = None
    offset: str = "auto"
    emulate: str | None = None
    rank: int | None = None
    emulate_steps: int = 0
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
            **(_below(plan) if plan.below_layers else {}),
            "distance": plan.distance,
            "runners_up": [other.to_dict() for other in plan.runners_up],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "healing": plan.healing and plan.healing.to_dict(),
            "verified": self.verified,
            "logits_error": self.logits_error,
            "rounding_error": self.rounding_error,
            "warnings": list(self.warnings),
        }


def _below(plan: Plan) -> dict[str, Any]:
    return {
        "no_attention": list(plan.no_attention),
        "no_ffn": list(plan.no_ffn),
        "joined": [list(pair) for pair in plan.joined],
        "form": plan.form,
    }


def check_options(options: Options, goal: Goal | None, plan: Plan | None) -> None:
    if (goal is None) == (plan is None):
        raise UsageError(
            "say how much to drop (--drop, --keep, --max-params, --max-bytes, --drop-attention, --drop-ffn, "
            "--drop-sublayers) or give --plan, not both"
        )
    if options.strategy not in STRATEGIES:
        raise UsageError(f"strategy {options.strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if options.heal is not None and options.heal not in HEALINGS:
        raise UsageError(f"heal {options.heal!r}: choose one of {', '.join(HEALINGS)}")
    if options.format is not None and options.format not in FORMS:
        raise UsageError(f"format {options.format!r}: choose one of {', '.join(FORMS)}")
    if options.offset not in OFFSETS:
        raise UsageError(f"offset {options.offset!r}: choose one of {', '.join(OFFSETS)}")
    if options.emulate is not None and options.emulate not in MAPS:
        raise UsageError(f"emulate {options.emulate!r}: choose one of {', '.join(MAPS)}")
    if options.emulate is not None and options.heal not in (None, "none"):
        raise UsageError("--emulate and --heal both fill the gap: give one of them")
    if (options.emulate == "linear") != (options.rank is not None):
        raise UsageError("--emulate linear needs --rank, and only that does: --emulate linear --rank 32")
    if options.emulate_steps < 0 or (options.emulate_steps and options.emulate is None):
        raise UsageError(
            f"--emulate-steps {options.emulate_steps}: trains what --emulate puts in; give that, and a number of steps"
        )
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank {options.rank}: must lie between 1 and the model's width")
    if options.offset == "half" and options.strategy != "similarity":
        raise UsageError(f"--offset half: chosen by similarity, not by --strategy {options.strategy}")
    if options.verify not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {options.verify!r}: choose auto, none, load or logits")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: choose one of {', '.join(DTYPES)}")
