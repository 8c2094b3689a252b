"""The prompts of an lm-eval task with their right answers, as calibration text. Needs the `eval` extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slicer.errors import CalibrationError


def prompts(name: str) -> Iterator[str]:
    """Each document of the task as text: prompt, then answer. `name` is a task of lm-eval's, or DIRECTORY/TASK of one's
    own YAML files. Training documents where the task has them, so that what it is scored on stays unseen.

    Raises CalibrationError when lm-eval, the task or its data is not there.
    """
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise CalibrationError(
            f"task:{name}: lm-eval is not installed; pip install slicer-llm[eval]"
        ) from None
    directory, _, short = name.rpartition("/")
    if directory and not Path(directory).is_dir():
        raise CalibrationError(
            f"task:{name}: no directory {directory}; give task:TASK or task:DIRECTORY/TASK"
        )
    try:
        found = get_task_dict([short], TaskManager(include_path=directory or None))
        tasks = list(_leaves(found))
        if not tasks:
            raise KeyError(short)
        for task in tasks:
            for doc in _documents(task):
                yield _text(task, doc)
    except Exception as error:  # lm-eval, datasets and the task's own code raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CalibrationError(
            f"task:{name}: lm-eval cannot give its prompts ({reason}); see lm-eval ls tasks for names"
        ) from None


def _leaves(found: Any) -> Iterator[Any]:
    """The tasks of a group, or the task itself."""
    for value in found.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def _documents(task: Any) -> Any:
    if task.has_training_docs():
        return task.training_docs()
    return task.validation_docs() if task.has_validation_docs() else task.test_docs()


def _text(task: Any, doc: Any) -> str:
    answer = task.doc_to_target(doc)
    if isinstance(answer, int) and task.config.doc_to_choice is not None:
        answer = task.doc_to_choice(doc)[answer]
    answer = answer[0] if isinstance(answer, list) else answer
    return f"{task.doc_to_text(doc)}{task.config.target_delimiter}{answer}"
