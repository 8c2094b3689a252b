"""Training settings: the user's options, the paper's table by model, and the resolved settings. Standard library only.

The table is that of Gromov et al., appendix A.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from slicer.errors import UsageError

METHODS = ("qlora", "lora", "full")
STARTS = ("fold", "cut")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
COMPUTE = ("auto", "float32", "bfloat16")
_MICRO_TOKENS = (
    4096  # default tokens per micro-batch: it gets as many sequences as have these tokens together
)
_ABOVE_ZERO, _AT_LEAST_ZERO = ("lr", "alpha"), ("weight_decay", "dropout", "mismatch_weight", "kl_weight")
_EVALUATIONS = 10  # default number of evaluations per run
_FULL_SHARE = 0.1  # the paper trains adapters; full training uses a smaller learning rate


@dataclass(frozen=True)
class PaperRow:
    """One model of the paper's table; `parameters`: those of the unpruned model."""

    name: str
    pattern: str
    parameters: float
    seq_len: int
    lr: float
    rank: int


PAPER = (
    PaperRow("Llama-2-7B", r"llama-?2-?7b", 6.74e9, 2048, 3e-4, 2),
    PaperRow("Llama-2-13B", r"llama-?2-?13b", 13.0e9, 4096, 3e-4, 64),
    PaperRow("Llama-2-70B", r"llama-?2-?70b", 69.0e9, 4096, 3e-5, 8),
    PaperRow("Qwen-7B", r"qwen-?7b", 7.72e9, 2048, 3e-4, 64),
    PaperRow("Qwen-14B", r"qwen-?14b", 14.2e9, 4096, 3e-4, 64),
    PaperRow("Mistral-7B", r"mistral-?7b", 7.24e9, 2048, 3e-6, 4),
    PaperRow("Phi-2", r"phi-?2(?![.\d])", 2.78e9, 2048, 2e-4, 64),
)
STEPS, BATCH_SIZE, WARMUP, DROPOUT, SCHEDULER = 5000, 16, 100, 0.05, "cosine"


@dataclass(frozen=True)
class Training:
    """The user's options; None uses the preset's value.

    Attributes:
        method: "qlora" (adapters on NF4 weights), "lora" (adapters on unquantized weights) or "full".
        start: "fold": train from the folded weights, if the cut can be folded; "cut": from the source's weights.
        batch_size: sequences per optimizer step, over all processes.
        micro_batch: sequences per forward and backward pass of one process.
        validation: text for the held-out loss; None holds out documents of the training text.
        validation_samples: its number of sequences.
        eval_every: steps between evaluations, and between checkpoints.
        patience: evaluations without a new best before training stops; 0 never stops.
        compute: precision of the arithmetic; "auto": float32 on a CPU, bfloat16 on a GPU.
        teacher: model (usually the source) to distil from, with the two weights below; None: no distillation.
        teacher_cache: directory for the teacher's outputs, computed once; None: the teacher runs alongside.
        teacher_4bit: run the teacher in NF4.
        mismatch_weight: weight of equation 8 of the paper at each cut.
        kl_weight: weight of KL(teacher || student) on the logits.
        report_to: the Trainer's trackers, comma-separated.
    """

    method: str = "qlora"
    start: str = "fold"
    preset: str = "paper"
    steps: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    scheduler: str | None = None
    warmup: int | None = None
    weight_decay: float = 0.0
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    seed: int = 0
    validation: str | None = None
    validation_samples: int = 16
    eval_every: int | None = None
    patience: int = 5
    gradient_checkpointing: bool = False
    compute: str = "auto"
    teacher: str | None = None
    teacher_cache: str | None = None
    teacher_4bit: bool = False
    mismatch_weight: float = 0.0
    kl_weight: float = 0.0
    report_to: str = "none"

    def check(self) -> None:
        """Raise UsageError for values that are invalid for every model."""
        for name, known in (
            ("method", METHODS),
            ("start", STARTS),
            ("preset", ("paper",)),
            ("compute", COMPUTE),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise UsageError(f"--scheduler {self.scheduler}: choose from {', '.join(SCHEDULERS)}")
        for name in (*_ABOVE_ZERO, *_AT_LEAST_ZERO):
            value, above = getattr(self, name), name in _ABOVE_ZERO
            if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and not above))):
                continue
            words = "above 0" if above else "not below 0"
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be a number {words}")
        if self.dropout is not None and self.dropout >= 1:
            raise UsageError(f"--dropout {self.dropout:g}: must be below 1")
        if self.method == "full":
            for name in ("rank", "alpha", "dropout"):
                if getattr(self, name):  # a dropout of 0 is allowed
                    raise UsageError(f"--{name}: only for adapters; leave it out with --method full")
        for name in ("teacher", "teacher_cache", "teacher_4bit"):
            if getattr(self, name) and not self.taught:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option}: also pass the weight of a loss with --mismatch-weight, --kl-weight or both"
                )
        if self.teacher_4bit and self.teacher_cache is not None:
            raise UsageError(
                "--teacher-4bit: --teacher-cache computes outputs in full precision; pass only one of them"
            )

    def lasting(self) -> dict[str, Any]:
        """The options that must not change when a training is resumed: all but those for memory and speed."""
        return {k: v for k, v in asdict(self).items() if k not in ("micro_batch", "gradient_checkpointing")}

    @property
    def taught(self) -> bool:
        """Whether distillation is used."""
        return self.mismatch_weight > 0 or self.kl_weight > 0


@dataclass(frozen=True)
class TrainingSettings:
    """The resolved settings of a training; see `Training` for the fields."""

    method: str
    steps: int
    batch_size: int
    micro_batch: int
    seq_len: int
    lr: float
    scheduler: str
    warmup: int
    weight_decay: float
    rank: int
    alpha: float
    dropout: float
    seed: int
    validation_samples: int
    eval_every: int
    patience: int
    gradient_checkpointing: bool
    compute: str
    mismatch_weight: float
    kl_weight: float

    def to_dict(self) -> dict[str, Any]:
        """For the record; full training has no adapter settings."""
        record = asdict(self)
        return {
            k: v for k, v in record.items() if self.method != "full" or k not in ("rank", "alpha", "dropout")
        }


def resolve(
    asked: Training,
    source: str,
    parameters: int,
    *,
    most_tokens: int | None,
    on_gpu: bool,
    processes: int = 1,
) -> tuple[TrainingSettings, list[str]]:
    """(settings for a model cut from `source`, which has `parameters`; notes about the defaults chosen).

    `most_tokens`: the model's maximum sequence length. Raises UsageError for contradictory values.
    """
    asked.check()
    row, listed = paper_row(source, parameters)
    rank = asked.rank or row.rank
    taken = [
        *([f"rank {row.rank}"] if asked.rank is None and asked.method != "full" else []),
        *([f"learning rate {row.lr:g}"] if asked.lr is None and asked.method != "full" else []),
        *([f"sequences of {row.seq_len} tokens"] if asked.seq_len is None else []),
    ]
    words = []
    if taken and not listed:
        words.append(
            f"{source} is not in the paper: using {', '.join(taken)} of {row.name}, the closest in size"
        )
    seq_len = asked.seq_len or row.seq_len
    if most_tokens is not None and seq_len > most_tokens:
        if asked.seq_len is not None:
            raise UsageError(
                f"--train-seq-len {seq_len}: the model's context is {most_tokens} tokens; lower it"
            )
        words.append(f"sequences of {most_tokens} tokens, the model's maximum")
        seq_len = most_tokens
    steps, batch = asked.steps or STEPS, asked.batch_size or BATCH_SIZE
    if batch % processes:
        raise UsageError(f"--train-batch-size {batch}: not a multiple of {processes} processes")
    share = batch // processes
    micro = asked.micro_batch or divisor(share, max(1, _MICRO_TOKENS // seq_len))
    if share % micro:
        of = f" of each of {processes} processes" if processes > 1 else ""
        raise UsageError(f"--micro-batch {micro}: not a divisor of the {share} sequences per step{of}")
    lr = asked.lr
    if lr is None:
        lr = row.lr * (_FULL_SHARE if asked.method == "full" else 1)
        if asked.method == "full":
            words.append(f"learning rate {lr:g}: a tenth of the paper's value for adapters")
    compute = asked.compute if asked.compute != "auto" else "bfloat16" if on_gpu else "float32"
    return TrainingSettings(
        method=asked.method,
        steps=steps,
        batch_size=batch,
        micro_batch=micro,
        seq_len=seq_len,
        lr=lr,
        scheduler=asked.scheduler or SCHEDULER,
        warmup=asked.warmup if asked.warmup is not None else min(WARMUP, steps // 10),
        weight_decay=asked.weight_decay,
        rank=rank,
        alpha=asked.alpha if asked.alpha is not None else float(rank),
        dropout=asked.dropout if asked.dropout is not None else DROPOUT,
        seed=asked.seed,
        validation_samples=asked.validation_samples,
        eval_every=min(asked.eval_every or max(1, steps // _EVALUATIONS), steps),
        patience=asked.patience,
        gradient_checkpointing=asked.gradient_checkpointing,
        compute=compute,
        mismatch_weight=asked.mismatch_weight,
        kl_weight=asked.kl_weight,
    ), words


def paper_row(source: str, parameters: int) -> tuple[PaperRow, bool]:
    """(row of the paper's table, by name or else the closest in size; whether the model is listed)."""
    name = re.split(r"[/\\]", source.split("@")[0].rstrip("/\\"))[-1].lower().replace("_", "-")
    for row in PAPER:
        if re.search(rf"(^|[^a-z]){row.pattern}(?![\d.])", name):
            return row, True
    return min(PAPER, key=lambda row: abs(math.log(row.parameters / max(parameters, 1)))), False


def of_record(asked: Mapping[str, object]) -> Training:
    """What was asked of a training, as its record in a plan has it."""
    known = {f.name for f in fields(Training)}
    chosen: dict[str, Any] = {name: value for name, value in asked.items() if name in known}
    return Training(**chosen)


def divisor(n: int, most: int) -> int:
    """The greatest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
