"""Evaluate a model: lm-eval's tasks with lm-eval's prompts and scoring, the loss on text, the health of generated text.

A `Suite` holds loaded tasks and drawn text and can be run on any number of models, so all cuts of a sweep are measured
on the same items.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.checkpoint import hub
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import EvaluationError
from slicer.evaluate import backends, lm_tasks, loss
from slicer.evaluate.lm_tasks import LOSS, LmTask
from slicer.evaluate.results import Evaluation, Score
from slicer.model.load import load_model
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.versions import versions

TASKS = ("mmlu", "boolq", LOSS)


@dataclass(frozen=True)
class SuiteSpec:
    """What to evaluate and how; the defaults of the command line are defined here.

    Attributes:
        tasks: lm-eval tasks, groups or tags, each with an optional number of examples (`mmlu@5`), and `c4`, the loss.
        num_fewshot: examples for tasks that give no number of their own; None uses the task's default.
        limit: number of items of each task, from the first, as in lm-eval: for a group, of each subtask.
        share_limit: apply a group's `limit` to all its subtasks together: items are drawn with the seed, in proportion
            to the subtask sizes, at least one each.
        data: directory of local files, see `slicer.evaluate.local_tasks`; None uses the data sets on the Hub.
        text: file to measure the loss on; None looks in `data`, or streams C4's validation split.
        batch_size: a number, or "auto": as many as fit on a GPU, 1 on a CPU, where larger batches are not faster.
        seed: of the text, of shared limits and of few-shot examples; 0 gives lm-eval's own examples.
        keep_tasks: directory to write the local task files to, for `lm_eval --include_path`.
    """

    tasks: tuple[str, ...] = TASKS
    num_fewshot: int | None = None
    limit: int | None = None
    share_limit: bool = False
    data: Path | None = None
    text: Path | None = None
    column: str = "text"
    sequences: int = loss.SEQUENCES
    backend: str = "hf"
    batch_size: str = "auto"
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    keep_tasks: Path | None = None


class Suite:
    """The tasks with their data, and the excerpts of text. Use as a context manager. Raises EvaluationError if a task
    is unknown, or its data is missing, empty or malformed."""

    def __init__(self, options: SuiteSpec, progress: Progress | None = None) -> None:
        self.options, self.progress = options, progress or Progress()
        self._scratch = tempfile.TemporaryDirectory(prefix="slicer-eval-")
        self.excerpts: loss.Excerpts | None = None
        self.files: list[Path] = []  # the files of `data` that the tasks read
        self._rounds: list[LmTask] = []
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Suite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary task files."""
        self._scratch.cleanup()

    def _prepare(self) -> None:
        options = self.options
        if options.data is not None and not options.data.is_dir():
            raise EvaluationError(f"--data {options.data}: no such directory")
        named = [lm_tasks.parse(task, options.num_fewshot) for task in dict.fromkeys(options.tasks)]
        if not named:
            raise EvaluationError(f"no tasks given; pass some, for example --tasks {','.join(TASKS)}")
        if any(task.name == LOSS for task in named):
            self.progress.stage("Drawing text for the loss")
            text = options.text or (loss.find_text(options.data) if options.data else None)
            count = min(options.sequences, options.limit or options.sequences)
            self.excerpts = loss.draw(text, sequences=count, seed=options.seed, column=options.column)
        asked = [task for task in named if task.name != LOSS]
        if not asked:
            return
        self.progress.stage("Loading tasks")
        directory = options.keep_tasks or Path(self._scratch.name) / "tasks"
        manager, self.files = lm_tasks.manager([task.name for task in asked], options.data, directory)
        # One at a time: lm-eval refuses a task next to a group that contains it (mmlu_astronomy, mmlu).
        local, limit, shared = options.data is not None, options.limit, options.share_limit
        self._rounds = [
            LmTask(manager, task, seed=options.seed, local=local, limit=limit, shared=shared) for task in asked
        ]

    @property
    def scored(self) -> tuple[str, ...]:
        """Labels of the tasks and groups that get a score of their own, and of the loss."""
        found = [part.label for part in self._rounds if part.adds_up]
        return (*found, LOSS) if self.excerpts is not None else tuple(found)

    def run(self, lm: Any, name: str, vocabulary: int) -> Evaluation:
        """Evaluate `lm` (an lm-eval model). `vocabulary` is V of the normalised loss. Raises EvaluationError."""
        started = time.monotonic()
        scores: list[Score] = []
        items: dict[str, dict[str, float]] = {}
        for part in self._rounds:
            self.progress.stage(f"{name}: {part.label}")
            part.run(lm, scores, items)
        measured = None
        if self.excerpts is not None:
            self.progress.stage(f"{name}: loss")
            nats, tokens = backends.text_losses(lm, self.excerpts.texts)
            measured, items[LOSS] = loss.summarise(self.excerpts, nats, tokens, vocabulary)
        self.progress.stage(f"{name}: writing samples")
        return Evaluation(
            model=name,
            scores=tuple(scores),
            loss=measured,
            health=backends.generation_health(lm),
            items=items,
            options=describe(self.options),
            versions=versions("lm-eval"),
            seconds=round(time.monotonic() - started, 1),
        )


def evaluate(source: str, suite: Suite) -> Evaluation:
    """Run `suite` on a checkpoint: a directory, a Hub id or "demo". Raises SourceError, EvaluationError."""
    options = suite.options
    suite.progress.stage(f"{source}: loading")
    path = hub.resolve(source).path
    Checkpoint.open(path)
    compute = Compute(options.device, options.dtype, trust_remote_code=options.trust_remote_code)
    if options.backend == "vllm":
        lm, vocabulary = backends.load_vllm(path, compute, options.batch_size, options.seed)
    else:
        model = load_model(path, compute)
        lm = backends.wrap(model, path, options.batch_size, trust_remote_code=options.trust_remote_code)
        vocabulary = backends.vocabulary_of(model)
        del model
    try:
        return suite.run(lm, source, vocabulary)
    finally:
        backends.release(lm)
        del lm
        memory.release()  # before the next model is loaded


def describe(options: SuiteSpec) -> dict[str, Any]:
    """The options, as plain values, that two results must share to be comparable."""
    names = ("tasks", "num_fewshot", "limit", "share_limit", "data", "backend", "batch_size", "seed", "dtype")
    data = str(options.data) if options.data else None
    return {name: getattr(options, name) for name in names} | {"tasks": list(options.tasks), "data": data}
