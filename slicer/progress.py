"""Progress callbacks for long-running operations; the default does nothing."""

from __future__ import annotations


class Progress:
    """Does nothing. Subclass it to show stages and their progress."""

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """A new stage starts: `total` units of `unit` ("bytes", "batches"), or None if not counted."""

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current stage are finished."""

    def detail(self, text: str) -> None:
        """Details of the current stage, such as its rates."""

    def close(self) -> None:
        """Stop showing progress, before other output."""

    def note(self, text: str) -> None:
        """A message that the user may want to act on."""


SILENT = Progress()
