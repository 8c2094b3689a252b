"""Builds transformers models: a checkpoint with its weights, or the structure alone on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.reader import Checkpoint, read_config
from slicer.checkpoint.tensors import TensorSpan, torch_dtype
from slicer.errors import SourceError
from slicer.runtime import memory
from slicer.runtime.compute import Compute

T = TypeVar("T")
Model = Any  # a transformers PreTrainedModel, which has no type hints


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_memory: int | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
    sharded: bool = False,
) -> Model:
    """Load `path` for inference: eval mode, no gradients.

    `dtype` is "auto" (as stored) or a torch name; `device` as in `Compute`: with "auto" the model is spread over
    several GPUs if one (its `device_memory`, bytes; None: a share of its total) is too small, accelerate is installed
    and there is no other process. `quantization` is
    transformers' config of one, applied while loading. A model that is to be `sharded` over processes stays on
    the CPU, or quantized on the GPU of its process. Raises SourceError with the reason.
    """
    target = Compute(device).torch_device()
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "local_files_only": True}
    alone = device == "auto" and target == torch.device("cuda")  # not one of several processes
    spread = alone and not sharded and _needs_several(path, dtype, target, device_memory)
    if spread:
        arguments["device_map"] = "auto"
    if quantization is not None:
        arguments.setdefault("device_map", {"": target})  # also if sharded: the GPU of this process
        arguments["quantization_config"] = quantization
    failing = f"{path}: transformers cannot load it"
    model = _first_working(path, lambda auto: auto.from_pretrained(str(path), **arguments), failing)
    model.requires_grad_(False)
    return model.eval() if spread or sharded or quantization is not None else model.eval().to(target)


def auto_classes(path: Path) -> list[Any]:
    """The transformers auto classes to try for the checkpoint, in order; multimodal wrapper classes first."""
    import transformers

    config = read_config(path)
    wrapped = architectures.text_config(config) is not config
    return [transformers.AutoModelForImageTextToText] * wrapped + [transformers.AutoModelForCausalLM]


def _first_working(path: Path, build: Callable[[Any], T], failing: str) -> T:
    """`build(auto)` for the first of the checkpoint's auto classes with which it works.

    Raises SourceError, the reason of the first failure after `failing`.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failure: Exception | None = None
    for auto in auto_classes(path):
        try:
            return build(auto)
        except Exception as error:  # transformers raises many kinds; the next class may fit
            if memory.is_out_of_memory(error):
                raise
            failure = failure or error
    raise SourceError(f"{failing}: {' '.join(str(failure).split())[:300]}")


def _config(path: Path, trust_remote_code: bool) -> Any:
    """transformers' config object of the checkpoint."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)


def meta_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Raw key -> meta tensor with the stored shape and dtype, for all tensors."""
    return {
        key: torch.empty(span.shape, dtype=torch_dtype(span.dtype), device="meta")
        for key, span in checkpoint.tensors.items()
    }


def build_on_meta(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    config: Any = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """(model of `path` on the meta device, transformers' report of how `tensors` (by raw key) match it).

    The report has `missing_keys`, `unexpected_keys` and `mismatched_keys`. Reads no weights. Raises SourceError if no
    class can be built.
    """

    def build(auto: Any) -> tuple[Model, dict[str, Any]]:
        own = _config(path, trust_remote_code) if config is None else config
        model, info = _model_class(auto, path, own, trust_remote_code).from_pretrained(
            None,
            config=own,
            state_dict=dict(tensors),
            dtype=dtype,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        return model, dict(info)

    return _first_working(path, build, "transformers cannot build the model")


def _model_class(auto: Any, path: Path, config: Any, trust_remote_code: bool) -> Any:
    """The class that `auto` would load: the checkpoint's own code if trusted, else transformers'."""
    remote = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, str(path), local_files_only=True)
    return auto._model_mapping[type(config)]


def blueprint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that a config.json describes: every tensor's name, shape and dtype, without weights.

    Builds the model on the meta device. Raises SourceError with transformers' reason.
    """
    config = read_config(path)

    def build(auto: Any) -> tuple[Any, Model]:
        described = _config(path, trust_remote_code)
        with torch.device("meta"):
            return described, auto.from_config(described, trust_remote_code=trust_remote_code)

    described, model = _first_working(path, build, f"{path}/config.json: transformers cannot build it")
    stored = str(architectures.text_config(config).get("dtype") or described.dtype or "bfloat16")
    name = {"float32": "F32", "float16": "F16"}.get(stored.removeprefix("torch."), "BF16")
    size = 4 if name == "F32" else 2
    tensors = {  # a tied head is listed once, as stored
        key: TensorSpan(path / "config.json", name, tuple(value.shape), 0, size * value.numel())
        for key, value in model.named_parameters()
    }
    return Checkpoint(path, config, tensors, {"format": "pt"})


def _needs_several(path: Path, dtype: str, target: torch.device, device_memory: int | None) -> bool:
    from importlib.util import find_spec

    budget = memory.budget(Compute(device_memory=device_memory), target)
    return Checkpoint.open(path).bytes_as(dtype) * 1.1 > budget and find_spec("accelerate") is not None


@contextlib.contextmanager
def in_float32(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside the block, 16-bit `parameters` hold float32 copies; afterwards their own tensors again."""
    halves = [(p, p.data) for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        for parameter, data in halves:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in halves:
            parameter.data = data
