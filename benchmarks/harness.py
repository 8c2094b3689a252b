"""Runs every model once per round, in a new order each round, and stores every finished run on disk at once.

Drift of the machine (heat, other processes) then slows all models equally, instead of the last ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slicer.progress import Progress
from slicer.runtime.files import write_atomically
from slicer.runtime.workdir import Workdir

RUNS = "runs.jsonl"
Run = dict[str, Any]
# (label, round, status) -> results of one run in a fresh process
Measure = Callable[[str, int, Callable[[str], None]], Run]


class Store:
    """The finished runs of one benchmark, in `directory/runs.jsonl`, or in memory if there is no directory.

    A context manager, which holds the directory. A line that a killed process left half-written is dropped.
    """

    def __init__(self, directory: Path | None, identity: Mapping[str, Any], *, force: bool = False) -> None:
        """`force` discards the runs that are there. Raises OutputError if `directory` holds something else, or the
        runs of another benchmark."""
        self.runs: list[Run] = []
        self._file = file = None if directory is None else directory / RUNS
        self._work: Workdir | None = None
        if directory is not None and file is not None:
            self._work = Workdir(
                directory,
                identity,
                "the runs of a benchmark",
                overwrite=force,
                resumable=lambda: file.exists() and file.stat().st_size > 0,
                removed=(RUNS,),
            )
            self._work.claim()
            if file.exists() and not force:
                with contextlib.suppress(ValueError):  # the last line may be half-written
                    for text in file.read_text("utf-8", "replace").splitlines():
                        self.runs.append(json.loads(text))
            write_atomically(file, "".join(json.dumps(run) + "\n" for run in self.runs))
        self.resumed = len(self.runs)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._work is not None:
            self._work.close()

    def has(self, label: str, number: int) -> bool:
        """Whether this run is finished."""
        return any(run["label"] == label and run["round"] == number for run in self.runs)

    def add(self, run: Run) -> None:
        """Store a finished run on disk."""
        self.runs.append(run)
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(run) + "\n")
                stream.flush()
                os.fsync(stream.fileno())


def run_rounds(
    labels: Sequence[str], rounds: int, seed: int, measure: Measure, store: Store, progress: Progress
) -> list[Run]:
    """Measure the runs missing in `store`; returns all runs of these labels and rounds, in order of time."""
    wanted = [
        (label, number)
        for number in range(1, rounds + 1)
        for label in random.Random(f"{seed} {number}").sample(labels, len(labels))
    ]
    missing = [pair for pair in wanted if not store.has(*pair)]
    before = len(wanted) - len(missing)
    if store.resumed:
        progress.note(f"{before} of {len(wanted)} runs are finished already")
    for at, (label, number) in enumerate(missing):
        status = partial(_show, progress, f"Round {number} of {rounds}, {label}", len(wanted), before + at)
        status("starting")
        try:
            figures = measure(label, number, status)
        except BaseException:
            progress.stage("Stopping")
            raise
        store.add({"label": label, "round": number, **figures})
        note = f"round {number} of {rounds}: {label}"
        if online := figures.get("online"):
            token = statistics.median(next(iter(online.values()))["tpot_ms"])
            note += f", {token:.4g} ms per token, ready after {figures['load_seconds']:.0f} s"
        progress.note(note)
    progress.stage("Summing up")
    return [run for run in store.runs if (run["label"], run["round"]) in set(wanted)]


def _show(progress: Progress, head: str, total: int, done: int, what: str) -> None:
    """Show the stage of the current run, and the finished share of all runs."""
    progress.stage(f"{head}: {what[:1].lower()}{what[1:]}", total, "runs")
    progress.advance(done)
