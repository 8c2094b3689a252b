"""The embedded model."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The directory of the embedded checkpoint."""
    return Path(__file__).parent / "checkpoint"
