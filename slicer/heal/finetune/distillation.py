"""The distillation loss: a teacher that runs alongside the student, or whose outputs are cached first."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.architectures.table import text_config
from slicer.checkpoint.cut import CutOnDisk
from slicer.checkpoint.reader import Checkpoint
from slicer.data.corpus import Corpus, Sequences
from slicer.errors import HealError
from slicer.heal.finetune.model import nf4, require, unpack
from slicer.heal.finetune.settings import TrainingSettings
from slicer.model.layers import watch
from slicer.model.load import Model, load_model
from slicer.model.walk import Walk, open_walk
from slicer.plan.amounts import runs
from slicer.progress import SILENT, Progress
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes
from slicer.runtime.files import check_space, write_atomically
from slicer.runtime.memory import fits, within_memory

TOP = 64  # most probable tokens whose probabilities are cached
_TOGETHER = 64  # sequences that pass through the teacher before progress is noted
_BATCH = 4  # sequences of one forward pass of these


@dataclass(frozen=True)
class Junction:
    """A place where layers are missing: the student's x(`student`) corresponds to the teacher's x(`teacher`)."""

    student: int
    teacher: int


def junctions(dropped: Sequence[int]) -> list[Junction]:
    """The end of each dropped block (source indices), where student and teacher should agree."""
    gone = sorted(dropped)
    return [Junction(end - sum(i < end for i in gone), end) for _, end in runs(gone)]


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's outputs for a batch.

    Attributes:
        states: x at each junction, [batch, seq, d].
        logits: [batch, seq, V], or None.
        top: (log probabilities [batch, seq, TOP], their tokens) if cached, else None.
    """

    states: list[torch.Tensor]
    logits: torch.Tensor | None = None
    top: tuple[torch.Tensor, torch.Tensor] | None = None


def distillation_loss(
    base: CutOnDisk,
    corpus: Corpus,
    settings: TrainingSettings,
    compute: Compute,
    processes: Processes,
    progress: Progress,
) -> DistillationLoss:
    """The distillation loss for the student `base`, with its teacher loaded or its outputs cached.

    Raises HealError for a teacher of another depth, width or vocabulary; OutOfMemory, with the options that need less.
    """
    asked, source = settings.asked, base.source.checkpoint
    teacher = source if asked.teacher is None else Checkpoint.open(hub.resolve(asked.teacher).path)
    states, logits = asked.mismatch_weight > 0, asked.kl_weight > 0
    own, other = text_config(source.config), text_config(teacher.config)
    if states and (teacher.depth != source.depth or own.get("hidden_size") != other.get("hidden_size")):
        raise HealError(
            f"{teacher.path}: depth or width differs from the model that was cut, so hidden states cannot be compared; "
            "use only --kl-weight, or the source as teacher"
        )
    if logits and own.get("vocab_size") != other.get("vocab_size"):
        raise HealError(
            f"{teacher.path}: the vocabulary differs from the model that was cut; use the source as teacher"
        )
    at = junctions(base.plan.dropped)
    if asked.teacher_cache is not None:
        directory, stored = Path(asked.teacher_cache), replace(compute, dtype=base.plan.dtype)

        def cached() -> CachedTeacher:
            with within_memory("caching the teacher's outputs", ["--device cpu"]):
                kinds = {"states": states, "logits": logits}
                return cache_teacher(teacher, corpus.train, at, directory, stored, progress, **kinds)

        outputs: CachedTeacher | LiveTeacher = processes.first_then_all(cached)
    else:
        if asked.teacher_4bit:
            require("qlora")
        ways = ["--teacher-4bit"] * (not asked.teacher_4bit) + ["--teacher-cache DIR"]
        quantization = nf4(settings.compute) if asked.teacher_4bit else None
        progress.stage("Loading the teacher")
        with within_memory("loading the teacher", ways):
            model = load_model(teacher.path, compute.pinned(), dtype=settings.compute, quantization=quantization)
        unpack(model)
        outputs = LiveTeacher(model, at, states=states, logits=logits)
    return DistillationLoss(outputs, at, asked.mismatch_weight, asked.kl_weight)


class DistillationLoss:
    """The distillation loss, which is added to the loss on the text.

    `alongside`: whether the teacher is in memory together with the student.
    """

    def __init__(
        self, teacher: LiveTeacher | CachedTeacher, at: list[Junction], mismatch_weight: float, kl_weight: float
    ) -> None:
        self._teacher, self._at = teacher, at
        self._mismatch, self._kl = mismatch_weight, kl_weight
        self._states: dict[int, torch.Tensor] = {}
        self.alongside = isinstance(teacher, LiveTeacher)

    @contextlib.contextmanager
    def recording(self, student: Model) -> Iterator[None]:
        """Inside the block, record the student's hidden states at the junctions in each forward pass."""
        wanted = {junction.student for junction in self._at} if self._mismatch else set()

        def record(layer: int, states: torch.Tensor) -> None:
            if layer in wanted and states.requires_grad:
                self._states[layer] = states

        with watch(student, record):
            yield

    def loss(
        self, logits: torch.Tensor, tokens: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The distillation loss of the last forward pass, a scalar, in float32.

        `logits` [batch, seq, V] of the student on `tokens` [batch, seq], whose numbers in the corpus are `index`
        [batch]; `targets` [batch, seq - 1]: whether the next token is learned.
        """
        outputs = self._teacher.outputs(tokens, index)
        total = logits.new_zeros((), dtype=torch.float32)
        if self._mismatch:
            for junction, states in zip(self._at, outputs.states, strict=True):
                if junction.student in self._states:  # one before the first trained weight gets no gradient
                    mismatch = hidden_state_loss(self._states[junction.student], states)
                    total = total + self._mismatch / len(self._at) * mismatch.to(total.device)
            self._states.clear()
        if self._kl:
            total = total + self._kl * kl_loss(logits, outputs, targets).to(total.device)
        return total


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Equation 8 for one junction, states [batch, seq, d]: mean over tokens of |x_t - x_s|^2 / |x_t|^2."""
    wanted = teacher.to(student.device).float()
    apart = (student.float() - wanted).square().sum(-1)
    return (apart / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def kl_loss(logits: torch.Tensor, outputs: TeacherOutputs, targets: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, mean over the positions whose next token is learned.

    `logits` [batch, seq, V] of the student, `targets` [batch, seq - 1]. Of cached outputs, the tokens below the top
    count as one.
    """
    student = logits[:, :-1][targets].float().log_softmax(-1)
    if outputs.logits is not None:
        teacher = outputs.logits[:, :-1][targets.to(outputs.logits.device)].to(student.device)
        teacher = teacher.float().log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert outputs.top is not None
    chances, tokens = (part[:, :-1][targets.to(part.device)].to(student.device) for part in outputs.top)
    top, own = chances.float(), student.gather(-1, tokens.long())
    known = (top.exp() * (top - own)).sum(-1)
    rest, own_rest = ((1 - x.exp().sum(-1)).clamp_min(1e-8) for x in (top, own))
    return (known + rest * (rest / own_rest).log()).mean()


class LiveTeacher:
    """A teacher that runs alongside the student."""

    def __init__(self, model: Model, at: list[Junction], *, states: bool, logits: bool) -> None:
        self._model, self._logits = model, logits
        self._wanted = [junction.teacher for junction in at] if states else []

    @torch.no_grad()
    def outputs(self, tokens: torch.Tensor, index: torch.Tensor) -> TeacherOutputs:
        """Run the model on `tokens` [batch, seq]."""
        found: dict[int, torch.Tensor] = {}

        def record(layer: int, states: torch.Tensor) -> None:
            if layer in self._wanted:
                found[layer] = states

        device = self._model.get_input_embeddings().weight.device
        with watch(self._model, record):
            logits = self._model(input_ids=tokens.to(device), use_cache=False).logits
        return TeacherOutputs([found[layer] for layer in self._wanted], logits if self._logits else None)


class CachedTeacher:
    """A teacher whose outputs are cached in files of `directory`, one row for each of `count` training sequences.

    `blank`: whether a file was missing or of the wrong size and was created with zeros; `files`: all, memory-mapped.
    """

    def __init__(
        self, directory: Path, at: list[Junction], count: int, seq_len: int, width: int, *, states: bool, logits: bool
    ) -> None:
        self.blank = False
        self.files: list[torch.Tensor] = []

        def rows(name: str, last: int, dtype: torch.dtype) -> torch.Tensor:
            file, size = directory / name, count * seq_len * last
            if not file.is_file() or file.stat().st_size != size * dtype.itemsize:
                self.blank = True
                with open(file, "wb") as stream:
                    stream.truncate(size * dtype.itemsize)
            mapped = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
            self.files.append(mapped.view(count, seq_len, last))
            return self.files[-1]

        self._states = {
            junction.teacher: rows(f"stream-{junction.teacher}", width, torch.bfloat16)
            for junction in (at if states else ())
        }
        self._top = (rows("top-chances", TOP, torch.float16), rows("top-tokens", TOP, torch.int32)) if logits else None

    def outputs(self, tokens: torch.Tensor, index: torch.Tensor) -> TeacherOutputs:
        """Read the rows `index` [batch]."""
        rows = index.cpu()
        top = None if self._top is None else (self._top[0][rows], self._top[1][rows])
        return TeacherOutputs([states[rows] for states in self._states.values()], top=top)

    def fill(self, walk: Walk, sequences: Sequences, rows: range) -> None:
        """Compute `rows` with the model of `walk`."""
        batches = list(torch.split(torch.stack([sequences[i]["input_ids"] for i in rows]), _BATCH))
        starts = [rows.start + _BATCH * b for b in range(len(batches))]
        states = walk.start(batches)
        last = walk.depth if self._top is not None else max(self._states)
        for i in range(last + 1):
            if i in self._states:
                for b, first in enumerate(starts):
                    self._states[i][first : first + len(batches[b])] = states[b].cpu().to(torch.bfloat16)
            if i < last:
                walk.advance(i, states)
        if self._top is None:
            return
        for b, first in enumerate(starts):
            for row, logits in enumerate(walk.logits(states, b), first):
                chances, tokens = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
                top, names = self._top[0][row], self._top[1][row]
                top.fill_(-1e4), names.zero_()
                top[:, : chances.shape[-1]] = chances.cpu().half()
                names[:, : tokens.shape[-1]] = tokens.cpu().int()


def cache_teacher(
    teacher: Checkpoint,
    sequences: Sequences,
    at: list[Junction],
    directory: Path,
    compute: Compute,
    progress: Progress = SILENT,
    *,
    states: bool,
    logits: bool,
) -> CachedTeacher:
    """Compute the teacher's outputs for all `sequences` into `directory`; resumes a stopped run.

    Raises HealError if the directory holds outputs of another teacher, text, cut or kind; OutputError if the disk is
    full.
    """
    count, seq_len = len(sequences), len(sequences[0]["input_ids"])
    width = int(text_config(teacher.config)["hidden_size"])
    text = hashlib.sha256(b"".join(sequences.digests())).hexdigest()
    mark = {"teacher": teacher.identity, "text": text, "at": [vars(junction) for junction in at], "streams": states,
            "logits": logits, "dtype": compute.dtype}  # fmt: skip
    file = directory / "teacher.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {"mark": mark, "done": 0}
    if found["mark"] != mark:
        raise HealError(
            f"{directory}: contains outputs of another teacher, or for other text or cuts; pass another --teacher-cache"
        )
    if not file.is_file():
        check_space(directory, count * seq_len * (2 * width * len(at) * states + 6 * TOP * logits))
        directory.mkdir(parents=True, exist_ok=True)
    cached = CachedTeacher(directory, at, count, seq_len, width, states=states, logits=logits)
    done = 0 if cached.blank else int(found["done"])  # rows that were never computed are zeros
    if done >= count:
        return cached
    loads = fits(teacher.bytes_as(compute.dtype), compute)
    with open_walk(teacher, compute, loads=loads) as walk:
        progress.stage("Caching the teacher's outputs", count - done, "sequences")
        for start in range(done, count, _TOGETHER):
            rows = range(start, min(start + _TOGETHER, count))
            cached.fill(walk, sequences, rows)
            write_atomically(file, json.dumps({"mark": mark, "done": rows.stop}))
            progress.advance(len(rows))
    return cached
