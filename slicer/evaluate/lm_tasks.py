"""lm-eval's tasks by name, on the Hub's data or on local files; and multiple-choice questions drawn from them."""

from __future__ import annotations

import difflib
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from slicer.errors import EvaluationError, reason_of
from slicer.evaluate import backends, local_tasks, scoring
from slicer.evaluate.results import Score
from slicer.measure.losses import Choice, Questions
from slicer.runtime.compat import lm_eval_module

LOSS = "c4"  # the name of the loss on text among the tasks
_LMEVAL_SEED = 1234


def draw(
    task: str, count: int, model: Any, path: Path, *, data: Path | None = None, seed: int = 0,
    trust_remote_code: bool = False,
) -> Questions:  # fmt: skip
    """Draw `count` questions of a multiple-choice task with the seed (all, if it has fewer; from a group, in proportion
    to the sizes of its tasks).

    `task` may give its number of examples, as in `mmlu@5`. `model` and the tokenizer of the checkpoint at `path` define
    the tokenization. `data`: directory of local files (`slicer.evaluate.local_tasks`), None for the Hub. Questions come
    from the split that the task is scored on. Raises EvaluationError: unknown task, data missing, not multiple choice.
    """
    if data is not None and not data.is_dir():
        raise EvaluationError(f"--data {data}: no such directory")
    asked = parse(task, None)
    if asked.name == LOSS:
        raise EvaluationError(f"{task} is text, not a task; use --against loss")
    with tempfile.TemporaryDirectory(prefix="slicer-questions-") as scratch:
        tasks, _ = manager([asked.name], data, Path(scratch))
        found = LmTask(tasks, asked, seed=seed, local=data is not None)
        lm = backends.wrap(model, path, "1", trust_remote_code=trust_remote_code)
        found.reseed()
        loaded = {leaf: found.loaded["tasks"][leaf] for leaf in found.leaves}
        sizes = {leaf: len(each.eval_docs) for leaf, each in loaded.items()}
        made = _QuestionBuilder(lm)
        for leaf, chosen in _drawn(sizes, count, seed).items():
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
                f"{name}: not multiple choice ({task.OUTPUT_TYPE}); choose a multiple-choice task, or --against loss"
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
    # for acc_mutual_info each choice is requested a second time, without the question
    requested_twice = "acc_mutual_info" in getattr(task, "_metric_fn_list", {})
    count = len(instances)
    try:
        return [
            bool(task.process_results(instances[0].doc, [(-float(at != k), False) for at in range(count)])["acc"])
            for k in range(count // 2 if requested_twice else count)
        ]
    except (KeyError, ValueError, AssertionError, IndexError, TypeError):
        raise EvaluationError(
            f"{name}: lm-eval does not score it by accuracy (acc); choose another task, or --against loss"
        ) from None


# Paths of the paper's tasks in lm-eval: reading all of its 14,000 tasks takes ten seconds.
_QUICK = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq"}


def manager(tasks: Sequence[str], data: Path | None, directory: Path) -> tuple[Any, list[Path]]:
    """(lm-eval's task manager for `tasks`, the local files it uses). With `data`, the tasks read its files through YAML
    files written to `directory`.

    Raises EvaluationError: an unknown task (with similar names), files missing, empty or malformed.
    """
    lm_tasks = lm_eval_module("tasks")
    root = Path(lm_tasks.__file__).parent
    quick = [root / _QUICK[family] for family in sorted({task.split("_")[0] for task in tasks} & _QUICK.keys())]
    found = lm_tasks.TaskManager(include_defaults=False, include_path=quick)
    if any(task not in found.task_index for task in tasks):
        found = lm_tasks.TaskManager()
    index = found.task_index
    for task in tasks:
        if task not in index:
            near = difflib.get_close_matches(task, [LOSS, *found.all_tasks], n=5, cutoff=0.6)
            hint = f"similar: {', '.join(near)}" if near else "`lm_eval ls tasks` lists all tasks"
            raise EvaluationError(f"task {task}: no such task; {hint}")
    if data is None:
        return found, []
    files: list[Path] = []
    for leaf in sorted({leaf for task in tasks for leaf in leaves(task, index)}):
        files += local_tasks.write_task(data, leaf, index[leaf].cfg or {}, index[leaf].yaml_path, directory)
    # The local tasks replace those of the same name; lm-eval's own files are not read again.
    index.update(lm_tasks.TaskManager(include_defaults=False, include_path=directory).task_index)
    return found, files


@dataclass(frozen=True)
class TaskSpec:
    """A task as given: `mmlu`, `mmlu@5` (with 5 examples) or `mmlu@5:1` (the same in another order)."""

    label: str
    name: str
    shots: int | None = None
    order: int = 0


def parse(task: str, default: int | None) -> TaskSpec:
    """Parse a task's name, number of examples and their order. Raises EvaluationError."""
    match = re.fullmatch(r"([^@]+)(?:@(\d+)(?::(\d+))?)?", task.strip())
    if match is None:
        raise EvaluationError(f"--tasks {task}: write the number of examples after the @, as in mmlu@5")
    shots = default if match[2] is None else int(match[2])
    return TaskSpec(task.strip(), match[1].strip(), shots, int(match[3] or 0))


def share(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` in proportion to `sizes` (largest remainders), at least 1 and at most its size for each."""
    everything = sum(sizes.values())
    total = min(max(total, len(sizes)), everything)
    exact = {name: total * size / everything for name, size in sizes.items()}
    parts = {name: max(1, int(part)) for name, part in exact.items()}
    while sum(parts.values()) < total:
        name = max((n for n in parts if parts[n] < sizes[n]), key=lambda n: exact[n] - parts[n])
        parts[name] += 1
    while sum(parts.values()) > total:
        name = max((n for n in parts if parts[n] > 1), key=lambda n: parts[n] - exact[n])
        parts[name] -= 1
    return parts


def _drawn(sizes: Mapping[str, int], count: int, seed: int) -> dict[str, list[int]]:
    """The document numbers of `count` items, drawn with the seed from tasks of these `sizes`, in proportion."""
    return {
        leaf: sorted(random.Random(f"{seed} {leaf}").sample(range(sizes[leaf]), n))
        for leaf, n in share(sizes, count).items()
    }


def leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks that a name (task, group or tag) of lm-eval's index expands to. Raises EvaluationError."""
    entry = index.get(name)
    if entry is None:
        raise EvaluationError(f"{name}: not in lm-eval's task index")
    kind = entry.kind.name
    if kind == "TAG":
        return sorted(entry.tags)
    if kind != "GROUP":
        return [name]
    members = (entry.cfg or {}).get("task") or []
    names = [m if isinstance(m, str) else m.get("group") or m.get("task") for m in members]
    return [leaf for member in names for leaf in leaves(str(member), index)]


class LmTask:
    """One task, group or tag with one number of examples; `label` is its name in the results."""

    def __init__(
        self, manager: Any, asked: TaskSpec, *, seed: int, local: bool, limit: int | None = None, shared: bool = False
    ) -> None:
        name, shots = asked.name, asked.shots
        self.name, self.label, self.seed = name, asked.label, seed
        try:
            self.loaded = manager.load([name])
        except Exception as error:  # data sets, the Hub and task programs raise many kinds
            remedy = "check its files" if local else "if offline, pass local files with --data DIR"
            raise EvaluationError(f"{name}: cannot load its data ({reason_of(error)}); {remedy}") from None
        group = self.loaded.get("groups", {}).get(name)
        self.leaves = [t.task_name for t in group.get_all_tasks()] if group else list(self.loaded["tasks"])
        # A tag, and a group without an aggregate metric, has only the scores of its tasks.
        self.adds_up = bool(group.aggregate_metric_list) if group else self.leaves == [name]
        for task in self.loaded["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if shots is not None and fixed != 0:
                task.set_config(key="num_fewshot", value=shots)
            elif fixed is None:
                task.set_config(key="num_fewshot", value=0)
            if asked.order:
                _reorder(task, asked.order)
        self.samples = self._shared(limit) if shared and limit else None
        self.limit = None if self.samples else limit

    def _shared(self, limit: int) -> dict[str, list[int]]:
        """Document numbers of each leaf task, `limit` in total."""
        sizes = {leaf: len(self.loaded["tasks"][leaf].eval_docs) for leaf in self.leaves}
        if len(sizes) == 1:
            return {leaf: list(range(min(limit, size))) for leaf, size in sizes.items()}
        return _drawn(sizes, limit, self.seed)

    def reseed(self) -> None:
        """Reset the few-shot samplers before requests are built, so each run uses the same examples."""
        seed = _LMEVAL_SEED + self.seed
        random.seed(self.seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=seed)

    def run(self, lm: Any, scores: list[Score], items: dict[str, dict[str, float]]) -> None:
        """Ask `lm`, and add to `scores` and `items`."""
        evaluator = lm_eval_module("evaluator")
        self.reseed()
        try:
            found = evaluator.evaluate(lm, self.loaded, limit=self.limit, samples=self.samples, log_samples=True)
        except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
            raise EvaluationError(f"{self.label}: lm-eval cannot run it ({reason_of(error)})") from error
        for score in scoring.scores(self.name, self.label, self.leaves, self.loaded["tasks"], found):
            leaf = score.task.removesuffix(self.label.removeprefix(self.name))
            inside = self.leaves if leaf == self.name else [leaf]
            pairs = scoring.items(score.metric, inside, found["samples"])
            scores.append(scoring.with_error(score, pairs.values()))
            if pairs:
                items[f"{score.task}/{score.metric}"] = pairs


def _reorder(task: Any, order: int) -> None:
    """Shuffle the examples before each question, in the same way for all questions (figure 7 of the paper)."""
    sample = task.sampler.sample

    def shuffled(*args: Any, **kwargs: Any) -> list[Any]:
        chosen = list(sample(*args, **kwargs))
        random.Random(order).shuffle(chosen)
        return chosen

    task.sampler.sample = shuffled
