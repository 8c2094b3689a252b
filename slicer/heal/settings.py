"""How to train: what the user asks for, the paper's table by model, and the settings that the two make. Pure.

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
    4096  # sequences of a forward and backward pass, where not given: as many as have these tokens
)
_ABOVE_ZERO, _AT_LEAST_ZERO = ("lr", "alpha"), ("weight_decay", "dropout", "mismatch_weight", "kl_weight")
_EVALUATIONS = 10  # of a run, where not given
_FULL_SHARE = 0.1  # the paper trains adapters; all weights take a smaller learning rate


@dataclass(frozen=True)
class Row:
    """One model of the paper's table; `parameters` of the unpruned model."""

    name: str
    pattern: str
    parameters: float
    seq_len: int
    lr: float
    rank: int


PAPER = (
    Row("Llama-2-7B", r"llama-?2-?7b", 6.74e9, 2048, 3e-4, 2),
    Row("Llama-2-13B", r"llama-?2-?13b", 13.0e9, 4096, 3e-4, 64),
    Row("Llama-2-70B", r"llama-?2-?70b", 69.0e9, 4096, 3e-5, 8),
    Row("Qwen-7B", r"qwen-?7b", 7.72e9, 2048, 3e-4, 64),
    Row("Qwen-14B", r"qwen-?14b", 14.2e9, 4096, 3e-4, 64),
    Row("Mistral-7B", r"mistral-?7b", 7.24e9, 2048, 3e-6, 4),
    Row("Phi-2", r"phi-?2(?![.\d])", 2.78e9, 2048, 2e-4, 64),
)
STEPS, BATCH_SIZE, WARMUP, DROPOUT, SCHEDULER = 5000, 16, 100, 0.05, "cosine"


@dataclass(frozen=True)
class Training:
    """What is asked for; None leaves a value to the preset.

    Attributes:
        method: "qlora" (adapters on NF4 weights), "lora" (adapters on the weights as they are) or "full".
        start: "fold": from the folded weights, where the cut can be folded; "cut": from the source's own.
        batch_size: sequences of an optimizer step, over all processes.
        micro_batch: sequences of one forward and backward pass of one process.
        validation: text to measure the loss on; None sets documents of the training data apart.
        validation_samples: sequences of it.
        eval_every: steps between two measurements of it, and between two checkpoints.
        patience: measurements without a new best after which training stops; 0 never stops it.
        compute: precision of the arithmetic; "auto": float32 on a CPU, bfloat16 on a GPU.
        teacher: a model (the source, as a rule) that the student is drawn to, with the two weights below; None: none.
        teacher_cache: directory for the teacher's answers, computed once; None: the teacher runs beside.
        teacher_4bit: run the teacher in NF4.
        mismatch_weight: of the paper's equation 8 at each cut.
        kl_weight: of KL(teacher || student) on the logits.
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
        """Raise UsageError for what no model could be trained with."""
        for name, known in (
            ("method", METHODS),
            ("start", STARTS),
            ("preset", ("paper",)),
            ("compute", COMPUTE),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise UsageError(f"--scheduler {self.scheduler}: choose one of {', '.join(SCHEDULERS)}")
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
                if getattr(self, name):  # no dropout is what it has
                    raise UsageError(
                        f"--{name}: of adapters, and --method full trains all weights; leave it out"
                    )
        for name in ("teacher", "teacher_cache", "teacher_4bit"):
            if getattr(self, name) and not self.taught:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option}: say what is taught with --mismatch-weight, --kl-weight or both"
                )
        if self.teacher_4bit and self.teacher_cache is not None:
            raise UsageError(
                "--teacher-4bit: with --teacher-cache the teacher answers in full precision; give one of them"
            )

    def lasting(self) -> dict[str, Any]:
        """What has to stay for a training to go on where it was stopped: all but what only takes memory or time."""
        return {k: v for k, v in asdict(self).items() if k not in ("micro_batch", "gradient_checkpointing")}

    @property
    def taught(self) -> bool:
        """Whether a teacher takes part."""
        return self.mismatch_weight > 0 or self.kl_weight > 0


@dataclass(frozen=True)
class Settings:
    """Every value of a training, none left open; see `Training` for what they mean."""

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
        """For the record; a full training has no adapters."""
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
) -> tuple[Settings, list[str]]:
    """The settings of a training of a model cut from `source`, which has `parameters`; and words about choices made.

    `most_tokens` is the longest sequence the model reads. Raises UsageError where the values contradict each other.
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
        words.append(f"the paper has no {source}: {', '.join(taken)}, as its {row.name}, the nearest by size")
    seq_len = asked.seq_len or row.seq_len
    if most_tokens is not None and seq_len > most_tokens:
        if asked.seq_len is not None:
            raise UsageError(
                f"--train-seq-len {seq_len}: the model reads at most {most_tokens} tokens; lower it"
            )
        words.append(f"sequences of {most_tokens} tokens, the most that the model reads")
        seq_len = most_tokens
    steps, batch = asked.steps or STEPS, asked.batch_size or BATCH_SIZE
    if batch % processes:
        raise UsageError(f"--train-batch-size {batch}: does not divide among {processes} processes")
    share = batch // processes
    micro = asked.micro_batch or divisor(share, max(1, _MICRO_TOKENS // seq_len))
    if share % micro:
        of = f" of each of {processes} processes" if processes > 1 else ""
        raise UsageError(f"--micro-batch {micro}: does not divide the {share} sequences of a step{of}")
    lr = asked.lr
    if lr is None:
        lr = row.lr * (_FULL_SHARE if asked.method == "full" else 1)
        if asked.method == "full":
            words.append(f"learning rate {lr:g}: a tenth of what the paper gives adapters, for all weights")
    compute = asked.compute if asked.compute != "auto" else "bfloat16" if on_gpu else "float32"
    return Settings(
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


def paper_row(source: str, parameters: int) -> tuple[Row, bool]:
    """The row of the paper's table, by name or else the nearest by size; and whether the model is listed."""
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
