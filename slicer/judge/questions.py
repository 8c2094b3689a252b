"""Multiple-choice questions (`slicer.measure.questions.Questions`) from an lm-eval task, tokenized with its prompts."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from slicer.errors import EvaluationError
from slicer.judge import backends, tasks
from slicer.judge.evaluate import EvalOptions, Round
from slicer.measure.questions import Choice, Questions

PREFIX = "task:"


def draw(
    task: str,
    count: int,
    model: Any,
    path: Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Questions:
    """Draw `count` questions of a multiple-choice task with the seed (all, if it has fewer; from a group, in proportion
    to the sizes of its tasks).

    `task` may give its number of examples, as in `mmlu@5`. `model` and the tokenizer of the checkpoint at `path` define
    the tokenization. `data`: directory of local files (`slicer.judge.local_tasks`), None for the Hub. Questions come
    from the split that the task is scored on. Raises EvaluationError: unknown task, data missing, not multiple choice.
    """
    if data is not None and not data.is_dir():
        raise EvaluationError(f"--data {data}: no such directory")
    options = EvalOptions(
        tasks=(task,), data=data, seed=seed, batch_size="1", trust_remote_code=trust_remote_code
    )
    asked = tasks.parse(task, None)
    if asked.name == tasks.LOSS:
        raise EvaluationError(f"{task} is text, not a task; use --against loss")
    with tempfile.TemporaryDirectory(prefix="slicer-questions-") as scratch:
        manager, _ = tasks.manager([asked.name], data, Path(scratch))
        found = Round(manager, asked, options)
        lm = backends.wrap(model, path, options)
        found.reseed()
        loaded = {leaf: found.loaded["tasks"][leaf] for leaf in found.leaves}
        sizes = {leaf: len(each.eval_docs) for leaf, each in loaded.items()}
        made = _QuestionBuilder(lm)
        for leaf, n in tasks.share(sizes, count).items():
            chosen = sorted(random.Random(f"{seed} {leaf}").sample(range(sizes[leaf]), n))
            made.add(task, loaded[leaf], chosen)
    return Questions(task, tuple(made.batches), tuple(made.choices), tuple(made.right))


class _QuestionBuilder:
    """The questions so far; equal sequences are stored once."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._known: dict[tuple[int, ...], int] = {}
        self.batches: list[torch.Tensor] = []
        self.choices: list[tuple[Choice, ...]] = []
        self.right: list[frozenset[int]] = []

    def add(self, name: str, task: Any, chosen: list[int]) -> None:
        if task.OUTPUT_TYPE != "multiple_choice":
            raise EvaluationError(
                f"{name}: not multiple choice ({task.OUTPUT_TYPE}); choose a multiple-choice task, or "
                "--against loss"
            )
        task.build_all_requests(samples=chosen, rank=0, world_size=1)
        by_document: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        for instances in by_document.values():
            instances.sort(key=lambda instance: instance.idx)
            pairs = backends.encoded(self._lm, instances)
            right = _right(name, task, instances)
            self.choices.append(tuple(self._choice(*pair) for pair in pairs[: len(right)]))
            self.right.append(frozenset(k for k, scored in enumerate(right) if scored))

    def _choice(self, context: list[int], continuation: list[int]) -> Choice:
        row = tuple((context + continuation)[-(self._lm.max_length + 1) : -1])
        if row not in self._known:
            self._known[row] = len(self.batches)
            self.batches.append(torch.tensor([row]))
        return Choice(self._known[row], tuple(continuation))


def _right(name: str, task: Any, instances: list[Any]) -> list[bool]:
    """Whether each choice is right: calls lm-eval's own scoring once per choice, with that choice as the likeliest."""
    try:
        found = []
        unconditional = "acc_mutual_info" in getattr(
            task, "_metric_fn_list", {}
        )  # requests each choice a second time, without the question
        for k in range(len(instances) // (2 if unconditional else 1)):
            results = [(0.0 if k == at else -1.0, False) for at in range(len(instances))]
            found.append(bool(task.process_results(instances[0].doc, results)["acc"]))
        return found
    except (KeyError, ValueError, AssertionError, IndexError, TypeError):
        raise EvaluationError(
            f"{name}: lm-eval does not score it by accuracy (acc); choose another task, or --against loss"
        ) from None
