"""An lm-eval task -> `slicer.measure.questions.Questions`: its own prompts, choices and scoring, tokenized."""

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
    """`count` questions of a multiple-choice task, drawn by the seed (all, where it has no more; of a group, from each
    of its tasks in proportion to their size).

    `task` may name its number of examples, `mmlu@5`. `model` and the tokenizer of the checkpoint at `path` tell how
    they are tokenized; `data` is a directory of local files (`slicer.judge.local_tasks`), None the Hub's. They are
    among those the task is scored on. Raises EvaluationError: an unknown task, its data missing, not multiple choice.
    """
    if data is not None and not data.is_dir():
        raise EvaluationError(f"--data {data}: no such directory")
    options = EvalOptions(
        tasks=(task,), data=data, seed=seed, batch_size="1", trust_remote_code=trust_remote_code
    )
    asked = tasks.parse(task, None)
    if asked.name == tasks.LOSS:
        raise EvaluationError(f"{task} is text, not questions; use --against loss")
    with tempfile.TemporaryDirectory(prefix="slicer-questions-") as scratch:
        manager, _ = tasks.manager([asked.name], data, Path(scratch))
        found = Round(manager, asked, options)
        lm = backends.wrap(model, path, options)
        found.reseed()
        loaded = {leaf: found.loaded["tasks"][leaf] for leaf in found.leaves}
        sizes = {leaf: len(each.eval_docs) for leaf, each in loaded.items()}
        made = _Making(lm)
        for leaf, n in tasks.share(sizes, count).items():
            chosen = sorted(random.Random(f"{seed} {leaf}").sample(range(sizes[leaf]), n))
            made.add(task, loaded[leaf], chosen)
    return Questions(task, tuple(made.batches), tuple(made.choices), tuple(made.right))


class _Making:
    """Questions so far; sequences that are alike are kept once."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._known: dict[tuple[int, ...], int] = {}
        self.batches: list[torch.Tensor] = []
        self.choices: list[tuple[Choice, ...]] = []
        self.right: list[frozenset[int]] = []

    def add(self, name: str, task: Any, chosen: list[int]) -> None:
        if task.OUTPUT_TYPE != "multiple_choice":
            raise EvaluationError(
                f"{name}: not multiple choice ({task.OUTPUT_TYPE}), and only that is scored here; "
                "choose such a task, or --against loss"
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
    """Which choices lm-eval counts as right, asked of its own scoring: each in turn is made the likeliest."""
    try:
        found = []
        unconditional = "acc_mutual_info" in getattr(
            task, "_metric_fn_list", {}
        )  # asks each choice again, alone
        for k in range(len(instances) // (2 if unconditional else 1)):
            results = [(0.0 if k == at else -1.0, False) for at in range(len(instances))]
            found.append(bool(task.process_results(instances[0].doc, results)["acc"]))
        return found
    except (KeyError, ValueError, AssertionError, IndexError, TypeError):
        raise EvaluationError(
            f"{name}: lm-eval does not score it by accuracy (acc); choose another task, or --against loss"
        ) from None
