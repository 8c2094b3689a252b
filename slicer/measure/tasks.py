"""Prompts and correct answers of an lm-eval task as calibration text. Needs the `eval` extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slicer.errors import CalibrationError


def prompts(name: str) -> Iterator[str]:
    """Each document of the task as text: prompt, then answer. `name`: an lm-eval task, or DIRECTORY/TASK for own YAML
    files. Uses training documents if the task has them, so the scored ones stay unseen.

    Raises CalibrationError if lm-eval, the task or its data is missing.
    """
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise CalibrationError(
            f"task:{name}: lm-eval is not installed; pip install slicer-llm[eval]"
        ) from None
    datasets.disable_progress_bars()
    directory, _, short = name.rpartition("/")
    if directory and not Path(directory).is_dir():
        raise CalibrationError(f"task:{name}: no directory {directory}; use task:TASK or task:DIRECTORY/TASK")
    try:
        found = TaskManager(include_path=directory or None).load(short)
        for task in found["tasks"].values():  # all tasks of a group
            for doc in _documents(task):
                yield _text(task, doc)
    except Exception as error:  # lm-eval, datasets and the task's own code raise many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CalibrationError(
            f"task:{name}: cannot load its prompts ({reason}); `lm-eval ls tasks` lists the names"
        ) from None


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
