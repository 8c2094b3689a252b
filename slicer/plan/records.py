"""What plan.json records beside the layers: the texts, the losses, how the cut was healed, what was merged in.

Frozen values of the standard library alone. `to_dict` gives JSON values; `of` reads them back and raises PlanError
naming the field at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class TextRecord:
    """The calibration text that a figure was measured on, or a repair fitted on.

    Attributes:
        source: file, data set or "self"; several with commas between.
        samples: sequences; seq_len: tokens in each.
        column: of a data set, the one that holds the text.
        sha256: of all token ids as int64, in order.
        held_out: numbers of the sequences that took no part in the fit.
    """

    source: str
    samples: int
    seq_len: int
    batch_size: int = 4
    seed: int = 0
    column: str = "text"
    sha256: str | None = None
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Losses:
    """Cross entropy in nats a token on text held out: of the source, of the cut before and after its repair.

    `solved`: of maps as they were solved, where steps of training followed. None: not measured.
    """

    source: float | None = None
    before: float | None = None
    after: float | None = None
    solved: float | None = None

    @property
    def falls(self) -> bool:
        """Whether the repair lowers the loss."""
        return self.before is not None and self.after is not None and self.after < self.before


@dataclass(frozen=True)
class SolvedMatrix:
    """One matrix that weight compensation changed.

    Attributes:
        layer: of the source; module: its name within the layer.
        way: "direct", "normed", "experts", "gain", "newton", ...: how it was solved.
        strength: of the ridge; error_left: share of the squared error left on the sequences held out.
        change: |new - old| / |old|, of second-order steps.
    """

    layer: int
    module: str
    way: str
    strength: float | None = None
    error_left: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class CorpusRecord:
    """The text of a training run, in packed sequences.

    Attributes:
        validation: where the held-out sequences come from, if not from `source`.
        learned: which tokens the loss is taken on: "every token", or the answers of conversations.
        left_out: training sequences left out because they are held out too.
    """

    source: str
    train_sequences: int
    held_out_sequences: int
    learned: str = "every token"
    validation: str | None = None
    left_out: int = 0
    seed: int = 0
    column: str = "text"


@dataclass(frozen=True)
class TrainingRecord:
    """How a cut was trained.

    Attributes:
        start: "cut", "fold", or the method of an earlier repair that training continued from.
        asked: the settings that were given; settings: every value used.
        held_out: step -> loss on the held-out sequences, nats a token.
        ended: why training stopped.
    """

    start: str
    asked: Mapping[str, object]
    settings: Mapping[str, object]
    corpus: CorpusRecord
    held_out: Mapping[int, float] = field(default_factory=dict)
    ended: str = "steps"
    seconds: float = 0.0
    processes: int = 1


@dataclass(frozen=True)
class HealingRecord:
    """How the cut was repaired.

    Attributes:
        method: "fold", "bias", "linear", "qlora", "lora" or "full".
        text: what it was solved on, or what a fold before training was solved on.
        tensors: raw keys of the source whose tensors were changed, sorted.
        solver: of a fold; rank: of linear maps.
        steps, best_step: of training; best_step is the one whose weights were kept (0: those it started from).
        precision: torch dtype that the fold was computed in.
        earlier: the repair that this one continued from.
    """

    method: str
    text: TextRecord | None
    loss: Losses
    tensors: tuple[str, ...] = ()
    solver: str | None = None
    rank: int | None = None
    steps: int = 0
    best_step: int = 0
    precision: str | None = None
    solved: tuple[SolvedMatrix, ...] = ()
    training: TrainingRecord | None = None
    earlier: HealingRecord | None = None
    command: str | None = None


@dataclass(frozen=True)
class MergeRecord:
    """A LoRA adapter that was merged in.

    Attributes:
        adapter: its directory; sha256: of its weights; base_model: what its config names.
        renumber: whether its layers were numbered as in the source.
        tensors: keys of the checkpoint that changed; left_out: matrices of dropped layers.
    """

    adapter: str
    sha256: str | None = None
    base_model: str | None = None
    renumber: bool = False
    tensors: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    verified: str | None = None
    logits_error: float | None = None
    rounding_error: float | None = None
    command: str | None = None
