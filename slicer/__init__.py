"""slicer: make a large language model shallower and leave it a standard checkpoint.

    from slicer import Goal, convert, parse_amount

Public names are loaded when they are first used, so that importing slicer costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.blockwise import MODEL_TYPE as _MODEL_TYPE
from slicer.runtime.compat import register as _register

if TYPE_CHECKING:
    from slicer.checkpoint.export import export as export
    from slicer.checkpoint.reader import Checkpoint as Checkpoint
    from slicer.data.sources import TextSpec as TextSpec
    from slicer.errors import SlicerError as SlicerError
    from slicer.heal.finetune.settings import Training as Training
    from slicer.jobs.convert import convert as convert
    from slicer.jobs.options import Options as Options
    from slicer.measure.analysis import Analysis as Analysis
    from slicer.model.walk import Walk as Walk
    from slicer.plan.amounts import Goal as Goal
    from slicer.plan.amounts import parse_amount as parse_amount
    from slicer.plan.blocks import select as select
    from slicer.plan.plan import Plan as Plan
    from slicer.runtime.versions import __version__ as __version__

_HOMES = {
    "__version__": "slicer.runtime.versions",
    "Checkpoint": "slicer.checkpoint.reader",
    "export": "slicer.checkpoint.export",
    "convert": "slicer.jobs.convert",
    "Goal": "slicer.plan.amounts",
    "Options": "slicer.jobs.options",
    "Training": "slicer.heal.finetune.settings",
    "SlicerError": "slicer.errors",
    "Analysis": "slicer.measure.analysis",
    "Walk": "slicer.model.walk",
    "TextSpec": "slicer.data.sources",
    "Plan": "slicer.plan.plan",
    "parse_amount": "slicer.plan.amounts",
    "select": "slicer.plan.blocks",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slicer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# With transformers, whenever that is imported: before slicer or after.
_register(_MODEL_TYPE, "BlockwiseConfig", "slicer.model.blockwise")
