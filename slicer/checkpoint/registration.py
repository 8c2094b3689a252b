"""Make the blockwise form known to transformers, whenever that is imported: before slicer or after.

transformers finds a configuration class by the `model_type` of config.json in a table of names, and imports
`transformers.models.<model_type>` when such a checkpoint is loaded. `import slicer` must not cost the seconds that
importing transformers takes, nor import any of it out of turn. So a finder in `sys.meta_path` adds the one name when
the table's module is executed, and answers for the one module when it is asked for; only then are the classes imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MODEL_TYPE = "slicer_blockwise"
_TABLE = "transformers.models.auto.configuration_auto"
_MODULE = f"transformers.models.{MODEL_TYPE}"


def register() -> None:
    """Make the blockwise form known, now or as soon as transformers is imported. Call as often as you like."""
    if _TABLE in sys.modules:
        _enter(sys.modules[_TABLE])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(table: ModuleType) -> None:
    table.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "BlockwiseConfig"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _MODULE:
            return importlib.machinery.ModuleSpec(fullname, _Classes())
        if fullname != _TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _TableLoader(spec.loader.name, spec.loader.path)
        return spec


class _TableLoader(importlib.machinery.SourceFileLoader):
    """Executes transformers' table as ever, then enters the one name."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _enter(module)


class _Classes(importlib.abc.Loader):
    """The module that transformers looks for the classes in."""

    def exec_module(self, module: ModuleType) -> None:
        from slicer.checkpoint import blockwise_model

        for name in ("BlockwiseConfig", "DeciLMModel", "DeciLMForCausalLM"):
            setattr(module, name, getattr(blockwise_model, name))
