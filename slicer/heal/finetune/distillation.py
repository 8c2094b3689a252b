"""Builds the distillation loss: loads the teacher alongside the student, or caches its outputs first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.architectures.table import text_config
from slicer.checkpoint.reader import Checkpoint
from slicer.data.corpus import Corpus, Sequences
from slicer.errors import HealError
from slicer.heal.finetune.model import nf4, require, unpack
from slicer.heal.finetune.settings import TrainingSettings
from slicer.model.layers import watch
from slicer.model.load import load_model
from slicer.model.walk import Walk, open_walk
from slicer.plan.amounts import runs
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes
from slicer.runtime.files import check_space, write_atomically
from slicer.runtime.memory import within_memory

if TYPE_CHECKING:
    from slicer.heal.finetune.run import TrainOptions


def distillation_loss(
    whole: Checkpoint,
    plan: Plan,
    corpus: Corpus,
    settings: TrainingSettings,
    options: TrainOptions,
    processes: Processes,
    device: str,
    progress: Progress,
) -> DistillationLoss:
    """The distillation loss. Raises HealError for a teacher of another depth, width or vocabulary."""
    training, remote = options.training, options.trust_remote_code
    teacher = whole if training.teacher is None else Checkpoint.open(hub.resolve(training.teacher).path)
    streams, logits = settings.mismatch_weight > 0, settings.kl_weight > 0
    mine, its = text_config(whole.config), text_config(teacher.config)
    if streams and (teacher.depth != plan.depth or mine.get("hidden_size") != its.get("hidden_size")):
        raise HealError(
            f"{teacher.path}: depth or width differs from the model that was cut, so the residual streams cannot be "
            "compared; use only --kl-weight, or the source as teacher"
        )
    if logits and mine.get("vocab_size") != its.get("vocab_size"):
        raise HealError(
            f"{teacher.path}: the vocabulary differs from the model that was cut; use the source as teacher"
        )
    at = junctions(plan.dropped)
    if training.teacher_cache is not None:
        directory = Path(training.teacher_cache)

        def asked() -> Cached:
            with within_memory("caching the teacher's outputs", ["--device cpu"]):
                return cache_teacher(
                    teacher, corpus.train, at, directory, streams=streams, logits=logits,
                    dtype=plan.dtype, device=options.device, trust_remote_code=remote, progress=progress,
                )  # fmt: skip

        answers: Cached | Live = processes.first_then_all(asked)
    else:
        if training.teacher_4bit:
            require("qlora")
        progress.stage("Loading the teacher")
        ways = [*([] if training.teacher_4bit else ["--teacher-4bit"]), "--teacher-cache DIR"]
        with within_memory("loading the teacher", ways):
            model = load_model(
                teacher.path,
                dtype=settings.compute,
                device=device,
                trust_remote_code=remote,
                quantization=nf4(getattr(torch, settings.compute)) if training.teacher_4bit else None,
            )
        unpack(model)
        answers = Live(model, at, streams=streams, logits=logits)
    return DistillationLoss(answers, at, settings.mismatch_weight, settings.kl_weight)


TOP = 64
_TOGETHER = 64  # sequences that pass through the teacher together


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
        streams: x at each cut, [batch, seq, d].
        logits: [batch, seq, V], or None.
        top: (log probabilities [batch, seq, TOP], their tokens) if cached, else None.
    """

    streams: list[torch.Tensor]
    logits: torch.Tensor | None = None
    top: tuple[torch.Tensor, torch.Tensor] | None = None


class DistillationLoss:
    """The distillation loss, which is added to the loss on the text."""

    def __init__(
        self, teacher: Live | Cached, at: list[Junction], mismatch_weight: float, kl_weight: float
    ) -> None:
        self._teacher, self._cuts = teacher, at
        self._mismatch, self._kl = mismatch_weight, kl_weight
        self._seen: dict[int, torch.Tensor] = {}

    @property
    def beside(self) -> bool:
        """Whether the teacher is in memory alongside the student."""
        return isinstance(self._teacher, Live)

    @contextlib.contextmanager
    def listening(self, student: Any) -> Iterator[None]:
        """Inside the block, record the student's stream at the cuts in each forward pass."""
        wanted = {cut.student for cut in self._cuts} if self._mismatch else set()

        def listener(layer: int, states: torch.Tensor) -> None:
            if layer in wanted and states.requires_grad:
                self._seen[layer] = states

        with watch(student, listener):
            yield

    def loss(
        self, logits: torch.Tensor, tokens: torch.Tensor, index: torch.Tensor, learned: torch.Tensor
    ) -> torch.Tensor:
        """The distillation loss of a batch with student `logits`; `learned` [batch, seq - 1]: mask of the targets."""
        answer = self._teacher.answer(tokens, index)
        total = logits.new_zeros((), dtype=torch.float32)
        if self._mismatch:
            for cut, stream in zip(self._cuts, answer.streams, strict=True):
                if cut.student in self._seen:  # cuts before the first trained weight get no gradient
                    apart = hidden_state_loss(self._seen[cut.student], stream)
                    total = total + self._mismatch / len(self._cuts) * apart.to(total.device)
            self._seen.clear()
        if self._kl:
            total = total + self._kl * kl_loss(logits, answer, learned).to(total.device)
        return total


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Equation 8 for one cut, states [batch, seq, d]: mean over tokens of |x_t - x_s|^2 / |x_t|^2."""
    wanted = teacher.to(student.device).float()
    apart = (student.float() - wanted).square().sum(-1)
    return (apart / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def kl_loss(logits: torch.Tensor, answer: TeacherOutputs, learned: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, mean over the positions that predict a learned token."""
    student = logits[:, :-1][learned].float().log_softmax(-1)
    if answer.logits is not None:
        teacher = (
            answer.logits[:, :-1][learned.to(answer.logits.device)].to(student.device).float().log_softmax(-1)
        )
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert answer.top is not None
    chances, names = (part[:, :-1][learned.to(part.device)].to(student.device) for part in answer.top)
    likely, own = chances.float(), student.gather(-1, names.long())
    known = (likely.exp() * (likely - own)).sum(-1)
    rest, own_rest = ((1 - x.exp().sum(-1)).clamp_min(1e-8) for x in (likely, own))
    return (known + rest * (rest / own_rest).log()).mean()


class Live:
    """A teacher that runs alongside the student."""

    def __init__(self, model: Any, at: list[Junction], *, streams: bool, logits: bool) -> None:
        self._model, self._cuts, self._streams, self._logits = model, at, streams, logits

    @torch.no_grad()
    def answer(self, tokens: torch.Tensor, index: torch.Tensor) -> TeacherOutputs:
        seen: dict[int, torch.Tensor] = {}
        wanted = {cut.teacher for cut in self._cuts} if self._streams else set()

        def listener(layer: int, states: torch.Tensor) -> None:
            if layer in wanted:
                seen[layer] = states

        device = self._model.get_input_embeddings().weight.device
        with watch(self._model, listener):
            logits = self._model(input_ids=tokens.to(device), use_cache=False).logits
        return TeacherOutputs(
            [seen[cut.teacher] for cut in self._cuts if cut.teacher in seen], logits if self._logits else None
        )


class Cached:
    """A teacher whose outputs are cached in `directory`, one row per training sequence.

    `blank`: whether a cache file was missing or of the wrong size and was created with zeros.
    """

    def __init__(
        self, directory: Path, at: list[Junction], shape: tuple[int, int, int], *, streams: bool, logits: bool
    ) -> None:
        count, length, width = shape
        self.blank = False
        self._streams = [
            self._rows(directory / f"stream-{cut.teacher}", (count, length, width), torch.bfloat16)
            for cut in (at if streams else ())
        ]
        self._top = (
            (
                self._rows(directory / "top-chances", (count, length, TOP), torch.float16),
                self._rows(directory / "top-tokens", (count, length, TOP), torch.int32),
            )
            if logits
            else None
        )

    def _rows(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        if not file.is_file() or file.stat().st_size != count * dtype.itemsize:
            self.blank = True
            with open(file, "wb") as stream:
                stream.truncate(count * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)

    @property
    def files(self) -> list[torch.Tensor]:
        """All cache files, memory-mapped."""
        return [*self._streams, *(self._top or ())]

    def answer(self, tokens: torch.Tensor, index: torch.Tensor) -> TeacherOutputs:
        rows = index.cpu()
        top = None if self._top is None else (self._top[0][rows], self._top[1][rows])
        return TeacherOutputs([stream[rows] for stream in self._streams], top=top)

    def ask(self, walk: Walk, sequences: Sequences, at: list[Junction], rows: range, batch_size: int) -> None:
        """Compute `rows` with the model of `walk`."""
        tokens = torch.stack([sequences[i]["input_ids"] for i in rows])
        batches = list(torch.split(tokens, batch_size))
        starts = [rows.start + batch_size * b for b in range(len(batches))]
        states = walk.start(batches)
        wanted = {cut.teacher: stream for cut, stream in zip(at, self._streams, strict=False)}
        last = walk.depth if self._top is not None else max(wanted)
        for i in range(last + 1):
            if i in wanted:
                for b, first in enumerate(starts):
                    wanted[i][first : first + len(batches[b])] = states[b].cpu().to(torch.bfloat16)
            if i < last:
                walk.advance(i, states)
        if self._top is None:
            return
        for b, first in enumerate(starts):
            for at_row, logits in enumerate(walk.logits(states, b)):
                chances, names = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
                kept = self._top[0][first + at_row], self._top[1][first + at_row]
                kept[0].fill_(-1e4), kept[1].zero_()
                kept[0][:, : chances.shape[-1]] = chances.cpu().half()
                kept[1][:, : names.shape[-1]] = names.cpu().int()


def cache_teacher(
    teacher: Checkpoint,
    sequences: Sequences,
    at: list[Junction],
    directory: Path,
    *,
    streams: bool,
    logits: bool,
    dtype: str | None = None,
    memory_bytes: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Cached:
    """Compute the teacher's outputs for all `sequences` into `directory`; resumes a stopped run.

    Raises HealError if the directory holds outputs of another teacher, text, cut or kind; OutputError if the disk is
    full.
    """
    from slicer.checkpoint.architectures.table import text_config

    progress = progress or Progress()
    shape = (len(sequences), len(sequences[0]["input_ids"]), int(text_config(teacher.config)["hidden_size"]))
    text = hashlib.sha256(b"".join(sequences.digests())).hexdigest()
    mark = {"teacher": teacher.identity, "text": text, "at": [vars(cut) for cut in at], "streams": streams,
            "logits": logits, "dtype": dtype}  # fmt: skip
    file = directory / "teacher.json"
    state: dict[str, Any] = (
        json.loads(file.read_text("utf-8")) if file.is_file() else {"mark": mark, "done": 0}
    )
    if state["mark"] != mark:
        raise HealError(
            f"{directory}: contains outputs of another teacher, or for other text or cuts; pass another "
            "--teacher-cache"
        )
    count, length, width = shape
    if not file.is_file():
        check_space(directory, count * length * (2 * width * len(at) * streams + 6 * TOP * logits))
        directory.mkdir(parents=True, exist_ok=True)
    cached = Cached(directory, at, shape, streams=streams, logits=logits)
    if cached.blank:  # incomplete: rows that were never computed are zeros
        state["done"] = 0
    if state["done"] >= count:
        return cached
    compute = Compute(device, dtype, memory_bytes, trust_remote_code)
    loads = memory.fits(teacher.bytes_as(dtype), device, memory_bytes)
    with open_walk(teacher, compute, loads=loads) as walk:
        progress.stage("Caching the teacher's outputs", count - state["done"], "sequences")
        for start in range(state["done"], count, _TOGETHER):
            rows = range(start, min(start + _TOGETHER, count))
            cached.ask(walk, sequences, at, rows, batch_size=4)
            write_atomically(file, json.dumps({"mark": mark, "done": rows.stop}))
            progress.advance(len(rows))
    return cached
