"""Estimates the remaining time of a sweep from the cells already finished."""

from __future__ import annotations

from collections.abc import Sequence

from slicer.judge.grid import Cell
from slicer.judge.journal import Journal
from slicer.runtime.distributed import world


class Clock:
    """Remaining time, from the seconds per layer of finished cells with the same healing method."""

    def __init__(self, journal: Journal, cells: Sequence[Cell], depth: int) -> None:
        self._journal, self._cells, self._depth = journal, cells, depth

    def left(self) -> str:
        rates: dict[str, list[float]] = {}
        todo = []
        for cell in self._cells:
            record = self._journal.get(cell.name)
            if record is None:
                todo.append(cell)
            elif record.get("seconds"):
                rates.setdefault(cell.heal, []).append(record["seconds"] / (self._depth - cell.n))
        done = len(self._cells) - len(todo)
        known = [rate for each in rates.values() for rate in each]
        if not known:
            return f"{done} of {len(self._cells)} cells done"
        slowest = max(known)
        seconds = (
            sum(
                (sum(rates[c.heal]) / len(rates[c.heal]) if c.heal in rates else slowest)
                * (self._depth - c.n)
                for c in todo
            )
            / world()
        )
        minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f"{done} of {len(self._cells)} cells done, about {minutes} left"
