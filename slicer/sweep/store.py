"""Stores the finished cells of a sweep on disk, so that a stopped sweep can resume and several processes can share it.

A cell's result is one JSON file, written atomically. A process holds a lock while it works on a cell; the system
releases the lock when the process ends, also after a crash.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slicer.runtime.files import remove_empty, write_atomically
from slicer.runtime.workdir import Workdir, lock, sign_of

FORMAT = 1
_WHAT = "a sweep"
_FOLDS = "folds"


def began_with(directory: Path) -> Mapping[str, Any]:
    """The settings of the sweep in `directory`; none where there is no such sweep. Raises OutputError."""
    sign = sign_of(directory)
    return sign["identity"] if sign is not None and sign["what"] == _WHAT else {}


class Store:
    """A sweep directory: `sweep.json` (settings), `cells/` (results), `text/` (calibration tokens), `folds/` (finished
    stages of unfinished cells), locks.

    All cells share `settings`. Raises OutputError if the directory holds a sweep with other settings that has finished
    cells or is open in another process.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory, self._cells = directory, directory / "cells"
        self._work = Workdir(
            directory, settings, _WHAT, shared=True, resumable=lambda: any(self._cells.glob("*.json")),
            removed=("text", _FOLDS),
        )  # fmt: skip
        self._work.claim()
        self._cells.mkdir(exist_ok=True)
        for place in (directory / _FOLDS).glob("*"):
            if self.get(place.name) is not None:  # a process was stopped between the two steps of `put`
                self._forget(place.name)
        record = {"format": FORMAT, "settings": settings}
        write_atomically(directory / "sweep.json", json.dumps(record, indent=1) + "\n")

    def close(self) -> None:
        """Release the directory, so that a sweep with other settings may use it."""
        self._work.close()

    def get(self, name: str) -> dict[str, Any] | None:
        """The finished record `name`, or None."""
        try:
            found = json.loads((self._cells / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Store a finished record, and remove the stages of its fold."""
        write_atomically(self._cells / f"{name}.json", json.dumps(record) + "\n")
        self._forget(name)

    def stages(self, name: str) -> Path:
        """The directory for the finished stages of the fold of `name`, while it is unfinished."""
        return self.directory / _FOLDS / name

    def _forget(self, name: str) -> None:
        if (place := self.stages(name)).is_dir():
            shutil.rmtree(place, ignore_errors=True)
            remove_empty([place.parent])

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process alone may work on `name` inside the block."""
        held = lock(self._cells / f".{name}.lock")
        try:
            yield held is not None
        finally:
            if held is not None:
                held.close()
