"""What plan.json records besides the layers: the texts, the losses, how the cut was repaired, what was merged in.

Frozen values of the standard library alone. `to_dict` gives JSON values; `of` reads them back, and what slicer 0.1
wrote (formats 1 and 2), and raises PlanError naming the field at fault.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from slicer.errors import PlanError

MAPS = ("bias", "linear")  # repairs that add a constant or a low-rank map behind sublayers that stay
SOLVERS = ("resolve", "transform")  # of a fold; the first is the default
_WORDS: dict[object, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    Mapping: "an object",
}


@dataclass(frozen=True)
class Record:
    """A value that JSON holds as an object. `renamed`: names that slicer 0.1 gave to its fields."""

    renamed: ClassVar[Mapping[str, str]] = {}

    def to_dict(self) -> dict[str, object]:
        """JSON values; fields that are None or empty are left out if that is their default."""
        found = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return {k: v for k, v in found.items() if v not in (None, [], {}) or k in self._required()}

    @classmethod
    def of(cls, value: object, where: str = "record") -> Self:
        """Read what `to_dict` gave. Unknown fields are ignored. Raises PlanError naming the field."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object")
        try:
            given = cls.upgraded({cls.renamed.get(str(name), str(name)): v for name, v in value.items()})
        except (TypeError, KeyError, ValueError, AttributeError):
            raise _wrong(where, value, "what slicer wrote") from None
        kinds, names = typing.get_type_hints(cls), given.keys() | cls._required()
        wanted = (f.name for f in fields(cls) if f.name in names)
        return cls(**{name: _read(kinds[name], given.get(name), f"{where}.{name}") for name in wanted})

    @classmethod
    def _required(cls) -> set[str]:
        return {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}

    @classmethod
    def upgraded(cls, record: dict[str, Any]) -> dict[str, Any]:
        """`record`, as slicer 0.1 may have written it, in the form of today."""
        return record


def plain(value: object) -> object:
    """`value` as JSON holds it."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read(kind: object, value: object, where: str) -> object:
    """`value`, checked against the annotation `kind`: lists become tuples, objects records."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is object:
        return value
    if origin in (types.UnionType, typing.Union):  # `kind | None`
        return None if value is None else _read(args[0], value, where)
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.of(value, where)
    if origin is tuple and isinstance(value, list | tuple):
        each = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(each) == len(value):
            return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(each, value, strict=True)))
    if origin is Mapping and isinstance(value, Mapping):
        numbers = args[0] is int
        if not numbers or all(str(key).isdecimal() for key in value):
            return {int(key) if numbers else str(key): _read(args[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise _wrong(where, value, _WORDS.get(origin or kind, "what slicer wrote"))


def _wrong(where: str, value: object, wanted: str) -> PlanError:
    return PlanError(f"{where} must be {wanted}, not {value!r:.60}; give a plan.json that slicer wrote")


@dataclass(frozen=True)
class RunnerUp(Record):
    """A cut that was not chosen: in words, with its distance by the metric of the choice."""

    block: str
    distance: float


@dataclass(frozen=True)
class TextRecord(Record):
    """The calibration text that a figure was measured on, or a repair fitted on.

    Attributes:
        source: file, data set or "self"; several with commas between.
        samples: sequences; seq_len: tokens in each.
        column: of a data set, the one that holds the text.
        sha256: of all token ids as int64, in order.
        held_out: numbers of the sequences that were not used in the fit.
    """

    renamed = {"text_column": "column", "tokens_sha256": "sha256"}

    source: str
    samples: int
    seq_len: int
    batch_size: int = 4
    seed: int = 0
    column: str = "text"
    sha256: str | None = None
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryRecord(Record):
    """The memory budgets with which a cut was measured and repaired, and the decision made by them.

    Attributes:
        host: bytes of the host's memory for weights and hidden states.
        device: the same of each GPU; None: the model ran on the CPU.
        loaded: whether the whole source was loaded; else its layers were read from disk one at a time.
    """

    host: int
    device: int | None
    loaded: bool


@dataclass(frozen=True)
class Losses(Record):
    """Cross entropy on held-out text, in nats a token: of the source, of the cut before and after its repair.

    `solved`: of maps as they were solved, if training steps followed. None: not measured.
    """

    renamed = {"sliced": "before", "cut": "before", "healed": "after"}

    source: float | None = None
    before: float | None = None
    after: float | None = None
    solved: float | None = None

    @property
    def falls(self) -> bool:
        """Whether the repair lowers the loss."""
        return self.before is not None and self.after is not None and self.after < self.before

    @classmethod
    def upgraded(cls, record: dict[str, Any]) -> dict[str, Any]:
        """0.1 had "emulated" for maps as they were solved, and "trained" for these after training."""
        if "trained" in record:
            return {**record, "after": record["trained"], "solved": record["emulated"]}
        return {**record, "after": record["emulated"]} if "emulated" in record else record


@dataclass(frozen=True)
class SolvedMatrix(Record):
    """One matrix that weight compensation changed.

    Attributes:
        layer: of the source; module: its name within the layer.
        way: "direct", "normed", "experts", "gain", "newton", ...: how it was solved; of a map behind the "attention" or
            "ffn" of the layer, the method.
        strength: of the ridge; error_left: share of the squared error that is left on the held-out sequences.
        change: |new - old| / |old|, of second-order steps.
    """

    layer: int
    module: str
    way: str
    strength: float | None = None
    error_left: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class CorpusRecord(Record):
    """The text of a training run, in packed sequences.

    Attributes:
        validation: where the held-out sequences come from, if not from `source`.
        learned: which tokens the loss is taken on: "all tokens", or the "answers" of conversations.
        documents: read; documents_left_out: of these, because the validation text has them too.
        left_out: training sequences left out because they are held out too.
    """

    renamed = {
        "text_column": "column",
        "documents_left_out_as_validation": "documents_left_out",
        "train_sequences_left_out_as_held_out": "left_out",
    }

    source: str
    train_sequences: int
    held_out_sequences: int
    learned: str = "all tokens"
    validation: str | None = None
    documents: int = 0
    documents_left_out: int = 0
    left_out: int = 0
    seed: int = 0
    column: str = "text"


@dataclass(frozen=True)
class RankRecord(Record):
    """How the rank of the adapters was picked: by which metric, and the score of each ("none": before training)."""

    metric: str
    picked: int
    scores: Mapping[str, float | None]


_SETTINGS = {  # what slicer 0.1 called them
    "steps": "max_steps", "lr": "learning_rate", "scheduler": "lr_scheduler_type", "warmup": "warmup_steps",
    "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingRecord(Record):
    """How a cut was trained.

    Attributes:
        start: "cut", "fold", or the method of an earlier repair that training continued from.
        asked: the settings that were given; settings: every value used.
        held_out: step -> loss on the held-out sequences, nats a token.
        ended: "done", "early" (no new best for a while) or "diverged" (the loss was not finite).
    """

    start: str
    asked: Mapping[str, object]
    settings: Mapping[str, object]
    corpus: CorpusRecord
    held_out: Mapping[int, float] = field(default_factory=dict)
    ended: str = "done"
    seconds: float = 0.0
    processes: int = 1
    rank_sweep: RankRecord | None = None

    @classmethod
    def upgraded(cls, record: dict[str, Any]) -> dict[str, Any]:
        """0.1 had other names for settings that transformers and peft also have."""
        for values in ("asked", "settings"):
            record[values] = {_SETTINGS.get(name, name): value for name, value in record[values].items()}
        return record


@dataclass(frozen=True)
class HealingRecord(Record):
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

    @property
    def measured(self) -> Losses:
        """The losses of the checkpoints; if these did not fit in memory, the losses measured in training."""
        if self.training is None or None not in (self.loss.before, self.loss.after):
            return self.loss
        held_out = self.training.held_out
        return replace(self.loss, before=held_out.get(0), after=held_out.get(self.best_step))

    @property
    def adds_maps(self) -> bool:
        """Whether constants or maps are added behind sublayers; else weights of the source were changed."""
        return self.method in MAPS

    @classmethod
    def upgraded(cls, record: dict[str, Any]) -> dict[str, Any]:
        """0.1 wrote the text as "calibration", maps as "behind", and training as fields of the repair itself."""
        corpus = record.get("data") or {}
        if text := record.get("calibration"):
            source = text.get("source") or corpus.get("source")
            record["text"] = {**text, "source": source, "held_out": record.get("held_out_sequences", ())}
        if "behind" in record:
            record["solved"] = [{**e, "module": e["part"], "way": record["method"]} for e in record["behind"]]
        if "settings" in record:
            record["training"] = {**record, "corpus": corpus}
        return record


@dataclass(frozen=True)
class MergeRecord(Record):
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
