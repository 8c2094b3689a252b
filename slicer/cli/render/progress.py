"""The two consoles: progress bars and notes on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich import progress as ui
from rich.console import Console
from rich.table import Table

from slicer.progress import Progress
from slicer.runtime.distributed import first_process

STDERR = Console(stderr=True, highlight=False, markup=False)
_QUIET_SECONDS = 20  # between progress lines if stderr is a file


class _Bars(Progress):
    """One line per stage; counted stages have a bar with rate and remaining time."""

    def __init__(self) -> None:
        self._bars: ui.Progress | None = None
        self._text, self._total, self._done = "", None, 0  # type: str, int | None, int
        self._printed = time.monotonic()

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        self.close()
        self._text, self._total, self._done, self._printed = text, total, 0, time.monotonic()
        if not STDERR.is_terminal:
            return
        name, bar, left = ui.TextColumn("{task.description}"), ui.BarColumn(), ui.TimeRemainingColumn()
        columns: list[ui.ProgressColumn] = [name, bar, ui.DownloadColumn(), ui.TransferSpeedColumn(), left]
        if total is None:
            columns = [ui.SpinnerColumn(), name, ui.TimeElapsedColumn()]
        elif unit != "bytes":
            detail = ui.TextColumn("{task.fields[detail]}")
            columns = [name, bar, ui.MofNCompleteColumn(), ui.TextColumn(unit), detail, left]
        self._bars = ui.Progress(*columns, console=STDERR, transient=True)
        self._bars.start()
        self._bars.add_task(text, total=total, detail="")

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], amount)

    def detail(self, text: str) -> None:
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], detail=text)
        elif not STDERR.is_terminal and time.monotonic() - self._printed > _QUIET_SECONDS:
            self._printed = time.monotonic()
            STDERR.print(f"{self._text}: {self._done} of {self._total}, {text}")

    def note(self, text: str) -> None:
        STDERR.print(f"note: {text}", soft_wrap=True)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """A progress display on stderr; turns off the output of transformers and datasets."""
    if not first_process():  # in a distributed run, only rank 0 shows progress
        yield Progress()
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown = _Bars()
    try:
        yield shown
    finally:
        shown.close()


def stdout() -> Console:
    """The console that results are printed on; 200 columns wide if piped, so that no table cell is cut."""
    return Console(highlight=False, soft_wrap=True, markup=False, width=None if os.isatty(1) else 200)


def table(title: str, *columns: str, texts: int = 1) -> Table:
    """A table whose first columns, as many as `texts`, hold text, and the others numbers."""
    made = Table(title=title, title_justify="left")
    for at, name in enumerate(columns):
        made.add_column(name, justify="left" if at < texts else "right")
    return made
