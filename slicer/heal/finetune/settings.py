"""Settings of a training: what is asked, the paper's table by model, and the values that follow. Standard library only.

The table is that of Gromov et al., appendix A.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from slicer.errors import UsageError

if TYPE_CHECKING:
    from slicer.data.corpus import CorpusSize

METHODS = ("qlora", "lora", "full")
STARTS = ("fold", "cut")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
COMPUTE = ("auto", "float32", "bfloat16")
WARMUP = 100  # at most a tenth of the steps
EVALUATIONS = 10  # of a run, where their distance is not given
PASS_TOKENS = 4096  # of a micro-batch, where its size is not given
FULL_SHARE = 0.1  # the paper trains adapters; full training uses a smaller learning rate
_CHOICES = {"method": METHODS, "start": STARTS, "compute": COMPUTE, "lr_scheduler_type": SCHEDULERS}
_ABOVE_ZERO = ("learning_rate", "lora_alpha")
_AT_LEAST_ZERO = ("weight_decay", "lora_dropout", "mismatch_weight", "kl_weight")


@dataclass(frozen=True)
class PaperRow:
    """One model of the paper's table; `parameters`: those of the unpruned model."""

    name: str
    pattern: str
    parameters: float
    seq_len: int
    learning_rate: float
    lora_r: int


PAPER = (
    PaperRow("Llama-2-7B", r"llama-?2-?7b", 6.74e9, 2048, 3e-4, 2),
    PaperRow("Llama-2-13B", r"llama-?2-?13b", 13.0e9, 4096, 3e-4, 64),
    PaperRow("Llama-2-70B", r"llama-?2-?70b", 69.0e9, 4096, 3e-5, 8),
    PaperRow("Qwen-7B", r"qwen-?7b", 7.72e9, 2048, 3e-4, 64),
    PaperRow("Qwen-14B", r"qwen-?14b", 14.2e9, 4096, 3e-4, 64),
    PaperRow("Mistral-7B", r"mistral-?7b", 7.24e9, 2048, 3e-6, 4),
    PaperRow("Phi-2", r"phi-?2(?![.\d])", 2.78e9, 2048, 2e-4, 64),
)


@dataclass(frozen=True)
class Training:
    """What is asked of a training. None: the paper's value for the model, or the value that the field names.

    Raises UsageError for values that suit no model.

    Attributes:
        method: "qlora" (adapters on NF4 weights), "lora" (adapters on the weights as stored) or "full" (all weights).
        start: "fold": from the folded weights, if the cut can be folded; "cut": from the source's weights.
        max_steps: optimizer steps.
        batch_size: sequences of a step, over all processes.
        micro_batch: sequences of a forward and backward pass of one process; None: as many as have 4096 tokens.
        seq_len: tokens of a sequence.
        learning_rate: peak learning rate.
        lr_scheduler_type: how the learning rate falls: "cosine", "linear", "constant" or "constant_with_warmup".
        warmup_steps: steps in which the learning rate rises; None: 100, at most a tenth of all.
        weight_decay: of AdamW.
        lora_r: rank of the adapters.
        lora_alpha: the adapters are scaled by lora_alpha / lora_r; None: the rank.
        lora_dropout: dropout of the adapters' input.
        seed: of all randomness: documents, initial adapters, dropout.
        validation: text for the held-out loss; None: documents of the training text are held out.
        validation_samples: its number of sequences.
        eval_every: steps between evaluations, and between checkpoints; None: a tenth of all.
        patience: evaluations without a new best before training stops; 0 never stops.
        gradient_checkpointing: compute activations twice: less memory, a third more time.
        compute: precision of the arithmetic; "auto": float32 on a CPU, bfloat16 on a GPU.
        teacher: model to distil from, if a weight below is given; None: the source.
        teacher_cache: directory for the teacher's outputs, computed once; None: the teacher runs alongside.
        teacher_4bit: run the teacher in NF4.
        mismatch_weight: weight of equation 8 of the paper at each cut.
        kl_weight: weight of KL(teacher || student) on the logits.
        report_to: the Trainer's trackers, comma-separated.
    """

    method: str = "qlora"
    start: str = "fold"
    max_steps: int = 5000
    batch_size: int = 16
    micro_batch: int | None = None
    seq_len: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.05
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

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{_option(name)} {getattr(self, name)}: choose from {', '.join(known)}")
        for name in (*_ABOVE_ZERO, *_AT_LEAST_ZERO):
            value, above = getattr(self, name), name in _ABOVE_ZERO
            if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and not above))):
                continue
            words = "above 0" if above else "not below 0"
            raise UsageError(f"{_option(name)} {value:g}: must be a number {words}")
        if self.lora_dropout >= 1:
            raise UsageError(f"--lora-dropout {self.lora_dropout:g}: must be below 1")
        for name in ("lora_r", "lora_alpha", "lora_dropout") if self.method == "full" else ():
            if name in self.chosen and getattr(self, name):  # a dropout of 0 is allowed
                raise UsageError(f"{_option(name)}: only for adapters; leave it out with --method full")
        for name in ("teacher", "teacher_cache", "teacher_4bit"):
            if getattr(self, name) and not self.distils:
                raise UsageError(
                    f"{_option(name)}: also pass the weight of a loss with --mismatch-weight, --kl-weight or both"
                )
        if self.teacher_4bit and self.teacher_cache is not None:
            raise UsageError(
                "--teacher-4bit: --teacher-cache computes outputs in full precision; pass only one of them"
            )

    @property
    def chosen(self) -> dict[str, object]:
        """The values that differ from the defaults; `of_record` makes the same request of them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def identity(self) -> dict[str, object]:
        """What must not change when a training is resumed: all but the options for memory and speed."""
        return {k: v for k, v in asdict(self).items() if k not in ("micro_batch", "gradient_checkpointing")}

    @property
    def distils(self) -> bool:
        """Whether a distillation loss is added."""
        return self.mismatch_weight > 0 or self.kl_weight > 0


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class TrainingSettings:
    """The values that a training uses: those that `asked` left open, decided; see `Training` for the fields."""

    asked: Training
    micro_batch: int
    seq_len: int
    learning_rate: float
    warmup_steps: int
    lora_r: int
    lora_alpha: float
    eval_every: int
    compute: str

    @property
    def size(self) -> CorpusSize:
        """How much text the training needs."""
        from slicer.data.corpus import CorpusSize

        asked = self.asked
        return CorpusSize(asked.max_steps, asked.batch_size, self.seq_len, asked.validation_samples)

    def to_dict(self) -> dict[str, object]:
        """For the record: every value used; full training has no settings of adapters."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "asked"}
        left_out = ("start", *(("lora_r", "lora_alpha", "lora_dropout") if self.asked.method == "full" else ()))
        found = {**asdict(self.asked), **own}
        return {k: v for k, v in found.items() if k not in left_out and v is not None}


def resolve(
    asked: Training, source: str, parameters: int, *, most_tokens: int | None, on_gpu: bool, processes: int = 1
) -> tuple[TrainingSettings, list[str]]:
    """(settings for a model cut from `source`, which has `parameters`; notes about the defaults chosen).

    `most_tokens`: the model's maximum sequence length. Raises UsageError for contradictory values.
    """
    row, listed = paper_row(source, parameters)
    adapters = asked.method != "full"
    taken = [
        *([f"rank {row.lora_r}"] if asked.lora_r is None and adapters else []),
        *([f"learning rate {row.learning_rate:g}"] if asked.learning_rate is None and adapters else []),
        *([f"sequences of {row.seq_len} tokens"] if asked.seq_len is None else []),
    ]
    notes = []
    if taken and not listed:
        notes.append(f"{source} is not in the paper: using {', '.join(taken)} of {row.name}, the closest in size")
    seq_len = asked.seq_len or row.seq_len
    if most_tokens is not None and seq_len > most_tokens:
        if asked.seq_len is not None:
            raise UsageError(f"--train-seq-len {seq_len}: the model's context is {most_tokens} tokens; lower it")
        notes.append(f"sequences of {most_tokens} tokens, the model's maximum")
        seq_len = most_tokens
    if asked.batch_size % processes:
        raise UsageError(f"--train-batch-size {asked.batch_size}: not a multiple of {processes} processes")
    share = asked.batch_size // processes
    micro_batch = asked.micro_batch or divisor(share, max(1, PASS_TOKENS // seq_len))
    if share % micro_batch:
        of = f" of each of {processes} processes" if processes > 1 else ""
        raise UsageError(f"--micro-batch {micro_batch}: not a divisor of the {share} sequences per step{of}")
    learning_rate = asked.learning_rate
    if learning_rate is None:
        learning_rate = row.learning_rate * (1 if adapters else FULL_SHARE)
        if not adapters:
            notes.append(f"learning rate {learning_rate:g}: a tenth of the paper's value for adapters")
    compute = asked.compute if asked.compute != "auto" else "bfloat16" if on_gpu else "float32"
    steps, lora_r = asked.max_steps, asked.lora_r or row.lora_r
    warmup = min(WARMUP, steps // 10) if asked.warmup_steps is None else asked.warmup_steps
    alpha = float(lora_r) if asked.lora_alpha is None else asked.lora_alpha
    every = min(asked.eval_every or max(1, steps // EVALUATIONS), steps)
    return TrainingSettings(asked, micro_batch, seq_len, learning_rate, warmup, lora_r, alpha, every, compute), notes


def paper_row(source: str, parameters: int) -> tuple[PaperRow, bool]:
    """(row of the paper's table, by name or else the closest in size; whether the model is listed)."""
    name = re.split(r"[/\\]", source.split("@")[0].rstrip("/\\"))[-1].lower().replace("_", "-")
    for row in PAPER:
        if re.search(rf"(^|[^a-z]){row.pattern}(?![\d.])", name):
            return row, True
    return min(PAPER, key=lambda row: abs(math.log(row.parameters / max(parameters, 1)))), False


def of_record(asked: Mapping[str, object]) -> Training:
    """What was asked of a training, as its record in a plan has it (`Training.chosen`)."""
    known = {f.name for f in fields(Training)}
    chosen: dict[str, Any] = {name: value for name, value in asked.items() if name in known}
    return Training(**chosen)


def divisor(n: int, most: int) -> int:
    """The greatest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
