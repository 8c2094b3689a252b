"""Which ways of healing a sweep has: asked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable

from slicer.errors import EvaluationError

AVAILABLE = ("none", "fold")


def require(heals: Iterable[str]) -> None:
    """Raise EvaluationError for a way of healing that a sweep cannot do."""
    for heal in heals:
        if heal not in AVAILABLE:
            raise EvaluationError(
                f"--heal {heal}: a sweep cannot train yet; use --heal {','.join(AVAILABLE)}, or heal a checkpoint and "
                "put it to slicer eval"
            )
