"""Finds lm-eval tasks by name, on local data if given, and divides a limit among the tasks of a group."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError
from slicer.judge import local_tasks
from slicer.runtime.compat import lm_eval_module

LOSS = "c4"
# Paths of the paper's tasks in lm-eval: reading all of its 14,000 tasks takes ten seconds.
_QUICK = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq"}


def manager(tasks: Sequence[str], data: Path | None, directory: Path) -> tuple[Any, list[Path]]:
    """(lm-eval's task manager for `tasks`, the local files it uses). With `data`, the tasks read its files through YAML
    files written to `directory`.

    Raises EvaluationError: an unknown task (with similar names), files missing, empty or malformed.
    """
    lm_tasks = lm_eval_module("tasks")
    root = Path(lm_tasks.__file__).parent
    families = {task.split("_")[0] for task in tasks}
    where: dict[str, Any] = {"include_path": []}
    found = None
    if families <= _QUICK.keys():
        where = {"include_defaults": False, "include_path": [root / _QUICK[f] for f in sorted(families)]}
        found = lm_tasks.TaskManager(**where)
    if found is None or any(task not in found.task_index for task in tasks):
        where = {"include_path": []}
        found = lm_tasks.TaskManager()
    for task in tasks:
        if task not in found.task_index:
            raise EvaluationError(_unknown(task, found.all_tasks))
    if data is None:
        return found, []
    index = found.task_index
    files: list[Path] = []
    for leaf in sorted({leaf for task in tasks for leaf in leaves(task, index)}):
        files += local_tasks.write_task(data, leaf, index[leaf].cfg or {}, index[leaf].yaml_path, directory)
    return lm_tasks.TaskManager(**{**where, "include_path": [*where["include_path"], directory]}), files


@dataclass(frozen=True)
class Asked:
    """A task as given: `mmlu`, `mmlu@5` (with 5 examples) or `mmlu@5:1` (the same in another order)."""

    label: str
    name: str
    shots: int | None = None
    order: int = 0


def parse(task: str, default: int | None) -> Asked:
    """Parse a task's name, number of examples and their order. Raises EvaluationError."""
    match = re.fullmatch(r"([^@]+)(?:@(\d+)(?::(\d+))?)?", task.strip())
    if match is None:
        raise EvaluationError(f"--tasks {task}: write the number of examples after the @, as in mmlu@5")
    shots = default if match[2] is None else int(match[2])
    return Asked(task.strip(), match[1].strip(), shots, int(match[3] or 0))


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


def _unknown(task: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(task, [LOSS, *known], n=5, cutoff=0.6)
    hint = f"; similar: {', '.join(near)}" if near else "; `lm_eval ls tasks` lists all tasks"
    return f"task {task}: no such task{hint}"
