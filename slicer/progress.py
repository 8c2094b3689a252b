"""How long work tells of itself; the command line draws it, Python users may ignore it."""

from __future__ import annotations


class Progress:
    """A silent listener. Subclass it to show stages and their advance."""

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """A new stage begins: `total` units of `unit` ("bytes", "batches"), or None when not counted."""

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current stage are done."""

    def detail(self, text: str) -> None:
        """How the current stage fares: its rates, in a few words."""

    def note(self, text: str) -> None:
        """Something the user should know and may act on."""
