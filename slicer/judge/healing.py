"""Healing as a sweep uses it: which ways there are here, and the closed form on a model that is loaded already."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from slicer.errors import EvaluationError


def require(heals: Iterable[str]) -> None:
    """Raise EvaluationError for a way of healing that this installation does not have."""
    modules = {"fold": "slicer.heal.healing", "qlora": "slicer.heal.train"}
    for heal in heals:
        module = modules.get(heal.split("@")[0])
        if module is not None and (find_spec("slicer.heal") is None or find_spec(module) is None):
            raise EvaluationError(f"--heal {heal}: not available in this version of slicer; use --heal none")
