"""slicer: make a large language model shallower and leave it a standard checkpoint.

    from slicer import ConvertRequest, Goal, convert, parse_amount

    convert(ConvertRequest("org/model", Goal(drop=parse_amount("0.25"))))

Public names are loaded when they are first used, so that importing slicer costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.blockwise import MODEL_TYPE as _MODEL_TYPE
from slicer.runtime.compat import register as _register

if TYPE_CHECKING:
    from slicer.checkpoint.reader import Checkpoint as Checkpoint
    from slicer.data.sources import TextSpec as TextSpec
    from slicer.errors import SlicerError as SlicerError
    from slicer.heal.finetune.settings import Training as Training
    from slicer.jobs.analyze import analyze as analyze
    from slicer.jobs.convert import convert as convert
    from slicer.jobs.heal import heal as heal
    from slicer.jobs.merge import merge as merge
    from slicer.jobs.output import Written as Written
    from slicer.jobs.request import AnalyzeRequest as AnalyzeRequest
    from slicer.jobs.request import Compensation as Compensation
    from slicer.jobs.request import ConvertRequest as ConvertRequest
    from slicer.jobs.request import HealRequest as HealRequest
    from slicer.jobs.request import Measures as Measures
    from slicer.jobs.request import MergeRequest as MergeRequest
    from slicer.jobs.request import Output as Output
    from slicer.jobs.request import Selection as Selection
    from slicer.jobs.request import Text as Text
    from slicer.measure.analysis import Analysis as Analysis
    from slicer.model.walk import Walk as Walk
    from slicer.plan.amounts import Goal as Goal
    from slicer.plan.amounts import parse_amount as parse_amount
    from slicer.plan.choose import choose as choose
    from slicer.plan.plan import Plan as Plan
    from slicer.progress import Progress as Progress
    from slicer.runtime.compute import Compute as Compute
    from slicer.runtime.versions import __version__ as __version__

_NAMES = {
    "slicer.checkpoint.reader": ("Checkpoint",),
    "slicer.data.sources": ("TextSpec",),
    "slicer.errors": ("SlicerError",),
    "slicer.heal.finetune.settings": ("Training",),
    "slicer.jobs.analyze": ("analyze",),
    "slicer.jobs.convert": ("convert",),
    "slicer.jobs.heal": ("heal",),
    "slicer.jobs.merge": ("merge",),
    "slicer.jobs.output": ("Written",),
    "slicer.jobs.request": (
        *("AnalyzeRequest", "Compensation", "ConvertRequest", "HealRequest", "Measures", "MergeRequest", "Output"),
        *("Selection", "Text"),
    ),
    "slicer.measure.analysis": ("Analysis",),
    "slicer.model.walk": ("Walk",),
    "slicer.plan.amounts": ("Goal", "parse_amount"),
    "slicer.plan.choose": ("choose",),
    "slicer.plan.plan": ("Plan",),
    "slicer.progress": ("Progress",),
    "slicer.runtime.compute": ("Compute",),
    "slicer.runtime.versions": ("__version__",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slicer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, where `slicer.heal` is the function and not the folder, which Python binds when it is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
# With transformers, whenever that is imported: before slicer or after.
_register(_MODEL_TYPE, "BlockwiseConfig", "slicer.model.blockwise")
